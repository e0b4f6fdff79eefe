"""Asking for the next product's weights while the kernel in front of it ends.

What it is: between two kernels of a decode step the memory has nothing to do: the last programs of
one end one by one, the next is launched, and its first weights are on their way. So each of the
last programs, when it has read all its own, asks for a piece of what will be read first: the first
columns of the rows with which the next kernel begins, and their scales and zeros. They come into
the second cache, and whoever asked does not wait. It is a part of that cache (card.py), and earlier
programs ask for nothing: what the others still read would push it out. Nothing is computed from it,
so it changes no number. What it is not: measured; `python -m bench.gpu` times the step with and
without it.
Source: PTX ISA, prefetch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.card import WARPS, card
from m1local.cuda.matrix import Matrix
from m1local.cuda.tensor_core import INTERPRETED, WARP_ROWS

SECTOR = 32  # bytes that come at least
EVEN = 16  # so that Triton compiles one kernel for all numbers
MOST_REGIONS = 8  # two planes, scales and zeros of two matrices
_SECTOR, _MOST_REGIONS = tl.constexpr(SECTOR), tl.constexpr(MOST_REGIONS)


class Region(NamedTuple):
    """The first `span` of `row_bytes` bytes of so many `rows`; `span` is a whole sector or none."""

    tensor: Tensor
    rows: int
    row_bytes: int
    span: int


class Following(NamedTuple):
    """What is read next; the first `silent` programs do not ask for it."""

    regions: tuple[Region, ...]
    silent: int


def following(
    matrices: tuple[Matrix, ...], like: Tensor, programs: int = 0, running: int = 0
) -> Following:
    """The beginning of `matrices`, one or two that are read side by side; nothing without any.

    `like` is any tensor on the card, which stands in where nothing follows; `programs` may ask, of
    which the card runs so many at a time, and begins them in their order.
    """
    chosen, found = card(like.device), list[Region]()
    for matrix in matrices:
        rows = min(matrix.rows, chosen.resident(WARPS) * 2 * WARP_ROWS // len(matrices))
        found += _regions(matrix, rows // EVEN * EVEN, chosen.ahead // len(matrices))
    nothing = Region(like.view(torch.uint8), 0, 0, 0)
    silent = max(0, programs - running) // EVEN * EVEN
    return Following((*found, *[nothing] * (MOST_REGIONS - len(found))), silent)


def _regions(matrix: Matrix, rows: int, room: int) -> list[Region]:
    """Of the first `rows` of a matrix scales and zeros, and as much of the codes as has room."""
    if rows == 0:
        return []
    statistics = [tensor for tensor in matrix.statistics if tensor.numel() > matrix.rows]
    kept = [_bytes_of(tensor).numel() // matrix.rows for tensor in statistics]
    planes = [(plane, _bytes_of(plane).numel() // matrix.rows) for plane in matrix.planes]
    left = room // rows - sum(kept)
    found = []
    for plane, row_bytes in planes:
        span = min(row_bytes, left * row_bytes // sum(width for _, width in planes))
        if span >= SECTOR:
            found.append(Region(_bytes_of(plane), rows, row_bytes, span // SECTOR * SECTOR))
    if found:  # these lie one after another
        found += [
            Region(_bytes_of(tensor), rows * row_bytes // SECTOR // EVEN * EVEN, SECTOR, SECTOR)
            for tensor, row_bytes in zip(statistics, kept, strict=True)
        ]
    return found


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).view(-1)


@triton.jit
def ask_ahead(then, WARPS: tl.constexpr):
    """This program's piece of what is read next (`Following`), a sector for each thread at a time.

    The grid has two axes at most.
    """
    THREADS: tl.constexpr = 32 * WARPS
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    silent = then[1]
    at = (program - silent) * THREADS
    if at >= 0:
        together = (tl.num_programs(0) * tl.num_programs(1) - silent) * THREADS
        for number in tl.static_range(_MOST_REGIONS):
            region = then[0][number]
            each = region[3] // _SECTOR
            for first in range(at, region[1] * each, together):
                piece = first + tl.arange(0, THREADS)
                place = (piece // each).to(tl.int64) * region[2] + piece % each * _SECTOR
                ask(region[0] + place, piece < region[1] * each)


@triton.jit
def ask(at, here):
    """Bring what lies at the places `at` into the second cache, where it is `here`."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred here;
            setp.ne.s32 here, $2, 0;
            @here prefetch.global.L2 [$1];
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [at.to(tl.int64), here.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
