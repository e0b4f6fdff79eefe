"""Attention in the compiled library, against torch's over what the cache says it holds.

Both are given the very same values: bfloat16 and bytes are read back from the same store. What may
differ is the order of sums in float32, and how the result is rounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m1local.cache import LayerCache, Visible
from m1local.config import HeadLayout
from m1local.grouped import visibility
from m1local.kv_store import BYTES, FLOAT, KVStore, from_bytes, kind_fits
from m1local.native import attention, library

# Heads, key/value heads, width: both kinds of the 14B's layers, and odd ones.
LAYOUTS = [(40, 8, 128), (20, 2, 256), (3, 1, 16), (6, 2, 48), (2, 2, 80), (3, 3, 96)]
KINDS = [
    (torch.float32, FLOAT),
    (torch.bfloat16, FLOAT),
    (torch.float32, BYTES),
    (torch.bfloat16, BYTES),
]
CASES = [
    (heads, dtype, kind) for heads in LAYOUTS for dtype, kind in KINDS if kind_fits(kind, heads[2])
]
USED = [1, 31, 33, 300, 2000]  # slots: less and more than a block; some are parted among threads
ROWS = range(1, attention.ROWS + 1)
SUMS = 1e-5  # of float32, relative to the greatest value
ROUNDED = {torch.float32: SUMS, torch.bfloat16: 2**-8}

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.status().text)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def layer(
    heads: tuple[int, int, int], slots: int, dtype: torch.dtype, kind: str, window: int | None
) -> LayerCache:
    layout = HeadLayout(*heads, window=window)
    return LayerCache(layout, slots, batch_size=1, dtype=dtype, device="cpu", kv_type=kind)


def filled(cache: LayerCache, tokens: int, chunk: int = 8) -> Visible:
    """`tokens` random keys and values, stored in chunks."""
    shape = (cache.layout.num_kv_heads, tokens, cache.layout.head_dim)
    dtype = cache.raw_k.dtype
    k, v = draw(1, *shape, seed=1).to(dtype), draw(1, *shape, seed=2).to(dtype)
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        seen = cache.append(start, k[:, :, start:stop], v[:, :, start:stop])
    return seen


def exact(store: KVStore, used: int) -> Tensor:
    """What is kept, in float32: `read` rounds bytes to the type that is computed in."""
    if store.scales is None:
        return store.read(used).float()
    return from_bytes(store.values[:, :, :used], store.scales[:, :, :used])


def by_torch(q: Tensor, seen: Visible, positions: Tensor, window: int | None) -> Tensor:
    """As m1local/model.py computes it, in float32."""
    used = len(seen.positions)
    heads = functional.scaled_dot_product_attention(
        q.float(), exact(seen.k, used), exact(seen.v, used),
        attn_mask=visibility(positions, seen.positions, window),
        scale=q.shape[-1] ** -0.5, enable_gqa=True,
    )  # fmt: skip
    return heads.transpose(1, 2).flatten(2)


def by_library(q: Tensor, seen: Visible, positions: Tensor, window: int | None) -> Tensor:
    found = attention.attend(q, seen.k, seen.v, positions, seen.positions, window)
    assert found is not None
    assert found.dtype == q.dtype
    return found


def assert_same(cache: LayerCache, seen: Visible, end: int, rows: int) -> None:
    """The last `rows` of `end` tokens see the same by both."""
    layout, dtype = cache.layout, cache.raw_k.dtype
    q = draw(1, layout.num_heads, rows, layout.head_dim, seed=rows).to(dtype)
    positions = torch.arange(end - rows, end)
    found = by_library(q, seen, positions, layout.window)
    expected = by_torch(q, seen, positions, layout.window)
    assert found.shape == expected.shape == (1, rows, layout.num_heads * layout.head_dim)
    difference = (found.float() - expected).abs().max() / expected.abs().max()
    assert difference <= ROUNDED[dtype]


@pytest.mark.parametrize(("heads", "dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("used", USED)
def test_a_global_layer(
    heads: tuple[int, int, int], dtype: torch.dtype, kind: str, used: int
) -> None:
    cache = layer(heads, 2000, dtype, kind, None)
    seen = filled(cache, used, chunk=64)
    for count, rows in ((1, 1), (2, 1), (3, 1), (1, 2), (3, 5), (1, 8), (2, 8)):
        if rows <= used:
            with threads(count):
                assert_same(cache, seen, used, rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
@pytest.mark.parametrize("window", [1, 8, 40, 700])
def test_a_ring_across_the_edge_of_its_window_and_its_end(
    rows: int, dtype: torch.dtype, kind: str, window: int
) -> None:
    slots = window - 1 + attention.ROWS
    for tokens in (rows, window, window + rows, slots, slots + 1, slots + rows, 2 * slots + 3):
        if tokens < rows:
            continue
        cache = layer((6, 2, 32), slots, dtype, kind, window)
        seen = filled(cache, tokens)
        for count in (1, 3):
            with threads(count):
                assert_same(cache, seen, tokens, rows)


@pytest.mark.parametrize("used", [3, 33, 2000])
@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
def test_queries_are_scaled_as_they_are(dtype: torch.dtype, kind: str, used: int) -> None:
    # Scores of some ten thousand: e to that is no number, but one key takes everything.
    cache = layer((4, 2, 64), used, dtype, kind, None)
    seen = filled(cache, used, chunk=64)
    q = (draw(1, 4, 1, 64) * 1e4).to(dtype)
    positions = torch.tensor([used - 1])
    found = by_library(q, seen, positions, None).float()
    assert found.isfinite().all()
    expected = by_torch(q, seen, positions, None)
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


def spoil(store: KVStore, slot: int) -> None:
    """Let one value of a slot, in all heads, be no number."""
    target = store.values if store.scales is None else store.scales
    target[:, :, slot, 0] = float("nan")


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
@pytest.mark.parametrize("end", [4, 31, 33, 70, 1500])
def test_what_is_no_number_comes_through_where_it_is_seen(
    part: str, dtype: torch.dtype, kind: str, end: int
) -> None:
    window, rows = 1400, min(4, end)
    for place in {0, end // 2, end - rows, end - 2, end - 1}:
        cache = layer((4, 2, 32), 1500, dtype, kind, window)
        seen = filled(cache, end, chunk=64)
        spoil(getattr(seen, part), place)
        positions = torch.arange(end - rows, end)
        q = draw(1, 4, rows, 32).to(dtype)
        sees = visibility(positions, torch.tensor([place]), window)[:, 0]
        for count in (1, 3):
            with threads(count):
                found = by_library(q, seen, positions, window)[0].view(rows, 4, 32)
            spoilt = found.isnan().any(-1).all(-1)
            assert torch.equal(spoilt, sees), (place, count)
            assert found[~sees].isfinite().all()


def test_slots_behind_the_end_of_a_sequence_that_was_cut_are_not_read() -> None:
    cache = layer((4, 2, 32), 64, torch.float32, FLOAT, None)
    filled(cache, 64)
    for store in (cache.k, cache.v):
        store.values[:, :, 40:] = float("nan")
    assert_same(cache, Visible(cache.k, cache.v, cache.slot_positions(40)), 40, 3)


def test_more_heads_than_threads_and_more_threads_than_heads_give_the_same() -> None:
    cache = layer((6, 2, 64), 3000, torch.float32, FLOAT, None)
    seen = filled(cache, 3000, chunk=100)
    q, positions = draw(1, 6, 2, 64), torch.tensor([2998, 2999])
    expected = by_torch(q, seen, positions, None)
    for count in (1, 2, 5, 16):
        with threads(count):
            found = by_library(q, seen, positions, None)
        torch.testing.assert_close(found, expected, rtol=0, atol=SUMS)


def test_what_it_does_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = layer((4, 2, 32), 64, torch.float32, FLOAT, None)
    seen = filled(cache, 20)

    def served(q: Tensor) -> bool:
        positions = torch.arange(20 - q.shape[2], 20)
        return attention.attend(q, seen.k, seen.v, positions, seen.positions, None) is not None

    assert served(draw(1, 4, 8, 32))
    assert not served(draw(1, 4, 9, 32))
    assert not served(draw(2, 4, 1, 32))
    assert not served(draw(1, 4, 1, 32).double())
    monkeypatch.setattr(attention, "library", lambda: None)
    assert not served(draw(1, 4, 1, 32))
