"""A few tokens in one call of the compiled library, to the bits of the model's own forward pass.

Whatever is read before, between and after, by whichever of the two, and rolled back: the logits and
all that the cache holds stay the same.
"""

import ctypes
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from m1local.cache import KVCache
from m1local.config import M1Config
from m1local.context import Context
from m1local.engine import Engine
from m1local.errors import ContextLengthError
from m1local.formats import LinearSpec
from m1local.formats.base import QuantizedEmbedding
from m1local.kv_store import BYTES, FLOAT
from m1local.model import M1Model
from m1local.native import library, step
from m1local.native.step import CompiledStep
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.conftest import TINY
from tests.test_memory import quantized, stored_as

# Heads of 32 and 64 values, so that both can be kept as bytes; a window of 8.
RAW = TINY | {"vocab_size": 131, "hidden_size": 256, "intermediate_size": 192}
CONFIG = M1Config.from_dict(RAW)
FORMATS = [("int8", None), ("int3", 32), ("int4", 32), ("int4", 64), ("int5", 32), ("int6", 32)]
TYPES = [torch.bfloat16, torch.float32]

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.status().text)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


def model_of(format_: str, size: int | None, dtype: torch.dtype) -> M1Model:
    model = quantized(CONFIG, stored_as(CONFIG, format_, size))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuantizedEmbedding)
    embedding.dtype = dtype
    return model


def new_cache(dtype: torch.dtype, kv_type: str = FLOAT) -> KVCache:
    return KVCache.allocate(CONFIG, 96, dtype=dtype, max_chunk=16, rewind_tokens=8, kv_type=kv_type)


def ordinary(model: M1Model, cache: KVCache, token_ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([token_ids]), cache)[0]
    return logits


def assert_same_caches(found: KVCache, expected: KVCache) -> None:
    assert found.position == expected.position
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert (ours.written, ours.raw_start) == (theirs.written, theirs.raw_start)
        pairs = [
            *zip([*ours.k.tensors, *ours.v.tensors], [*theirs.k.tensors, *theirs.v.tensors],
                 strict=True),
        ]  # fmt: skip
        for a, b in pairs:
            assert torch.equal(a, b)
        for position in range(max(0, ours.raw_start), ours.written):
            for a, b in zip(ours.raw_before(position + 1), theirs.raw_before(position + 1),
                            strict=True):  # fmt: skip
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kv_type", [FLOAT, BYTES])
@pytest.mark.parametrize(("format_", "size"), FORMATS)
def test_the_bits_are_those_of_the_model(
    format_: str, size: int | None, kv_type: str, dtype: torch.dtype
) -> None:
    model = model_of(format_, size, dtype)
    cache, expected = new_cache(dtype, kv_type), new_cache(dtype, kv_type)
    compiled = CompiledStep.of(model, cache)
    assert compiled is not None
    random, rows = Random(0), 0
    for rows in [1, 1, 2, 4, 3, 1, 4, 4, 1, 2, 4, 4, 1]:  # across the window, and round the rings
        token_ids = [random.randrange(131) for _ in range(rows)]
        last_only = random.random() < 0.5
        found = compiled.read(token_ids, last_only=last_only)
        wanted = ordinary(model, expected, token_ids)
        assert found is not None
        assert torch.equal(found, wanted[-1:] if last_only else wanted)
    assert_same_caches(cache, expected)


def test_both_take_turns_and_the_sequence_is_cut() -> None:
    model, dtype = model_of("int4", 32, torch.bfloat16), torch.bfloat16
    cache, expected = new_cache(dtype), new_cache(dtype)
    compiled, random = CompiledStep(model, cache), Random(1)
    for round_ in range(60):
        if cache.position > 60 or random.random() < 0.3:
            to = cache.nearest_boundary(random.randrange(cache.position + 1))
            cache.rollback(to)
            expected.rollback(to)
            cache.remember(to)
            expected.remember(to)
        count = random.choice([1, 1, 2, 4, 9])
        token_ids = [random.randrange(131) for _ in range(count)]
        wanted = ordinary(model, expected, token_ids)
        if count <= step.ROWS and round_ % 3:
            found = compiled.read(token_ids, last_only=False)
        else:
            found = ordinary(model, cache, token_ids)
        assert found is not None
        assert torch.equal(found, wanted)
    assert cache.position == expected.position


@pytest.mark.parametrize("boundary", [0, 20])
def test_a_remembered_boundary_is_gone_on_from(boundary: int) -> None:
    model, dtype = model_of("int8", None, torch.bfloat16), torch.bfloat16
    cache, expected = new_cache(dtype), new_cache(dtype)
    prompt = [7 * i % 131 for i in range(43)]
    for one in (cache, expected):
        for start, stop in pairwise([0, 10, 20, 35, 43]):  # more than the raw tail holds
            ordinary(model, one, prompt[start:stop])
            if stop == boundary:
                one.remember(boundary)
        one.rollback(boundary)
    found = CompiledStep(model, cache).read([3, 4], last_only=False)
    assert found is not None
    assert torch.equal(found, ordinary(model, expected, [3, 4]))


@pytest.mark.parametrize("format_", ["int3", "int4", "int8"])
@pytest.mark.parametrize("kv_type", [FLOAT, BYTES])
def test_tokens_are_read_without_allocating(format_: str, kv_type: str) -> None:
    compiled = library.library()
    assert compiled is not None
    compiled.m1_allocations.restype = ctypes.c_int64
    model = model_of(format_, None if format_ == "int8" else 32, torch.bfloat16)
    reader = CompiledStep(model, new_cache(torch.bfloat16, kv_type))
    before = compiled.m1_allocations()
    for rows in (1, 1, 4, 3, 2, 1):
        assert reader.read(list(range(rows)), last_only=True) is not None
    assert compiled.m1_allocations() == before
    model.lm_head(torch.randn(1, CONFIG.hidden_size, dtype=torch.bfloat16))
    assert compiled.m1_allocations() > before  # what counts them does


