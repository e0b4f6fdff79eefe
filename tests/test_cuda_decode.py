"""The whole decode path, in the interpreter, against the ordinary one on tiny models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from m1local.cache import KVCache
from m1local.config import M1Config
from m1local.context import Context
from m1local.cuda import support
from m1local.cuda.matrix import Matrix
from m1local.formats import LinearSpec
from m1local.formats.groups import GroupLinear
from m1local.formats.int8 import Int8Linear
from m1local.kv_store import BYTES, FLOAT
from m1local.memory import Setting
from m1local.model import M1Model
from m1local.placement import Placement, decoder_of
from tests.conftest import CARD, TINY
from tests.interpreter import without_overflow_checks  # skips without Triton; before its kernels
from tests.test_kv_store import WIDE
from tests.test_memory import quantized, stored_as

from m1local.cuda import ahead, attention, one_row, replay  # isort: skip
from m1local.cuda.decode import Decoder, stored  # isort: skip
from m1local.cuda.drawing import DrawingDecoder  # isort: skip

PROMPT = [5, 17, 30, 41, 8, 99, 12, 40, 77, 21]  # longer than the window of 8
RAW = TINY | {
    "num_hidden_layers": 2, "sliding_window_layers": [1], "vocab_size": 128, "intermediate_size": 64
}  # fmt: skip
CONFIG = M1Config.from_dict(RAW)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_overflow_checks(monkeypatch)
    monkeypatch.setattr(support, "missing", lambda device: None)
    for chosen in (GroupLinear, Int8Linear):  # the ordinary path is that of plain torch here
        monkeypatch.setattr(chosen, "forward", chosen.multiply_sliced)


def model_of(format_: str) -> M1Model:
    if format_ == "float":
        return quantized(CONFIG, {}).to(CARD)
    stored = "int4" if format_ == "mixed" else format_
    specs = stored_as(CONFIG, stored, None if stored == "int8" else 32)
    if format_ == "mixed":  # one matrix as it was, and up is stored unlike gate
        del specs["model.layers.0.self_attn.o_proj"]
        specs["model.layers.1.mlp.up_proj"] = LinearSpec("int8")
    return quantized(CONFIG, specs).to(CARD)


def new_cache(config: M1Config = CONFIG, kv_type: str = FLOAT) -> KVCache:
    return KVCache.allocate(
        config, 64, dtype=torch.float32, device=str(CARD), max_chunk=16, rewind_tokens=8,
        kv_type=kv_type,
    )  # fmt: skip


def ordinary(model: M1Model, cache: KVCache, token_ids: list[int]) -> torch.Tensor:
    batch = torch.tensor([token_ids], device=CARD)
    logits: torch.Tensor = model(batch, cache, last_only=True)[0, -1]
    return logits


@pytest.mark.parametrize("format_", ["float", "int8", "int3", "int4", "int6", "mixed"])
@torch.inference_mode()
def test_the_tokens_are_those_of_the_ordinary_path(format_: str) -> None:
    model, expected_cache, cache = model_of(format_), new_cache(), new_cache()
    wanted = ordinary(model, expected_cache, PROMPT)
    ordinary(model, cache, PROMPT)
    decoder = Decoder(model, cache)
    assert (decoder.step.grown is None) == (format_ in ("float", "mixed"))
    for _ in range(3):
        token = int(wanted.argmax())
        wanted = ordinary(model, expected_cache, [token])
        found = decoder.feed(token)
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
        assert int(found.argmax()) == int(wanted.argmax())
    assert cache.position == expected_cache.position
    same_books(cache, expected_cache)


def same_books(cache: KVCache, expected: KVCache) -> None:
    for found, wanted in zip(cache.layers, expected.layers, strict=True):
        assert (found.written, found.raw_start) == (wanted.written, wanted.raw_start)


@torch.inference_mode()
def test_matrices_in_tiles_give_the_same_tokens() -> None:
    wide = WIDE | {"num_hidden_layers": 2, "sliding_window_layers": [1], "vocab_size": 128}
    config = M1Config.from_dict(wide | {"intermediate_size": 128})
    model = quantized(config, stored_as(config, "int4", 32)).to(CARD)
    expected_cache, cache = new_cache(config), new_cache(config)
    ordinary(model, expected_cache, PROMPT)
    wanted = ordinary(model, expected_cache, [3])
    ordinary(model, cache, PROMPT)
    matrices = [module for module in model.modules() if isinstance(module, GroupLinear)]
    for module in matrices[1:]:  # the first is the embedding's table
        module.tile()
        assert module.tiled
    assert len(matrices) == 2 * 5 + 2
    found = Decoder(model, cache).feed(3)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@torch.inference_mode()
def test_both_paths_take_turns_on_one_cache() -> None:
    model, expected_cache, cache = model_of("float"), new_cache(), new_cache()
    decoder = Decoder(model, cache)
    ordinary(model, expected_cache, PROMPT)
    ordinary(model, cache, PROMPT)
    for turn, token in enumerate([3, 50, 120, 7, 90]):
        feed: Callable[[int], torch.Tensor] = decoder.feed
        found = feed(token) if turn % 2 == 0 else ordinary(model, cache, [token])
        wanted = ordinary(model, expected_cache, [token])
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@torch.inference_mode()
def test_a_sequence_is_cut_back_to_a_boundary_and_goes_on() -> None:
    model, cache = model_of("float"), new_cache()
    ordinary(model, cache, PROMPT[:4])
    cache.remember(4)
    decoder = Decoder(model, cache)
    first = decoder.feed(100).clone()
    for token in range(20, 36):  # the raw state of position 4 is overwritten in the ring
        decoder.feed(token)
    assert not cache.can_rollback(5)
    cache.rollback(4)
    torch.testing.assert_close(decoder.feed(100), first, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_context_in_bytes_is_decoded_by_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = WIDE | {"num_hidden_layers": 2, "sliding_window_layers": [1], "vocab_size": 128}
    config = M1Config.from_dict(wide | {"intermediate_size": 64})
    model = quantized(config, stored_as(config, "int4", 32)).to(CARD)
    expected_cache, cache = (new_cache(config, BYTES) for _ in range(2))
    for chunk in (PROMPT, PROMPT[::-1], PROMPT[:9]):
        wanted = ordinary(model, expected_cache, chunk)
        ordinary(model, cache, chunk)
    placed = Placement(CARD, 0, Setting(64, BYTES))
    made = decoder_of(model, placed)
    assert made is not None
    decoder = made(cache)
    assert isinstance(decoder, Decoder)
    for _ in range(4):  # the ring of the sliding layer wraps around
        token = int(wanted.argmax())
        wanted = ordinary(model, expected_cache, [token])
        found = decoder.feed(token)
        torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)
    assert cache.position > cache.layers[1].slots > 29
    same_books(cache, expected_cache)


@torch.inference_mode()
def test_a_step_begun_for_nothing_leaves_no_trace() -> None:
    model, expected_cache, cache = model_of("float"), new_cache(), new_cache()
    ordinary(model, expected_cache, PROMPT)
    ordinary(model, cache, PROMPT)
    decoder = Decoder(model, cache)
    decoder.feed(3)
    decoder.step.token.fill_(9)
    assert decoder.launch_ahead()
    decoder.was_drawn(9)
    found = decoder.feed(11)  # another one after all
    ordinary(model, expected_cache, [3])
    torch.testing.assert_close(found, ordinary(model, expected_cache, [11]), atol=2e-3, rtol=2e-3)
    decoder.step.token.fill_(12)
    assert decoder.launch_ahead()
    decoder.was_drawn(12)
    launched = decoder.step.logits.clone()
    torch.testing.assert_close(decoder.feed(12), launched)  # nothing is computed twice
    wanted = ordinary(model, expected_cache, [12])
    torch.testing.assert_close(launched, wanted, atol=2e-3, rtol=2e-3)


@torch.inference_mode()
def test_what_was_begun_is_forgotten_when_the_cache_changes() -> None:
    model, cache = model_of("float"), new_cache()
    context = Context(model, cache, lambda cache: DrawingDecoder(model, cache))
    plain = Context(model, new_cache())
    for one in (context, plain):
        one.feed(PROMPT[:6])
    decoder = context.decoder
    assert isinstance(decoder, Decoder)
    decoder.feed(3)
    context.token_ids.append(3)
    decoder.step.token.fill_(9)
    assert decoder.launch_ahead()
    decoder.was_drawn(9)
    other = [1, 2, 3, 4, 5, 6, 7]  # as long as what was held, but another text
    for one in (context, plain):
        one.keep_common([*other, 9])
        one.feed(other[len(one.token_ids) :])
    torch.testing.assert_close(context.feed([9]), plain.feed([9]), atol=2e-3, rtol=2e-3)


@torch.inference_mode()
def test_the_first_layers_may_be_computed_elsewhere() -> None:
    model, expected_cache, cache = model_of("int8"), new_cache(), new_cache()
    ordinary(model, expected_cache, PROMPT)
    ordinary(model, cache, PROMPT)
    decoder = Decoder(model, cache, first=1)
    for token in (3, 11):
        wanted = ordinary(model, expected_cache, [token])
        torch.testing.assert_close(decoder.feed(token), wanted, atol=2e-3, rtol=2e-3)
    assert not decoder.launch_ahead()
    same_books(cache, expected_cache)


@torch.inference_mode()
def test_warming_up_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model, cache = model_of("float"), new_cache()

    def fake(work: Callable[[], None], prepare: Callable[[], object]) -> Callable[[], None]:
        for _ in range(replay.WARM_UPS):
            prepare()
            seen.append(int(decoder.step.position))
            decoder.step.position.add_(1)
        return work

    monkeypatch.setattr(replay, "captured", fake)
    decoder = Decoder(model, cache)
    decoder.step.device = torch.device("cuda")
    ordinary(model, cache, PROMPT)
    decoder.feed(3)
    assert seen == [len(PROMPT)] * replay.WARM_UPS
    assert int(decoder.step.position) == len(PROMPT) + 1


def test_why_there_is_no_graph() -> None:
    model, cache = model_of("float"), new_cache()
    decoder = Decoder(model, cache)
    assert decoder.reason == ""
    with torch.inference_mode():
        decoder.feed(3)
    assert decoder.reason == ("" if CARD.type == "cuda" else "no graphs on cpu")


def test_a_failed_capture_leaves_the_thread_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, modes = ["the thread's"], list[str]()

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    @contextmanager
    def stream(name: object) -> Iterator[None]:
        before = chosen[0]
        chosen[0] = "the warm-up's" if isinstance(name, Stream) else str(name)
        try:
            yield
        finally:
            chosen[0] = before

    class Graph:  # as torch.cuda.graph, which does not get to its stream's end
        def __init__(self, graph: object, capture_error_mode: str) -> None:
            modes.append(capture_error_mode)

        def __enter__(self) -> None:
            chosen[0] = "the graph's"

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    class Current(str):
        def wait_stream(self, other: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Current(chosen[0]))
    for name, fake in (("Stream", Stream), ("stream", stream), ("graph", Graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    again = replay.Replay(lambda: None, torch.device("cuda"))
    assert again.reason.startswith("capturing failed: operation failed")
    assert chosen == ["the thread's"]
    assert modes == ["thread_local"]


def codes_of(module: torch.nn.Module) -> int:
    matrix = stored(module)
    assert matrix is not None
    return matrix.codes.data_ptr()


@torch.inference_mode()
def test_every_kernel_of_a_step_asks_for_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = model_of("int4"), new_cache()
    ordinary(model, cache, PROMPT)
    decoder = Decoder(model, cache)
    asked: list[tuple[int, ...]] = []

    def following(matrices: tuple[Matrix, ...], *given: Any) -> ahead.Following:
        asked.append(tuple(matrix.codes.data_ptr() for matrix in matrices))
        return ahead.following(matrices, *given)

    monkeypatch.setattr(attention, "following", following)
    monkeypatch.setattr(one_row, "following", following)
    decoder.feed(3)
    wanted: list[tuple[torch.nn.Module, ...]] = []
    for layer in decoder.step._layers():
        heads, mlp = layer.self_attn, layer.mlp
        wanted += [(heads.W_pack,), (heads.o_proj,), (mlp.gate_proj, mlp.up_proj)]
        wanted += [(mlp.down_proj,)]
    wanted += [(model.lm_head,)]
    codes = [tuple(codes_of(module) for module in modules) for modules in wanted[1:]]
    # W_pack's product asks for nothing: what the cache holds is read between it and o_proj.
    assert [one for one in asked if one] == codes
    assert asked.count(()) == len(model.model.layers) + 1
