"""What `m1 run` chooses on a card: by its free memory, and by what is kept already.

There is no card: its memory is pretended, and the chosen setting is loaded on the CPU.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.synthetic import DIMENSIONS
from m1local import home, memory
from m1local.checkpoint import matrix_names
from m1local.config import M1Config
from m1local.cuda import int4pack
from m1local.formats import LinearSpec
from m1local.manifest import CheckpointManifest
from m1local.memory import CARD_CHUNK, Model, Setting, room, suited
from m1local_app import choosing, library
from m1local_app.cli import cli
from m1local_app.fitting import Size
from m1local_app.language import choose as speak
from m1local_app.options import Chosen, parse_size
from m1local_quantize.recipe import Recipe

BIG = DIMENSIONS | {"num_hidden_layers": 40, "sliding_window_layers": list(range(1, 40, 2))}
GREEDY = ("-p", "hello", "--temp", "0", "-n", "4")
CUDA = torch.device("cuda")


@pytest.fixture
def big(tmp_path: Path) -> Chosen:
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    return Chosen(tmp_path, "big")


def pretend(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(choosing, "used_device", lambda: CUDA)
    monkeypatch.setattr(choosing, "free_bytes", lambda device: int(gib * 2**30))


def taken(chosen: Chosen, kv_type: str | None = None) -> tuple[object, ...]:
    found = choosing.choose(chosen, kv_type)
    assert found is not None
    assert found.needed <= found.free
    setting = found.setting
    if found.free > 20 << 30:  # room for everything: prompts are read as a card reads them
        assert setting.max_chunk == CARD_CHUNK
    return found.recipe, setting.context_tokens, setting.kv_type, setting.gpu_layers


@pytest.mark.parametrize(
    ("gib", "recipe", "tokens", "kv_type"),
    [
        (24, "int8", 8192, "f16"), (13.9, "int8", 8192, "q8_0"), (13.2, "int4", 8192, "f16"),
        (9.1, "int4", 8192, "f16"), (8.5, "int4", 8192, "q8_0"), (8.15, "int4", 4096, "q8_0"),
        (7.95, "int4", 2048, "q8_0"),
    ],
)  # fmt: skip
def test_the_best_that_is_whole_on_the_card(
    big: Chosen, monkeypatch: pytest.MonkeyPatch, gib: float, recipe: str, tokens: int, kv_type: str
) -> None:
    pretend(monkeypatch, gib)
    assert taken(big) == (recipe, tokens, kv_type, None)


def test_without_kernels_four_bits_are_made(big: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 24)
    for module in (choosing, memory):
        monkeypatch.setattr(module, "by_kernels", lambda device: False)
    for packed, recipe in ((True, "int4"), (False, "int8")):
        monkeypatch.setattr(int4pack, "serves", lambda *_, packed=packed: packed)
        assert choosing.choose(big, None).recipe == recipe  # type: ignore[union-attr]


def test_then_layers_leave_the_card(big: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 6)
    recipe, tokens, kv_type, layers = taken(big)
    assert (recipe, tokens, kv_type) == ("int4", 2048, "q8_0")
    assert isinstance(layers, int)
    assert 20 < layers < 40
    found = choosing.choose(big, None)
    assert found is not None
    assert f"with {layers} of 40 layers there" in choosing.line(found)
    assert "--recipe fit" not in choosing.line(found)  # nor would it in so few bits


def test_fewer_bits_are_advised_where_they_fit(
    big: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(gib: float) -> str:
        pretend(monkeypatch, gib)
        found = choosing.choose(big, None)
        assert found is not None
        return choosing.line(found)

    line = said(7.2)
    size = re.search(r"all layers .*--recipe fit --for ([\d.]+GB) --ctx-size 4096\.", line)
    assert size, line
    config, card = M1Config.from_dict(BIG), int(7.2 * 2**30)
    weights = Size(device=parse_size(size[1]), context_tokens=4096).weights(config)
    specs = dict.fromkeys(matrix_names(config), LinearSpec("int4", 64))
    beside = Model(config, specs, torch.bfloat16).demand(suited(Setting(4096), CUDA), CUDA)
    needed = weights + beside.device - beside.weights
    assert room(CUDA, card) - 10**8 < needed <= room(CUDA, card)
    assert "--recipe fit" not in said(9)  # int4 is whole
    speak("zh")
    assert f"--recipe fit --for {size[1]} --ctx-size 4096" in said(7.2)


def test_how_the_context_is_kept_may_be_said(big: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 13.9)
    assert taken(big, "f16")[:3] == ("int4", 8192, "f16")
    pretend(monkeypatch, 24)
    assert taken(big, "q8_0")[:3] == ("int8", 8192, "q8_0")


def keep(chosen: Chosen, recipe: str) -> None:
    folder = library.kept_folder(chosen, Recipe.find(recipe))
    folder.mkdir(parents=True)
    (folder / "m1local.json").write_text("{}")


def test_what_is_kept_is_taken_before_another_is_made(
    big: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 24)
    keep(big, "bnb-nf4")
    keep(big, "int4")
    found = choosing.choose(big, None)
    assert found is not None
    assert (found.recipe, found.instead_of) == ("int4", "int8")
    assert "--recipe int8" in choosing.line(found)
    speak("zh")
    assert "--recipe int8" in choosing.line(found)
    keep(big, "int8")
    found = choosing.choose(big, None)
    assert found is not None
    assert (found.recipe, found.instead_of) == ("int8", "")


def test_what_is_kept_but_does_not_fit_is_not(big: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 12)
    keep(big, "int8")
    assert taken(big)[0] == "int4"


def test_without_a_card_nothing_is_chosen(big: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "used_device", lambda: torch.device("cpu"))
    assert choosing.choose(big, None) is None


def made() -> set[str]:
    return {CheckpointManifest.read(path).recipe for path in home.models().iterdir()}


def test_run_takes_what_is_chosen_and_says_so(
    tiny_checkpoint: Path, m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 8)
    shown = CliRunner().invoke(cli, ["run", str(tiny_checkpoint), *GREEDY])
    assert shown.exit_code == 0, shown.output
    (line,) = (line for line in shown.stderr.splitlines() if "Chosen for this card" in line)
    assert "int8, 256 tokens of context;" in line
    assert "of 8.00 GiB free" in line
    assert "`m1 plan`" in line
    assert made() == {"int8"}
    (kept,) = home.models().iterdir()
    again = CliRunner().invoke(cli, ["run", kept.name, *GREEDY])
    assert "Chosen for this card: int8" in again.stderr


@pytest.mark.parametrize(
    "named", [("-r", "int4"), ("-c", "64"), ("-ngl", "0")], ids=["recipe", "context", "layers"]
)
def test_what_was_named_is_taken(
    tiny_checkpoint: Path, m1_home: Path, monkeypatch: pytest.MonkeyPatch, named: tuple[str, str]
) -> None:
    pretend(monkeypatch, 8)
    shown = CliRunner().invoke(cli, ["run", str(tiny_checkpoint), *named, *GREEDY])
    assert shown.exit_code == 0, shown.output
    assert "Chosen" not in shown.stderr
    assert made() == {"int4"}