def test_with_too_little_room_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = model_of("int5", 32, torch.bfloat16), []
    for nbytes in (step.MEANWHILE_BYTES, 0, 3000 - 16 * step.ROWS * CONFIG.intermediate_size):
        monkeypatch.setattr(step, "MEANWHILE_BYTES", nbytes)
        reader = CompiledStep(model, new_cache(torch.bfloat16))
        found.append([reader.read([3, 4, 5, 6], last_only=False) for _ in range(5)])
    for others in found[1:]:
        for expected, logits in zip(found[0], others, strict=True):
            assert expected is not None
            assert logits is not None
            assert torch.equal(expected, logits)


def test_gate_and_up_may_be_stored_differently() -> None:
    specs = stored_as(CONFIG, "int4", 32)
    ups = [
        LinearSpec("int4", 64),
        LinearSpec("int6", 32),
        LinearSpec("int8"),
        LinearSpec("int3", 32),  # in groups like those of gate, but x is parted otherwise
    ]
    specs |= {f"model.layers.{i}.mlp.up_proj": spec for i, spec in enumerate(ups)}
    model = quantized(CONFIG, specs)
    cache, expected = new_cache(torch.float32), new_cache(torch.float32)
    found = CompiledStep(model, cache).read([3, 4, 5], last_only=False)
    assert found is not None
    assert torch.equal(found, ordinary(model, expected, [3, 4, 5]))


def test_what_does_not_fit_is_not_read() -> None:
    model = model_of("int8", None, torch.bfloat16)
    cache = new_cache(torch.bfloat16)
    compiled = CompiledStep(model, cache)
    for _ in range(24):
        compiled.read([1, 2, 3, 4], last_only=True)
    with pytest.raises(ContextLengthError, match="96"):
        compiled.read([1], last_only=True)
    assert cache.position == 96


def test_no_number_stays_none_and_does_no_harm() -> None:
    model = model_of("int4", 32, torch.float32)
    model.model.layers[0].get_parameter("input_layernorm.weight").data[3] = float("nan")
    for kv_type in (FLOAT, BYTES):
        cache, expected = new_cache(torch.float32, kv_type), new_cache(torch.float32, kv_type)
        found = CompiledStep(model, cache).read([5, 6], last_only=False)
        assert found is not None
        wanted = ordinary(model, expected, [5, 6])
        assert torch.equal(found.isnan(), wanted.isnan())
        assert found.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kv_type", [FLOAT, BYTES])
def test_one_value_that_is_none_is_kept_as_the_model_keeps_it(kv_type: str, value: float) -> None:
    model = model_of("int4", 32, torch.float32)
    packed = model.model.layers[0].get_submodule("self_attn.W_pack")
    packed.get_buffer("zeros")[-5] = value  # a column of the last head's values, and no other
    cache, expected = new_cache(torch.float32, kv_type), new_cache(torch.float32, kv_type)
    assert CompiledStep(model, cache).read([5, 6], last_only=False) is not None
    ordinary(model, expected, [5, 6])
    kept, wanted = cache.layers[0].v, expected.layers[0].v
    for found, theirs in zip(kept.tensors, wanted.tensors, strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=0, equal_nan=True)
    assert not wanted.read(2).isfinite().all()


@pytest.mark.parametrize("why", ["format", "dtype", "batch", "library"])
def test_what_it_cannot_read_is_left_to_the_model(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = model_of("int8", None, torch.bfloat16), new_cache(torch.bfloat16)
    if why == "format":
        model.lm_head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)
    elif why == "dtype":
        cache = new_cache(torch.float16)
    elif why == "batch":
        cache = KVCache.allocate(CONFIG, 96, dtype=torch.bfloat16, batch_size=2)
    else:
        monkeypatch.setattr(step, "library", lambda: None)
    assert CompiledStep.of(model, cache) is None


def test_without_memory_the_model_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("int4", 32, torch.bfloat16)
    context = Context(
        model, new_cache(torch.bfloat16), reader_of=lambda cache: CompiledStep.of(model, cache)
    )
    expected = Context(model, new_cache(torch.bfloat16))
    reader = context._reader
    assert isinstance(reader, CompiledStep)
    whole = reader._compiled
    for token_ids in pairwise([4, 8, 15, 16, 23, 42]):
        failing = SimpleNamespace(m1_step=lambda *given: 0)
        monkeypatch.setattr(reader, "_compiled", whole if token_ids[0] % 2 else failing)
        assert torch.equal(context.feed(token_ids), expected.feed(token_ids))
    assert context.cache.position == expected.cache.position


def test_a_loaded_checkpoint_is_read_by_it(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.find("int8")
    for _ in quantize_checkpoint(tiny_checkpoint, tmp_path / "int8", recipe, text=None):
        pass
    engine, calls = Engine.load(tmp_path / "int8"), []
    read = CompiledStep.read

    def counted(self: CompiledStep, token_ids: list[int], *, last_only: bool) -> Tensor | None:
        calls.append(token_ids)
        return read(self, token_ids, last_only=last_only)

    monkeypatch.setattr(CompiledStep, "read", counted)
    engine.context.feed([1])
    engine.context.another().feed([2, 3])
    engine.context.feed([4] * (step.ROWS + 1))
    assert calls == [[1], [2, 3]]
