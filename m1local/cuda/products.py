"""Products with stored matrices, in Triton: one row, several rows, and whole rows of W restored.

What it is: three kernels over the words of words.py, and the functions that launch them. With one
row of activations every thread keeps sums of its own until the end, so nothing is exchanged while
the weights come in; where the rows of W are too few to fill the card, the columns are split and
the parts are summed by whoever reads the product next. With several rows the tensor cores multiply.
What it is not: measured; and with many rows it is cuBLAS on restored slices of W.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.card import LANES, WARPS, card
from m1local.cuda.matrix import INT8 as INT8_KIND
from m1local.cuda.matrix import WORD, Matrix, planar
from m1local.cuda.words import INT8, ONE, coded, load_words, product_of, statistics, weight

LEAST_TILE = 16  # rows that the tensor cores take
EXPANDED_ROWS, EXPANDED_WORDS = 4, 128


@triton.jit
def vector_kernel(
    x, codes, scales, zeros, levels, outer, out, rows, blocks, steps, zero_bits,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, WARPS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """Part `program 1` of x (K,) @ W.T for 2 * WARPS rows: out (parts, N) float32."""
    WORDS: tl.constexpr = 2 if KIND == INT8 else 4  # that are 16 bytes, a thread's load
    loads = blocks * 4 // WORDS
    # A warp reads two rows, for which x is loaded once, in the codes' layout by its address.
    warp = tl.arange(0, WARPS)[:, None, None]
    upper = tl.program_id(0) * (2 * WARPS) + warp
    lower = upper + WARPS
    place = tl.arange(0, LOADS)[None, :, None]
    inside = tl.arange(0, WORDS)[None, None, :]
    one = ONE | warp * zero_bits  # in a register: an operand of an instruction that takes no second
    total = tl.zeros((WARPS, LOADS, WORDS), tl.float32)
    second_total = tl.zeros((WARPS, LOADS, WORDS), tl.float32)
    for step in range(tl.program_id(1) * steps, (tl.program_id(1) + 1) * steps):
        load = step * LOADS + place
        here, second_here = (load < loads) & (upper < rows), (load < loads) & (lower < rows)
        at = (upper * loads + load) * WORDS + inside
        raw = load_words(codes, levels, at, here, KIND)
        at = (lower * loads + load) * WORDS + inside
        second = load_words(codes, levels, at, second_here, KIND)
        mixed = tl.zeros((WARPS, LOADS, WORDS), tl.float32)
        second_mixed = tl.zeros((WARPS, LOADS, WORDS), tl.float32)
        plain = tl.zeros((WARPS, LOADS, WORDS), tl.float32)
        x_at = x + load * WORDS + inside + warp * 0
        for column in tl.static_range(8):
            factor = tl.load(x_at + column * blocks * 4, mask=load < loads, other=0.0).to(
                tl.float32
            )
            mixed += factor * coded(raw, column, levels, one, KIND)
            second_mixed += factor * coded(second, column, levels, one, KIND)
            plain += factor
        block = load * WORDS // 4
        total += _weighed(
            mixed, plain, scales, zeros, outer, upper, block, blocks, here, KIND, PER_GROUP
        )
        second_total += _weighed(
            second_mixed, plain, scales, zeros, outer, lower, block, blocks, second_here,
            KIND, PER_GROUP,
        )  # fmt: skip
    first, out = tl.program_id(0) * (2 * WARPS), out + tl.program_id(1) * rows
    _store_sums(total, scales, out, first, rows, WARPS, KIND)
    _store_sums(second_total, scales, out, first + WARPS, rows, WARPS, KIND)


@triton.jit
def _weighed(
    mixed, plain, scales, zeros, outer, row, block, blocks, here,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """A step's sums with scale and zero; the scale of a row of bytes is that of all its sums."""
    scale, zero = 1.0, 0.0
    if KIND != INT8:
        scale, zero = statistics(scales, zeros, outer, row, block, blocks, here, KIND, PER_GROUP)
    return product_of(mixed, plain, scale, zero, KIND)


