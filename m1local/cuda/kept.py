"""Keys and values of the cache as kernels read and write them, in Triton.

What it is: rows of slots read into the type of the arithmetic, and one row stored, whether they lie
as they are or in bytes with a scale for each 32 values (kv_store.py), by the same arithmetic as
torch's there. What it is not: aware of which slot is whose.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.kv_store import SCALED, KVStore

_SCALED = tl.constexpr(SCALED)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_HALVES = tl.constexpr(
    1.5 * 2**23
)  # added and taken away, it rounds to whole numbers, ties to even


@triton.jit
def head_of(values, scales, kv_head, slots, width, BYTES: tl.constexpr):
    """Where the values and scales of one head begin."""
    first = kv_head.to(tl.int64) * slots
    if BYTES:
        scales += first * (width // _SCALED)
    return values + first * width, scales


@triton.jit
def load_kept(
    values, scales, slot, here, width, like, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Rows `slot` (ROWS,) of one head, (ROWS, WIDTH) in the type of the pointer `like`."""
    inside = tl.arange(0, WIDTH)
    mask = here[:, None] & (inside < width)[None, :]
    found = tl.load(values + slot[:, None] * width + inside[None, :], mask=mask, other=0)
    if BYTES:
        groups = width // _SCALED
        group = tl.arange(0, WIDTH // _SCALED)
        mask = here[:, None] & (group < groups)[None, :]
        scale = tl.load(scales + slot[:, None] * groups + group[None, :], mask=mask, other=0.0)
        grouped = tl.reshape(found, (ROWS, WIDTH // _SCALED, _SCALED)).to(tl.float32)
        grouped = (grouped * scale.to(tl.float32)[:, :, None]).to(like.dtype.element_ty)
        found = tl.reshape(grouped, (ROWS, WIDTH))
    return found


@triton.jit
def store_kept(values, scales, slot, row, width, WIDTH: tl.constexpr, BYTES: tl.constexpr):
    """Store `row` (WIDTH,) in float32, zeros behind `width`, into `slot` of one head."""
    inside = tl.arange(0, WIDTH)
    if BYTES:
        groups = width // _SCALED
        group = tl.arange(0, WIDTH // _SCALED)
        grouped = tl.reshape(row, (WIDTH // _SCALED, _SCALED))
        scale = tl.div_rn(tl.max(tl.abs(grouped), 1), 127.0)
        # To bfloat16, ties to even; by hand, since Triton's interpreter cuts off.
        bits = scale.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        wide = bits.to(tl.float32, bitcast=True)
        tl.store(scales + slot * groups + group, wide.to(tl.bfloat16), mask=group < groups)
        usable = wide >= _TINY
        inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, wide, 1.0)), 0.0)
        whole = (grouped * inverse[:, None] + _HALVES) - _HALVES
        row = tl.reshape(tl.minimum(tl.maximum(whole, -127.0), 127.0), (WIDTH,))
    kept = row.to(values.dtype.element_ty)
    tl.store(values + slot * width + inside, kept, mask=inside < width)


def pointers(kept: KVStore) -> tuple[Tensor, Tensor]:
    """Values and scales; where there are no scales something that is never read."""
    return kept.values, kept.values if kept.scales is None else kept.scales
