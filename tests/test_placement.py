"""Parts of a model on two devices: what goes where, and the same answers.

Without a card the second device is the CPU again, in bfloat16, so that what is moved shows.
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from m1local import placement as placing
from m1local.cache import DEFAULT_MAX_CHUNK, KVCache
from m1local.checkpoint import Part, check_memory, load_model, parameter_shapes
from m1local.config import M1Config
from m1local.cuda.transfer import Shared, Transfer, aligned
from m1local.engine import Engine
from m1local.errors import CheckpointError, MemoryLimitError
from m1local.memory import CARD_CHUNK, Setting
from m1local.placement import Placement, place, settled
from m1local_app.cli import cli
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.conftest import TINY

CPU, CARD = torch.device("cpu"), torch.device("cuda")
CONFIG = M1Config.from_dict(TINY)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is not there, with a gigabyte."""
    monkeypatch.setattr(placing, "used_device", lambda: CARD)
    monkeypatch.setattr(placing, "room", lambda device: 1 << 30)
    monkeypatch.setattr(placing, "compute_dtype", lambda device: torch.bfloat16)


def test_without_a_card_all_is_as_ever(tiny_checkpoint: Path) -> None:
    found = place(tiny_checkpoint, Setting(64), "auto")
    if not torch.cuda.is_available():
        assert found == Placement(CPU, 0, Setting(64))
    assert place(tiny_checkpoint, Setting(64), 0).card == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("layers", ["all", "3"])
def test_a_card_that_was_asked_for_and_is_not_there(layers: str) -> None:
    shown = CliRunner().invoke(cli, ["run", "-p", "hello", "--gpu-layers", layers])
    assert shown.exit_code == 1
    assert f"--gpu-layers {layers} needs an NVIDIA card" in shown.stderr


def test_gpu_layers_that_are_no_number() -> None:
    shown = CliRunner().invoke(cli, ["run", "-p", "hello", "--gpu-layers", "some"])
    assert shown.exit_code == 2


@pytest.mark.usefixtures("card")
def test_what_goes_where(tiny_checkpoint: Path) -> None:
    whole = place(tiny_checkpoint, Setting(64), "auto")
    assert (whole.card, whole.first) == (CARD, 0)
    assert place(tiny_checkpoint, Setting(64), "all") == whole
    assert place(tiny_checkpoint, Setting(64), 99) == whole
    half = place(tiny_checkpoint, Setting(64), 3)
    assert half.first == 1
    assert next(whole.parts(CONFIG)) == ("model.embed_tokens", CPU, torch.bfloat16)
    devices = {part.prefix: part.device for part in half.parts(CONFIG)}
    assert devices["model.embed_tokens"] == devices["model.layers.0."] == CPU
    assert devices["model.layers.1."] == devices["model.norm"] == devices["lm_head"] == CARD


@pytest.mark.usefixtures("card")
def test_too_little_memory_is_said_before_anything_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "room", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="--gpu-layers auto"):
        place(tiny_checkpoint, Setting(64), "all")
    assert place(tiny_checkpoint, Setting(64), "auto").card == CPU


@pytest.mark.usefixtures("card")
def test_layers_that_were_asked_for_are_fed_smaller_chunks_before_they_are_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (Setting(128, max_chunk=chunk) for chunk in (CARD_CHUNK, DEFAULT_MAX_CHUNK))
    monkeypatch.setattr(placing, "planned_model", lambda folder, card: Grown())
    for layers in ("all", 3):
        monkeypatch.setattr(placing, "room", lambda device: CARD_CHUNK)
        assert place(tiny_checkpoint, small, layers).setting.max_chunk == large.max_chunk
        monkeypatch.setattr(placing, "room", lambda device: CARD_CHUNK - 1)
        assert place(tiny_checkpoint, small, layers).setting.max_chunk == small.max_chunk


class Grown:
    """A model that takes a byte for each token of a chunk."""

    def demand(self, setting: Setting, device: torch.device) -> object:
        return SimpleNamespace(device=setting.max_chunk)


def test_every_part_is_named_once() -> None:
    names = [part.prefix for part in settled(Setting(64), 4, CPU).parts(CONFIG)]
    for tensor in load_names():
        assert sum(tensor.startswith(name) for name in names) == 1, tensor


def load_names() -> list[str]:
    from m1local.checkpoint import parameter_shapes

    return list(parameter_shapes(CONFIG))


