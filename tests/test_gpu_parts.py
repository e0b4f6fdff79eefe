"""bench/gpu.py without a card: its parts in the interpreter on a tiny model, and its order."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_model, gpu_parts, gpu_peers, gpu_shapes
from bench.gpu import TESTS, in_a_process, missing, run_parts, table
from bench.gpu_parts import PARTS
from bench.gpu_subject import Subject
from m1local import placement
from m1local.config import M1Config
from m1local.cuda import support
from m1local.cuda.card import Card, RowShape
from m1local.cuda.host_embedding import HostEmbedding
from m1local.errors import DependencyError
from m1local.formats import LinearSpec
from m1local.formats.groups import GroupLinear
from m1local.memory import PROCESS_BYTES, Setting
from m1local.placement import Placement
from tests.conftest import CARD, TINY
from tests.interpreter import without_overflow_checks  # skips without Triton; before its kernels
from tests.test_kv_store import WIDE

from m1local.cuda import one_row, overlap  # isort: skip

LAYERS = {"num_hidden_layers": 2, "sliding_window_layers": [1], "vocab_size": 128}
CONFIG = M1Config.from_dict(TINY | LAYERS)


def subject(
    config: M1Config = CONFIG, *, contexts: tuple[int, ...] = (5, 40), cap: int = 0
) -> Subject:
    return Subject(
        CARD, config, contexts=contexts, prompt=16, chunk=8, repeats=1, warm_ups=0,
        copied=1 << 20, caches=1, shapes={(64, 64): 2, (128, 64): 3}, cap=cap, warm_seconds=0,
        answer=2,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_overflow_checks(monkeypatch)
    monkeypatch.setattr(support, "missing", lambda device: None)
    monkeypatch.setattr(support, "usable", lambda device: True)


@torch.inference_mode()
def test_every_format_is_checked_against_its_dequantized_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = gpu_parts.check_kernels(subject())
    assert found.pop("wrong") == []
    assert len(found) == 9
    assert max(found.values()) < 0.02
    monkeypatch.setattr(gpu_parts, "MOST_ERROR", -1.0)
    made = gpu_model.random_matrix

    def broken(shape: tuple[int, int], spec: LinearSpec, device: torch.device) -> object:
        if spec.format == "bnb-nf4":
            raise DependencyError("no bitsandbytes")
        return made(shape, spec, device)

    monkeypatch.setattr(gpu_parts, "random_matrix", broken)
    wrong = gpu_parts.check_kernels(subject())["wrong"]  # the others are checked all the same
    assert [what for what in wrong if "int" in what] == [
        f"{name}, {rows} rows" for name in ("int4", "int8") for rows in (1, 5, 8)
    ]
    assert "nf4: DependencyError: no bitsandbytes" in wrong


@pytest.mark.parametrize("name", ["int8", "bf16"])
@torch.inference_mode()
def test_decode_is_measured_at_each_context(name: str) -> None:
    found = gpu_parts.decode(name, "f16", subject())
    assert [row["context"] for row in found["rows"]] == [5, 40]
    for row in found["rows"]:
        assert row["tokens_per_second"] == 1000 / row["graph_ms"]
        assert row["percent_of_copy"] > 0
        assert row["why_no_graph"] == ("" if CARD.type == "cuda" else "no graphs on cpu")
    assert found["left_out"] == []


@torch.inference_mode()
def test_a_context_in_bytes_is_measured() -> None:
    wide = subject(M1Config.from_dict(WIDE | LAYERS | {"intermediate_size": 64}), contexts=(5,))
    (row,) = gpu_parts.decode("int4", "q8_0", wide)["rows"]
    assert row["kv_type"] == "q8_0"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("serial", (False, 8 << 20, True)),
        ("unasked", (True, 0, True)),
        ("untiled", (True, 8 << 20, False)),
    ],
)
@torch.inference_mode()
def test_a_step_is_measured_without_one_thing_or_the_other(
    name: str, found: tuple[bool, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    big, seen = Card((9, 0), 132, 32 << 20), []
    begun_early, tile = overlap.begun_early, GroupLinear.tile

    def asked(device: torch.device) -> dict[str, object]:
        seen.append((big.overlaps, big.ahead, GroupLinear.tile is tile))
        return begun_early(device)

    monkeypatch.setattr(one_row, "begun_early", asked)
    (row,) = gpu_parts.without(name, subject())["rows"]
    assert (row["format"], row["context"]) == (f"int4 {name}", 5)
    assert set(seen) == {found}
    assert (big.overlaps, big.ahead, GroupLinear.tile is tile) == (True, 8 << 20, True)


@torch.inference_mode()
def test_programs_of_other_shapes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_shapes, "SHAPES", [RowShape(1, 4), RowShape(2, 1), RowShape(3, 1)])
    found = gpu_shapes.shapes(subject())
    assert [*found] == ["gate and up", "down", "o_proj", "W_pack", "head"]
    for tried in found.values():
        fine, other, wrong = (tried[name] for name in ("1 x 4", "2 x 1", "3 x 1"))
        assert isinstance(fine, float)
        assert isinstance(other, float)
        assert "power of 2" in str(wrong)  # the others are measured all the same


@torch.inference_mode()
def test_where_the_time_goes_is_asked_of_the_card() -> None:
    kernels = gpu_parts.profile(subject())["kernels"]
    assert bool(kernels) == (CARD.type == "cuda")


def test_contexts_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = subject().planned("int4")
    least = gpu_parts._takes(planned, subject(), 5, "f16")
    monkeypatch.setattr(gpu_parts, "free_bytes", lambda device: least)
    with torch.inference_mode():
        found = gpu_parts.decode("int4", "f16", subject())
    assert ([row["context"] for row in found["rows"]], found["left_out"]) == ([5], [40])
    monkeypatch.setattr(gpu_parts, "free_bytes", lambda device: 0)
    assert gpu_parts.decode("int4", "f16", subject())["rows"] == []
    assert "left_out" in gpu_parts.prompt("int4", subject())


@torch.inference_mode()
def test_a_prompt_is_measured_with_what_was_planned() -> None:
    found = gpu_parts.prompt("int8", subject())
    assert found["prompt_ms"] > 0
    assert found["answer_tokens_per_second"] > 0
    assert found["why_no_graph"] == ("" if CARD.type == "cuda" else "no graphs on cpu")
    assert found["peak_planned"] > 0


@torch.inference_mode()
def test_a_peer_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("not for this card")

    monkeypatch.setattr(gpu_peers, "_pack", broken)
    found = gpu_peers.peers(subject())
    assert found["int4pack"] == {"failed": "RuntimeError: not for this card"}
    assert found["bf16 cuBLAS"]["prompt_ms"] > 0
    assert all(found[f"m1local {name}"]["token_ms"] > 0 for name in ("int4", "int8", "nf4"))


@torch.inference_mode()
def test_under_a_cap_layers_leave_the_card() -> None:
    least = subject().planned("int4")
    room = least.demand(subject().setting(8192), CARD).device - least.layer_bytes(0) // 2
    monkey = pytest.MonkeyPatch()
    monkey.setattr(gpu_parts, "CAPPED", gpu_parts.CAPPED[:1])
    try:
        (found,) = gpu_parts.capped(subject(cap=PROCESS_BYTES + room))
    finally:
        monkey.undo()
    assert found["gpu_layers"] == 1
    assert found["tokens_per_second"] > 0


class Clock:
    """A clock that only a part moves on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def part(self, taking: float, said: object = None) -> Callable[[str, float], object]:
        def run(name: str, seconds: float) -> object:
            self.seconds += taking
            if isinstance(said, Exception) and name == "b":
                raise said
            return {"name": name}

        return run


