"""Memory that is used again: only when nothing holds what was in it."""

import gc

import pytest
import torch

from m1local.native import recycled

SIZE = recycled.SMALLEST


def test_a_block_is_used_again_when_the_last_view_is_gone() -> None:
    first = recycled.empty((2, SIZE // 4), torch.float32)
    where, row = first.data_ptr(), first[1]
    row.fill_(7)
    del first
    others = [recycled.empty((2 * SIZE,), torch.uint8) for _ in range(3)]
    assert where not in {other.data_ptr() for other in others}
    for other in others:
        other.zero_()
    assert bool((row == 7).all())
    del row
    gc.collect()
    assert recycled.empty((SIZE // 2,), torch.bfloat16).data_ptr() != where  # of another size
    assert recycled.empty((2 * SIZE - 3,), torch.int8).data_ptr() == where


@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 5), (3, 7), (SIZE - 1,), (SIZE,), (5, SIZE // 2 + 3), (1 << 24,)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_result_is_as_torchs_would_be(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = recycled.empty(shape, dtype)
    assert (tuple(found.shape), found.dtype) == (shape, dtype)
    assert found.is_contiguous()
    assert found.data_ptr() % 64 == 0 or found.numel() == 0
    found.fill_(3)
    assert bool((found == 3).all())


def test_no_more_is_held_than_was_in_use_at_once() -> None:
    held = recycled._free[2 * SIZE]
    held.clear()
    for _ in range(20):
        kept = [recycled.empty((SIZE + 1,), torch.uint8) for _ in range(3)]
        assert len({tensor.data_ptr() for tensor in kept}) == 3
        del kept
    gc.collect()
    assert len(held) <= 4