@triton.jit
def _store_sums(total, scales, out, first, rows, WARPS: tl.constexpr, KIND: tl.constexpr):
    """The sums of WARPS rows from `first` on, each of one warp's numbers."""
    row = first + tl.arange(0, WARPS)
    sums = tl.sum(tl.sum(total, 2), 1)
    if KIND == INT8:
        sums *= tl.load(scales + row, mask=row < rows, other=0.0)
    tl.store(out + row, sums, mask=row < rows)


@triton.jit(do_not_specialize=["x_rows"])
def tile_kernel(
    x, codes, scales, zeros, levels, outer, out, x_rows, rows, blocks, steps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr,
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
                scales, zeros, outer, row, word // 4, blocks, here, KIND, PER_GROUP
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
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `rows` of W, columns in the order of planes: out (n, K)."""
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = first + out_row
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[None, :]
    words = blocks * 4
    here = (word < words) & (row < rows)
    raw = load_words(codes, levels, row * words + word, here, KIND)
    scale, zero = statistics(scales, zeros, outer, row, word // 4, blocks, here, KIND, PER_GROUP)
    for column in tl.static_range(8):
        found = weight(raw, column, scale, zero, levels, KIND)
        at = out + out_row * (words * 8) + column * words + word
        tl.store(at, found.to(out.dtype.element_ty), mask=here)


def vector_product(x: Tensor, matrix: Matrix) -> Tensor:
    """x (1, K) in planes @ W.T -> (parts, N) float32, the sum of whose parts is the product."""
    chosen = card(x.device)
    loads = matrix.blocks * (2 if matrix.kind == INT8_KIND else 1)
    programs, steps = _pieces(matrix.rows, 2 * WARPS), _pieces(loads, LANES)
    parts = chosen.column_parts(programs, steps)
    out = torch.empty((parts, matrix.rows), dtype=torch.float32, device=x.device)
    vector_kernel[(programs, parts)](
        x, *matrix.tensors, out, matrix.rows, matrix.blocks, _pieces(steps, parts), 0,
        KIND=matrix.kind, PER_GROUP=matrix.per_group, WARPS=WARPS, LOADS=LANES,
        num_warps=WARPS,
    )  # fmt: skip
    return out


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
        KIND=matrix.kind, PER_GROUP=matrix.per_group, X_ROWS=taken, ROWS=tiles.tile_rows,
        WORDS=tiles.tile_words, num_warps=WARPS,
    )  # fmt: skip
    return out


def restored(matrix: Matrix, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of W, columns in the order of planes: (n, K)."""
    out = torch.empty((stop - start, matrix.columns), dtype=dtype, device=matrix.codes.device)
    grid = (
        _pieces(stop - start, EXPANDED_ROWS), _pieces(matrix.columns // WORD, EXPANDED_WORDS)
    )  # fmt: skip
    expand_kernel[grid](
        *matrix.tensors, out, start, stop, matrix.blocks,
        KIND=matrix.kind, PER_GROUP=matrix.per_group, ROWS=EXPANDED_ROWS, WORDS=EXPANDED_WORDS,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x (M, K) @ W.T -> (M, N) in x's dtype, by whichever kernel suits M."""
    if len(x) == 0:
        return x.new_empty((0, matrix.rows))
    ordered = planar(x)
    if len(x) == 1:
        return vector_product(ordered, matrix).sum(0, keepdim=True).to(x.dtype)
    if len(x) <= card(x.device).tiles.most_rows:
        return tile_product(ordered, matrix).sum(0).to(x.dtype)
    output = x.new_empty((len(x), matrix.rows))
    taken = max(1, card(x.device).restored_weights() // matrix.columns)
    for start in range(0, matrix.rows, taken):
        stop = min(start + taken, matrix.rows)
        torch.matmul(ordered, restored(matrix, start, stop, x.dtype).T, out=output[:, start:stop])
    return output


def _pieces(whole: int, size: int) -> int:
    return -(-whole // size)
