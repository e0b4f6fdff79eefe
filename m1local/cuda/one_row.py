"""The product of one row of activations with stored matrices, in Triton: what decoding is made of.

What it is: the kernels around the sums of row_sums.py. What follows a product is done by the
program that has its rows: SiLU times up, of gate and up that are read by one kernel; the sum with
the residual stream and the norm's weight, while the norm itself, one factor for the whole row, is
applied by whoever multiplies next. Else, where the rows of W are too few to fill the card, the
columns are split, and whoever reads the product sums the parts. What it is not: for several rows
(products.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.activation import Activation, store_row
from m1local.cuda.ahead import ask, ask_ahead, following
from m1local.cuda.card import RowShape, card
from m1local.cuda.matrix import INT4 as INT4_KIND
from m1local.cuda.matrix import INT8 as INT8_KIND
from m1local.cuda.matrix import Matrix
from m1local.cuda.overlap import begun_early
from m1local.cuda.row_sums import LOADS, summed
from m1local.cuda.tensor_core import PLACES, WARP_ROWS

_WARP_ROWS = tl.constexpr(WARP_ROWS)

# Programs of four warps that a multiprocessor holds, about: of int4 they take 71 to 80 registers on
# 9.0, of int8 48, of levels and of codes in two planes 86 to 126.
RESIDENT = {INT4_KIND: 7, INT8_KIND: 9}
FEWEST_RESIDENT = 4

Matrices = tuple[Matrix, ...]


@triton.jit
def vector_kernel(
    x, matrix, out, then, rows, blocks, steps, eps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr, GROUPS: tl.constexpr,
    TURNS: tl.constexpr, SQUARES: tl.constexpr, SMALL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Part `program 1` of x (K,) @ W.T, sixteen rows of W a group: out (parts, N) float32."""
    ROWS: tl.constexpr = 2 * GROUPS * _WARP_ROWS
    first = tl.program_id(0) * ROWS
    total, other_total = summed(
        x, matrix, matrix, first, 2 * _WARP_ROWS, rows, blocks, tl.program_id(1) * steps, steps,
        eps, KIND, PER_GROUP, TILED, GROUPS, TURNS, SQUARES, SMALL, OVERLAP,
    )  # fmt: skip
    if not SMALL:  # where it costs a third more registers
        ask_ahead(then, GROUPS * TURNS)
    row = first + tl.arange(0, ROWS)
    value = _in_order(total, other_total, GROUPS)
    tl.store(out + tl.program_id(1) * rows + row, value, mask=row < rows)


