"""Products of several rows with stored matrices, in Triton; and by whichever way suits how many.

What it is: a kernel over the words of words.py in which tensor cores multiply some ten rows; one
that restores slices of W for cuBLAS, which multiplies many; and the choice among these and the
kernel for one row (one_row.py). What it is not: tuned; it ran on an H200 alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.activation import Activation
from m1local.cuda.card import WARPS, card
from m1local.cuda.matrix import WORD, Matrix, planar
from m1local.cuda.one_row import vector_product
from m1local.cuda.words import INT8, load_words, statistics, weight

LEAST_TILE = 16  # rows that the tensor cores take
EXPANDED_ROWS, EXPANDED_WORDS = 4, 128
EVEN_ROWS = 128  # of cuBLAS' tiles


@triton.jit(do_not_specialize=["x_rows"])
def tile_kernel(
    x, codes, scales, zeros, levels, outer, out, x_rows, rows, blocks, steps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
    X_ROWS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Part `program 2` of x (M, K) @ W.T for X_ROWS x ROWS: out (parts, M, N) float32."""
    x_row = tl.program_id(1) * X_ROWS + tl.arange(0, X_ROWS)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = tl.arange(0, WORDS)[None, :]
    words = blocks * 4
    total = tl.zeros((X_ROWS, ROWS), tl.float32)
    begin = tl.program_id(2) * steps
    for step in range(begin, begin + steps):
        word = step * WORDS + inside
        here = (word < words) & (row < rows)
        raw = load_words(codes, levels, row * words + word, here, KIND)
        scale, zero = 1.0, 0.0
        if KIND != INT8:
            scale, zero = statistics(
                scales, zeros, outer, row, word // 4, blocks, here, KIND, PER_GROUP, TILED
            )
        x_at = x + x_row * (words * 8) + word
        x_here = (x_row < x_rows) & (word < words)
        for column in tl.static_range(8):
            factor = tl.load(x_at + column * words, mask=x_here, other=0.0)
            found = weight(raw, column, scale, zero, levels, KIND).to(factor.dtype)
            total = tl.dot(factor, tl.trans(found), total, input_precision="ieee")
    column_out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    if KIND == INT8:
        total *= tl.load(scales + column_out, mask=column_out < rows, other=0.0)
    at = (tl.program_id(2) * x_rows + x_row) * rows + column_out
    tl.store(out + at, total, mask=(x_row < x_rows) & (column_out < rows))


@triton.jit(do_not_specialize=["first"])
def expand_kernel(
    codes, scales, zeros, levels, outer, out, first, rows, blocks,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `rows` of W: out (n, K)."""
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = first + out_row
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[None, :]
    words = blocks * 4
    here = (word < words) & (row < rows)
    raw = load_words(codes, levels, row * words + word, here, KIND)
    scale, zero = statistics(
        scales, zeros, outer, row, word // 4, blocks, here, KIND, PER_GROUP, TILED
    )
    column = tl.arange(0, 8)[None, None, :]
    found = weight(raw[:, :, None], column, scale[:, :, None], zero[:, :, None], levels, KIND)
    at = out + (out_row * words + word)[:, :, None] * 8 + column
    tl.store(at, found.to(out.dtype.element_ty), mask=here[:, :, None])


def tile_product(x: Tensor, matrix: Matrix) -> Tensor:
    """x (M, K) in planes @ W.T -> (parts, M, N) float32, for some ten rows."""
    chosen, x_rows = card(x.device), x.shape[0]
    tiles = chosen.tiles
    taken = max(LEAST_TILE, triton.next_power_of_2(x_rows))
    programs = _pieces(matrix.rows, tiles.tile_rows)
    steps = _pieces(matrix.columns // WORD, tiles.tile_words)
    parts = chosen.column_parts(programs, steps)
    out = torch.empty((parts, x_rows, matrix.rows), dtype=torch.float32, device=x.device)
    tile_kernel[(programs, 1, parts)](
        x, *matrix.tensors, out, x_rows, matrix.rows, matrix.blocks, _pieces(steps, parts),
        KIND=matrix.kind, PER_GROUP=matrix.per_group, TILED=matrix.is_tiled, X_ROWS=taken,
        ROWS=tiles.tile_rows, WORDS=tiles.tile_words, num_warps=WARPS,
    )  # fmt: skip
    return out


def restored(matrix: Matrix, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of W: (n, K)."""
    out = torch.empty((stop - start, matrix.columns), dtype=dtype, device=matrix.codes.device)
    grid = (
        _pieces(stop - start, EXPANDED_ROWS), _pieces(matrix.columns // WORD, EXPANDED_WORDS)
    )  # fmt: skip
    expand_kernel[grid](
        *matrix.tensors, out, start, stop, matrix.blocks,
        KIND=matrix.kind, PER_GROUP=matrix.per_group, TILED=matrix.is_tiled, ROWS=EXPANDED_ROWS,
        WORDS=EXPANDED_WORDS, num_warps=WARPS,
    )  # fmt: skip
    return out


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x (M, K) @ W.T -> (M, N) in x's dtype, by whichever kernel suits M."""
    if len(x) == 0:
        return x.new_empty((0, matrix.rows))
    if len(x) == 1:
        return vector_product(Activation.of(x), matrix).sum(0, keepdim=True).to(x.dtype)
    if len(x) <= card(x.device).tiles.most_rows:
        return tile_product(planar(x), matrix).sum(0).to(x.dtype)
    output = x.new_empty((len(x), matrix.rows))
    for start, stop in _slices(matrix.rows, card(x.device).restored_weights() // matrix.columns):
        torch.matmul(x, restored(matrix, start, stop, x.dtype).T, out=output[:, start:stop])
    return output


def _slices(rows: int, most: int) -> list[tuple[int, int]]:
    """Where slices of at most some `most` rows begin and end, all about the same."""
    even = _pieces(rows, max(1, _pieces(rows, max(1, most))))
    taken = _pieces(even, EVEN_ROWS) * EVEN_ROWS
    return [(start, min(start + taken, rows)) for start in range(0, rows, taken)]


def _pieces(whole: int, size: int) -> int:
    return -(-whole // size)
