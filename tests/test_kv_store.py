"""Keys and values in bytes: what is lost, and a whole model that keeps its context so."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from m1local.cache import RAW_TOKENS, KVCache
from m1local.config import M1Config
from m1local.errors import ContextLengthError
from m1local.kv_store import BYTES, FLOAT, SCALED, KVStore, from_bytes, kind_fits, to_bytes
from m1local.model import M1Model
from m1local.native import attention
from tests.conftest import TINY, random_model

CAPACITY = 90
WIDE = TINY | {  # heads of 32 and 64 values, whose windows move on
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 4,
    "num_swa_key_value_heads": 2,
    "max_position_embeddings": CAPACITY,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(*shape[:-1], 1).uniform_(-6, 6, generator=generator)
    return torch.randn(shape, generator=generator) * sizes


def store(kind: str, dtype: torch.dtype = torch.float32, width: int = 64) -> KVStore:
    return KVStore((1, 2, 10, width), kind, dtype=dtype, device="cpu")


def test_what_bytes_lose_is_half_a_step() -> None:
    x = draw(3, 5, 96)
    codes, scales = to_bytes(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    grouped = x.view(3, 5, 3, SCALED)
    step = grouped.abs().amax(-1, keepdim=True) / 127
    error = (from_bytes(codes, scales).view_as(grouped) - grouped).abs()
    # Half a step of the rounded scale. One that was rounded down leaves the greatest short, by a
    # 512th, which is less than half a step.
    assert (error <= step * 0.5 * (1 + 2**-8)).all()
    assert (error / step).mean() <= 0.27


def test_every_scale_is_that_of_its_own_values() -> None:
    x = torch.zeros(1, 96)
    x[0, 40] = 5
    codes, scales = to_bytes(x)
    assert scales[0].tolist() == [0, pytest.approx(5 / 127, rel=2**-8), 0]
    assert torch.equal(from_bytes(codes, scales)[0, :40], torch.zeros(40))


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-37])
def test_zeros_and_what_is_hardly_more_stay_numbers(value: float) -> None:
    x = torch.full((2, 64), value)
    found = from_bytes(*to_bytes(x))
    assert found.isfinite().all()
    assert (found - x).abs().max() <= 1e-36


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    x = torch.ones(64)
    x[3] = value
    found = from_bytes(*to_bytes(x))
    assert not found[:SCALED].isfinite().any()
    assert found[SCALED:].isfinite().all()


@pytest.mark.parametrize("kind", [FLOAT, BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [slice(3, 7), torch.tensor([8, 9, 0, 1])], ids=["slice", "ring"])
def test_slots_are_written_and_read_in_the_type_that_is_computed_in(
    kind: str, dtype: torch.dtype, slots: slice | Tensor
) -> None:
    kept, x = store(kind, dtype), draw(1, 2, 4, 64).to(dtype)
    kept.write(slots, x)
    found = kept.read(10)
    assert found.dtype == dtype
    expected = torch.zeros(1, 2, 10, 64, dtype=dtype)
    expected[:, :, slots] = x if kind == FLOAT else from_bytes(*to_bytes(x)).to(dtype)
    assert torch.equal(found, expected)
    assert torch.equal(kept.read(5), expected[:, :, :5])
    kept.write(slots, torch.zeros_like(x))
    assert not kept.read(10).any()


def test_bytes_take_eight_and_a_half_bits() -> None:
    def bits(kept: KVStore) -> float:
        held = sum(tensor.numel() * tensor.element_size() for tensor in kept.tensors)
        return 8 * held / kept.values.numel()

    assert bits(store(BYTES)) == 8.5
    assert bits(store(FLOAT, torch.bfloat16)) == 16


def cache_of(model: M1Model, kind: str, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.allocate(model.config, CAPACITY, dtype=dtype, max_chunk=12, kv_type=kind)


def feed(model: M1Model, cache: KVCache, token_ids: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Logits (T, V) of `token_ids` in chunks of so many tokens, the last again and again."""
    parts, at, sizes = [], 0, list(steps)
    while at < len(token_ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(model(torch.tensor([token_ids[at : at + size]]), cache)[0])
        at += size
    return torch.cat(parts)


@pytest.fixture
def model() -> M1Model:
    return random_model(M1Config.from_dict(WIDE))


@pytest.fixture
def text() -> list[int]:
    return random.Random(0).choices(range(512), k=CAPACITY)


@torch.inference_mode()
@pytest.mark.parametrize("steps", [(12, 12, 12, 1), (12, 3), (1,), (8, 9, 1, 5)], ids=str)
def test_a_model_reads_its_bytes_as_torch_does(
    model: M1Model, text: list[int], steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = feed(model, cache_of(model, BYTES), text, steps)
    monkeypatch.setattr(attention, "library", lambda: None)
    expected = feed(model, cache_of(model, BYTES), text, steps)
    # A value that lies between two bytes may fall on either side, which is a step of a key; how
    # many do depends on the processor, whose sums differ.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    exact = feed(model, cache_of(model, FLOAT), text, steps)
    lost = (found - exact).abs().mean()
    assert 0 < lost <= 0.02
    assert (found - expected).abs().mean() <= lost / 10


@torch.inference_mode()
@pytest.mark.parametrize("taken_back", [1, 6, RAW_TOKENS - 1])
def test_a_context_in_bytes_is_cut_back_like_any_other(
    model: M1Model, text: list[int], taken_back: int
) -> None:
    cache, fresh = cache_of(model, BYTES), cache_of(model, BYTES)
    left = 60 - taken_back
    feed(model, cache, text[:left], (12, 4, 1))
    feed(model, cache, text[::-1][:taken_back], (4,))
    at = cache.nearest_boundary(left)
    if taken_back < 12:  # beyond what a chunk may push out of the window it is read again
        assert at == left
    cache.rollback(at)
    if at < left:
        feed(model, cache, text[at:left], (1,))
    found = feed(model, cache, text[left : left + 9], (1,))
    feed(model, fresh, text[:left], (12, 4, 1))
    torch.testing.assert_close(
        found, feed(model, fresh, text[left : left + 9], (1,)), rtol=0, atol=5e-3
    )


def test_a_cache_in_bytes_is_smaller_by_its_bits(model: M1Model) -> None:
    def kept(kind: str) -> int:
        cache = cache_of(model, kind, torch.bfloat16)
        raw = sum(layer.raw_k.nbytes + layer.raw_v.nbytes for layer in cache.layers)
        return cache.nbytes - raw

    assert kept(BYTES) * 16 == kept(FLOAT) * 8.5


def test_another_cache_is_of_the_same_kind(model: M1Model) -> None:
    other = cache_of(model, BYTES).another()
    assert {layer.k.values.dtype for layer in other.layers} == {torch.int8}


def test_heads_that_cannot_be_kept_in_bytes_are_refused_with_what_helps() -> None:
    config = M1Config.from_dict(TINY)  # heads of 16 and of 8
    assert not kind_fits(BYTES, config.heads(0).head_dim)
    with pytest.raises(
        ContextLengthError, match=r"Keys of \d+ values cannot be kept as q8_0; leave --kv-type out"
    ):
        KVCache.allocate(config, 64, dtype=torch.float32, kv_type=BYTES)