def test_layers_in_two_types_answer_alike(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in quantize_checkpoint(tiny_checkpoint, tmp_path / "int8", Recipe.find("int8")):
        pass
    whole = load_model(tmp_path / "int8", dtype=torch.float32)
    second = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = Placement(second, 2, Setting(64))
    parts = list(split.parts(CONFIG))
    model = load_model(
        tmp_path / "int8",
        device=second,
        parts=parts,
        move=Transfer(second, 1 << 20, buffer_bytes=4096),
    )
    prompt = torch.arange(10, 30)[None]
    wanted = whole(prompt, KVCache.allocate(CONFIG, 64, dtype=torch.float32))
    found = model(prompt, split.allocate(CONFIG)).cpu()
    torch.testing.assert_close(found, wanted, atol=0.15, rtol=0.1)


def test_what_the_plan_leaves_to_the_host_is_what_is_taken_there(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, types = torch.device("meta"), {"cpu": torch.float32}
    monkeypatch.setattr(placing, "compute_dtype", lambda on: types.get(on.type, torch.bfloat16))
    layers = CONFIG.num_hidden_layers
    split = Placement(there, 2, Setting(64, gpu_layers=layers - 2))
    model = load_model(
        tiny_checkpoint,
        device=there,
        parts=list(split.parts(CONFIG)),
        move=lambda tensor: tensor.to(there),
    )
    weights = sum(each.nbytes for each in model.parameters() if each.device == CPU)
    caches = sum(layer.nbytes for layer in split.allocate(CONFIG).layers[:2])
    assert placing.demand(tiny_checkpoint, replace(split, card=CARD)).host == weights + caches


def test_tensors_arrive_whole_through_small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    from m1local.cuda import transfer

    monkeypatch.setattr(transfer, "LEAST_BYTES", 100)
    move = Transfer(CPU, buffer_bytes=64)
    for tensor in (
        torch.randn(37, 5), torch.arange(1000, dtype=torch.uint8).view(10, 100).T,
        torch.randn(3).bfloat16(), torch.zeros(0, 4),
    ):  # fmt: skip
        assert torch.equal(move(tensor), tensor)
    moved = move.finish()
    assert moved.nbytes == 37 * 5 * 4 + 1000 + 6
    assert moved.seconds > 0


def test_tensors_share_an_allocation_as_long_as_there_is_room() -> None:
    wanted = torch.randn(37, 5), torch.arange(300, dtype=torch.uint8), torch.randn(3).bfloat16()
    move = Transfer(CPU, sum(aligned(tensor.nbytes) for tensor in wanted))
    found = [move(tensor) for tensor in wanted]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    beyond = move(torch.ones(1))
    assert beyond.untyped_storage().data_ptr() != found[0].untyped_storage().data_ptr()
    kept = Shared(CPU, 1024)
    first, *others = [kept.take((3,), torch.int8).data_ptr() for _ in range(3)]
    assert [at - first for at in others] == [256, 512]


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_weights_that_are_moved_fit_into_what_is_allocated_for_them(
    recipe: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for _ in quantize_checkpoint(tiny_checkpoint, tmp_path / "m1", Recipe.find(recipe)):
        pass
    taken: list[int] = []

    def move(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(aligned(tensor.nbytes))
        return tensor.to("meta")

    planned = placing.planned_model(tmp_path / "m1", CPU).allocated(Setting(64))
    there = torch.device("meta")
    parts = list(Placement(there, 0, Setting(64)).parts(CONFIG))
    load_model(tmp_path / "m1", device=there, parts=parts, move=move)
    assert planned - (1 << 14) < sum(taken) <= planned  # norms and taps are moved by themselves


def test_matrices_as_they_were_go_through_the_buffers_too(tiny_checkpoint: Path) -> None:
    moved: list[torch.Size] = []

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.shape)
        return tensor.to("meta")

    model = load_model(
        tiny_checkpoint, device=torch.device("meta"), dtype=torch.bfloat16, move=move
    )
    matrices = [each.shape for each in model.parameters() if each.dim() == 2]
    assert sorted(moved) == sorted(matrices)


def test_the_engine_keeps_where_it_lies(tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint, context_tokens=32)
    assert engine.placement == Placement(CPU, 0, Setting(32))
    assert engine.loaded is None


@pytest.mark.parametrize(
    ("parts", "fits"),
    [
        ([Part("", CPU, torch.bfloat16)], True),  # stays mapped
        ([Part("", CPU, torch.float32)], False),
        # Layers on the CPU beside a card, whose own weights take none of the host's memory.
        ([Part("model.layers.0.", CPU, torch.float32), Part("", CARD, torch.float16)], True),
        ([Part("model.", CPU, torch.float32), Part("lm_head", CARD, torch.bfloat16)], False),
    ],
)
def test_what_the_cpu_must_convert_has_to_fit_into_memory(
    parts: list[Part], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = parameter_shapes(CONFIG)
    files = SimpleNamespace(names=list(shapes), dtype=lambda name: torch.bfloat16)
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * numbers}  # half of what all take
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with nullcontext() if fits else pytest.raises(CheckpointError, match=r"as torch\.float32"):
        check_memory(CONFIG, files, parts, Path("m1"))