@triton.jit
def gated_kernel(
    x, gate, up, natural, halves, scales, then, rows, blocks, steps, eps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr, GROUPS: tl.constexpr,
    TURNS: tl.constexpr, SQUARES: tl.constexpr, WHOLE: tl.constexpr, SMALL: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """silu(x @ gate.T) * (x @ up.T), eight rows of both a group, as activations."""
    ROWS: tl.constexpr = GROUPS * _WARP_ROWS
    first = tl.program_id(0) * ROWS
    opened, total = summed(
        x, gate, up, first, _WARP_ROWS, rows, blocks, 0, steps, eps,
        KIND, PER_GROUP, TILED, GROUPS, TURNS, SQUARES, SMALL, OVERLAP,
    )  # fmt: skip
    if not SMALL:
        ask_ahead(then, GROUPS * TURNS)
    value = opened * tl.sigmoid(opened) * total
    store_row(natural, halves, scales, first, rows, value, rows, ROWS, WHOLE)


@triton.jit
def added_kernel(
    x, matrix, stream, weight, natural, halves, scales, squares, then,
    rows, blocks, steps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr, GROUPS: tl.constexpr,
    TURNS: tl.constexpr, SMALL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """stream (N,) += x @ W.T; then times weight, as activations, and its squares, summed."""
    ROWS: tl.constexpr = 2 * GROUPS * _WARP_ROWS
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    here = row < rows
    if not SMALL:
        ask(weight + row, here)  # else it would come from memory while all wait for it
    total, other_total = summed(
        x, matrix, matrix, first, 2 * _WARP_ROWS, rows, blocks, 0, steps, 0.0,
        KIND, PER_GROUP, TILED, GROUPS, TURNS, 0, SMALL, OVERLAP,
    )  # fmt: skip
    if not SMALL:
        ask_ahead(then, GROUPS * TURNS)
    grown = _in_order(total, other_total, GROUPS)
    grown += tl.load(stream + row, mask=here, other=0.0)
    tl.store(stream + row, grown, mask=here)
    piece = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    square = tl.reshape(tl.where(here, grown * grown, 0.0), (GROUPS, 2 * _WARP_ROWS))
    tl.store(squares + piece, tl.sum(square, 1), mask=piece * (2 * _WARP_ROWS) < rows)
    value = grown * tl.load(weight + row, mask=here, other=0.0).to(tl.float32)
    store_row(natural, halves, scales, first, rows, value, rows, ROWS, True)


@triton.jit
def _in_order(total, other_total, GROUPS: tl.constexpr):
    """Sums of each group's first eight rows and of its other eight, (8 * GROUPS,), by rows."""
    ROWS: tl.constexpr = 2 * GROUPS * _WARP_ROWS
    both = tl.join(
        tl.reshape(total, (GROUPS, _WARP_ROWS)), tl.reshape(other_total, (GROUPS, _WARP_ROWS))
    )
    return tl.reshape(tl.permute(both, (0, 2, 1)), (ROWS,))


def vector_product(
    x: Activation, matrix: Matrix, shape: RowShape | None = None, *, then: Matrices = ()
) -> Tensor:
    """x (1, K) @ W.T -> (parts, N) float32, the sum of whose parts is the product.

    `then`, here and below, is what is read next (ahead.py).
    """
    device = x.natural.device
    shape = shape or card(device).tiles.vector
    programs, steps = _programs(matrix, shape, 2), _steps(matrix, shape)
    running = _running(matrix, shape, device)
    parts = card(device).column_parts(programs, steps, running)
    out = torch.empty((parts, matrix.rows), dtype=torch.float32, device=device)
    vector_kernel[(programs, parts)](
        _row(x), _vectors(matrix), out, following(then, x.halves, programs * parts, running),
        matrix.rows, matrix.blocks, triton.cdiv(steps, parts), x.eps,
        **_fixed(matrix, shape, device), SQUARES=_squares(x),
    )  # fmt: skip
    return out


def gated_product(
    x: Activation,
    gate: Matrix,
    up: Matrix,
    out: Activation,
    shape: RowShape | None = None,
    *,
    then: Matrices = (),
) -> None:
    """`out` (1, N) becomes silu(x @ gate.T) * (x @ up.T), of two matrices that are `alike`."""
    device = x.natural.device
    shape = shape or card(device).tiles.gated
    programs = _programs(gate, shape, 1)
    gated_kernel[(programs,)](
        _row(x), _vectors(gate), _vectors(up), *out.tensors,
        following(then, x.halves, programs, _running(gate, shape, device)), gate.rows, gate.blocks,
        _steps(gate, shape), x.eps, **_fixed(gate, shape, device), SQUARES=_squares(x),
        WHOLE=out.whole,
    )  # fmt: skip


def added_product(
    x: Activation,
    matrix: Matrix,
    stream: Tensor,
    weight: Tensor,
    out: Activation,
    shape: RowShape | None = None,
    *,
    then: Matrices = (),
) -> None:
    """`stream` (N,) float32 += x (1, K) @ W.T; `out` becomes its RMSNorm with `weight` (N,).

    But for the norm's factor, which every product with `out` applies; `out` has `squares` for that.
    """
    shape = shape or card(stream.device).tiles.added
    programs = _programs(matrix, shape, 2)
    added_kernel[(programs,)](
        _row(x), _vectors(matrix), stream, weight, *out.tensors, out.squares,
        following(then, x.halves, programs, _running(matrix, shape, stream.device)),
        matrix.rows, matrix.blocks, _steps(matrix, shape), **_fixed(matrix, shape, stream.device),
    )  # fmt: skip


def _fixed(matrix: Matrix, shape: RowShape, device: torch.device) -> dict[str, Any]:
    """What is fixed at compile time, and how a program is launched."""
    return {
        "KIND": matrix.kind, "PER_GROUP": matrix.per_group, "TILED": matrix.is_tiled,
        "GROUPS": shape.groups, "TURNS": shape.turns, "num_warps": shape.warps,
        "SMALL": card(device).has_small_pieces, **begun_early(device),
    }  # fmt: skip


def _running(matrix: Matrix, shape: RowShape, device: torch.device) -> int:
    """How many programs the card runs at a time, by the registers that the kind takes."""
    return card(device).resident(shape.warps, RESIDENT.get(matrix.kind, FEWEST_RESIDENT))


def _programs(matrix: Matrix, shape: RowShape, beside: int) -> int:
    """How many there are if each warp reads `beside` times eight rows of one matrix."""
    return -(-matrix.rows // (shape.groups * beside * WARP_ROWS))


def _steps(matrix: Matrix, shape: RowShape) -> int:
    """Of what the warps of a group load together of a row."""
    loads = matrix.blocks * (2 if matrix.kind == INT8_KIND else 1)
    return -(-loads // (shape.turns * PLACES * LOADS))


def _row(x: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Activations as the kernels take them: halves of whole numbers, four in an int32."""
    return x.halves.view(torch.int32), x.scales, x.squares


def _squares(x: Activation) -> int:
    """How many sums of squares a program reads, as a power of two."""
    sums: int = x.squares.numel()
    return 1 << (sums - 1).bit_length() if sums else 0


def _vectors(matrix: Matrix) -> tuple[Tensor, ...]:
    """The matrix's tensors as the kernel for one row takes them."""
    return *matrix.tensors, matrix.table


def alike(one: Matrix, other: Matrix) -> bool:
    """Whether a row can be multiplied by both in one launch."""
    stored = (one.kind, one.per_group, one.shape, one.levels_name, one.is_tiled)
    return stored == (
        other.kind, other.per_group, other.shape, other.levels_name, other.is_tiled
    )  # fmt: skip