@pytest.mark.parametrize(
    "error",
    [subprocess.TimeoutExpired("b", 9), ValueError("CUDA error"), OSError("no process")],
)
def test_a_part_that_fails_loses_no_other_s_results(error: Exception) -> None:
    clock, kept = Clock(), list[str]()
    run = clock.part(1, error)
    found = run_parts(
        "abc", run, lambda found: kept.append(json.dumps(found)), seconds=900, now=clock
    )
    assert found["a"] == {"name": "a"}
    assert "failed" in found["b"]
    assert found["c"] == {"name": "c"}
    assert [("b" in json.loads(text), "c" in json.loads(text)) for text in kept] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip
    assert missing(found)["b"].startswith("failed")


def test_what_the_time_does_not_suffice_for_is_left_out() -> None:
    clock = Clock()
    found = run_parts("abc", clock.part(100), lambda found: None, seconds=210, now=clock)
    assert found["b"] == {"name": "b"}
    assert found["c"] == {"left_out": "the time was up"}


def test_a_file_of_tests_that_takes_too_long_loses_no_other_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[float] = []

    def run(command: list[str], *, timeout: float, **_: object) -> object:
        given.append(timeout)
        if command[-1].endswith("fused.py"):
            raise subprocess.TimeoutExpired(command, timeout)
        bad = command[-1].endswith("decode.py")
        said = (
            "FAILED tests/x.py::y - off by 1\n1 failed, 3 passed in 2s" if bad else "4 passed in 2s"
        )
        return subprocess.CompletedProcess(command, int(bad), said, "")

    monkeypatch.setattr(subprocess, "run", run)
    times = [0.0, 0, 10, 20, 30, 40, 45, 50, 55, 88, 95]
    found = gpu.kernel_tests(90, now=iter(times).__next__)
    assert given == [90, 80, 70, 60, 50, 45, 40, 35, 2, 1]
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_cuda_*")
             if "import CARD" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert {*gpu.KERNEL_TESTS} == {"gpu", *files}
    assert len(given) == len(gpu.KERNEL_TESTS)
    assert found["cuda_products"] == {"passed": 4}
    assert found["cuda_decode"] == {"failed": 1, "passed": 3}
    assert found["wrong"] == ["cuda_fused: the time was up", "FAILED tests/x.py::y - off by 1"]
    assert missing({TESTS: found})[TESTS].startswith("wrong: cuda_fused")


