"""`m1 bench` as on a card that is not there: kernels in the interpreter, memory pretended."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from m1local import benchmark
from m1local.benchmark import Case, bytes_by_device, joint_bandwidth, measure, warm_up
from m1local.context import Context
from m1local.cuda import support
from m1local.engine import Engine
from m1local.memory import LEAST_MEASURED_BYTES, copied_bytes
from m1local_app import benchmarking
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda import decode  # isort: skip
from m1local.cuda.replay import Replay  # isort: skip
from m1local.cuda.drawing import DrawingDecoder  # isort: skip

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def engine(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A model whose single tokens go through the kernels."""
    monkeypatch.setattr(support, "missing", lambda device: None)
    loaded = Engine.load(tiny_checkpoint, context_tokens=64, gpu_layers="auto")
    model, cache = loaded.model, loaded.context.cache
    loaded.context = Context(model, cache, lambda cache: DrawingDecoder(model, cache))
    return loaded


@pytest.fixture
def happened(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fed, and when the clock is looked at, in order."""
    found: list[str] = []
    clock, feed, finish = time.perf_counter, engine.context.feed, benchmark._finish

    def fed(token_ids: Sequence[int]) -> torch.Tensor:
        found.append("fed")
        return feed(token_ids)

    def looked() -> float:
        found.append("clock")
        return clock()

    def waited(device: torch.device) -> None:
        found.append("waited")
        finish(device)

    monkeypatch.setattr(engine.context, "feed", fed)
    monkeypatch.setattr("time.perf_counter", looked)
    monkeypatch.setattr(benchmark, "_finish", waited)
    monkeypatch.setattr(benchmark, "bandwidth", lambda device: 1e9)
    return found


ONE = ["waited", "clock", "fed", "fed", "waited", "clock"]  # two tokens, the clock outside


def test_the_graph_is_captured_before_the_clock_starts(
    engine: Engine, happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*given: Any, **named: Any) -> Replay:
        happened.append("captured")
        return Replay(*given, **named)

    monkeypatch.setattr(decode, "Replay", noted)
    (found,) = measure(engine, [Case(2, depth=30)], repetitions=2)
    warmed = [*ONE[:3], "captured", *ONE[3:]]
    assert happened == warmed + 2 * ONE
    assert len(found.seconds) == 2
    assert engine.context.cache.position == 32


def test_all_of_a_prompt_is_read_before_it_is_measured_on_a_card() -> None:
    prompt, answer = Case(512, 30, is_answer=False), Case(512, 30)
    assert warm_up(prompt, CUDA) == prompt
    assert warm_up(prompt, CPU) == Case(16, 30, is_answer=False)
    assert warm_up(answer, CUDA) == Case(16, 30)


def test_the_bandwidth_of_two_devices_is_that_of_the_bytes_on_each() -> None:
    found = joint_bandwidth({CUDA: 900, CPU: 100}, {CUDA: 300.0, CPU: 10.0})
    assert found == pytest.approx(1000 / 13)
    assert joint_bandwidth({CUDA: 900}, {CUDA: 300.0}) == 300


def test_bytes_are_counted_where_they_lie(engine: Engine) -> None:
    model, case = engine.model, Case(4, 8)
    whole = bytes_by_device(engine, case)
    assert set(whole) == {CARD}
    model.model.layers[0].to("meta")  # a second device
    split = bytes_by_device(engine, case)
    moved = sum(each.nbytes for each in model.model.layers[0].parameters())
    assert split[torch.device("meta")] == moved
    assert split[CARD] == whole[CARD] - moved


def test_a_nearly_full_card_is_measured_with_less() -> None:
    assert copied_bytes(512 << 20, 8 << 30) == 512 << 20
    assert copied_bytes(512 << 20, 600 << 20) == 200 << 20
    assert copied_bytes(512 << 20, 1 << 20) == LEAST_MEASURED_BYTES


def test_table_and_json_name_the_card(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = [0]  # by the bandwidth, whose bytes are no part of the peak

    def fast(device: torch.device) -> float:
        allocated[0] = 9 << 30
        return 1e9

    monkeypatch.setattr(benchmark, "bandwidth", fast)
    monkeypatch.setattr(benchmark, "_finish", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocated.insert(0, 3 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated[0])
    engine.context.device = CUDA
    found = list(measure(engine, [Case(2), Case(4, is_answer=False)], repetitions=1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    monkeypatch.setattr(benchmarking, "_card_layers", lambda engine: 4)
    said = json.loads(benchmarking.as_json(engine, found))
    assert (said["card"], said["card_layers"], said["card_peak_bytes"]) == ("A Card", 4, 3 << 30)
    assert said["why_no_graph"] == engine.context.decoder.reason  # type: ignore[union-attr]
    last = benchmarking.as_text(engine, found).splitlines()[-1]
    assert "A Card" in last
    assert "4 of 4 layers on the card, at most 3.00 GiB of its memory" in last