def test_a_card_s_random_model_is_where_a_loaded_one_would_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    types = {"cpu": torch.float32, "meta": torch.bfloat16}
    monkeypatch.setattr(placement, "compute_dtype", lambda device: types[device.type])
    layers = CONFIG.num_hidden_layers
    for first in (0, 1):
        placed = Placement(torch.device("meta"), first, Setting(64))
        model = gpu_model.random_model(CONFIG, "bf16", placed)
        norms = [layer.get_parameter("input_layernorm.weight") for layer in model.model.layers]
        there = [("cpu", torch.float32)] * first + [("meta", torch.bfloat16)] * (layers - first)
        assert [(norm.device.type, norm.dtype) for norm in norms] == there
        (table,) = model.model.embed_tokens.parameters()
        assert (table.device.type, table.dtype) == ("cpu", there[0][1])  # that of its layer
        assert isinstance(model.model.embed_tokens, HostEmbedding) is (first == 0)


def test_every_part_that_is_wanted_is_there() -> None:
    wanted = {"copy", "kernels", "peers", "capped", "prompt bf16", "decode int4 q8_0"}
    wanted |= {f"decode int4 {name}" for name in ("serial", "unasked", "untiled")}
    assert wanted | {f"{kind} {name}" for kind in ("decode", "prompt")
                     for name in ("int4", "int8", "nf4")} <= set(PARTS)  # fmt: skip
    assert sorted(gpu.everything()) == sorted([*PARTS, TESTS])
    assert gpu.everything().index(TESTS) < gpu.everything().index("decode int8")
    assert Subject(CARD).contexts == (128, 4096, 16384, 32640)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_part_s_last_words_are_its_error() -> None:
    with pytest.raises(ValueError, match="needs a CUDA card"):
        in_a_process("copy", 120)


def test_the_table_is_of_what_there_is(tmp_path: Path) -> None:
    row = {
        "format": "int4", "kv_type": "f16", "context": 128, "tokens_per_second": 100.0,
        "percent_of_copy": 81.0, "plain_ms": 20.0,
    }  # fmt: skip
    found = {
        "card": "A Card", "copy": {"gb_per_second": 3000.0}, "decode int4": {"rows": [row]},
        "prompt int4": {
            "format": "int4", "prompt_ms": 160.0, "peak_reserved": 9 << 30, "percent_of_plan": 97.0,
            "peak_on_the_card": int(9.5 * 2**30), "answer_tokens_per_second": 70.0,
            "why_no_graph": "capturing failed",
        },
        "peers": {
            "m1local nf4": {"token_ms": 2.0}, "bitsandbytes NF4": {"token_ms": 5.0},
            "bf16 cuBLAS": {"token_ms": 9.0, "prompt_ms": 100.0},
        },
        "decode nf4": {"failed": "CUDA error"}, "prompt nf4": {"left_out": "the time was up"},
        "capped": [{"gpu_layers": 31, "tokens_per_second": 7.5}],
        TESTS: {"gpu": {"failed": 2}, "wrong": ["FAILED x"]},
    }  # fmt: skip
    said = table(found)
    for words in (
        "A Card: copies at 3000 GB/s", "81.0 % of the copy; one by one    50.0",
        "int4  prompt: 160 ms, 1.60 x bf16; then 70.0 tokens/s drawn on the card (no graph: ",
        "peak_reserved 9.00 GiB", "wanted int4 decode, % of the copy >= 80: 81.00, yes",
        "wanted bitsandbytes NF4 / nf4 >= 1.5: 2.50, yes", "int4pack / int4 > 1: not measured",
        "wanted int4 prompt / bf16 <= 1.5: 1.60, NO", "GiB of the card < 10: 9.50, yes",
        "its peak, % of the plan 95 to 105: 97.00, yes", "under 7.2 GiB > 0: 7.50, yes",
        "tests: wrong: FAILED x",
        "bitsandbytes NF4: 5.00 ms a token's matrices, 2.50 x ours", "decode nf4: failed: CUDA",
        "prompt nf4: left out", "'gpu_layers': 31",
    ):  # fmt: skip
        assert words in said, words
    assert table({"card": "A Card"}).startswith("A Card\nwanted int4 decode")
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(found))
    assert gpu._kept(path, "A Card")["copy"] == {"gb_per_second": 3000.0}
    assert gpu._kept(path, "Another") == gpu._kept(tmp_path / "none", "A Card") == {}
