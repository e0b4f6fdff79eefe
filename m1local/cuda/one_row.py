"""The product of one row of activations with stored matrices, in Triton: what decoding is made of.

What it is: kernels in which each warp reads two rows of W as they are stored, 16 bytes of codes to
a thread at a time, and keeps sums of its own until the end, so that nothing is exchanged while the
weights come in. Codes that are whole numbers are multiplied four at a time with activations that
are whole numbers too (activation.py); levels one by one, in float32. What follows a product is done
by the program that has its rows: SiLU times up, of gate and up that are read by one kernel; the sum
with the residual stream and the norm's weight, while the norm itself, one factor for the whole row,
is applied by whoever multiplies next. Else, where the rows of W are too few to fill the card, the
columns are split, and whoever reads the product sums the parts. What it is not: for several rows
(products.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.activation import Activation, store_row
from m1local.cuda.card import LANES, WARPS, card
from m1local.cuda.matrix import INT8 as INT8_KIND
from m1local.cuda.matrix import WORD, Matrix
from m1local.cuda.overlap import begun_early, settled
from m1local.cuda.words import INT3, INT4, INT6, INT8, LEVELS, NESTED, middle, nested

# Where activations are written a program's rows make a whole word.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # which knows no assembler


@triton.jit
def vector_kernel(
    x, matrix, out, rows, blocks, steps, eps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, WARPS: tl.constexpr, LOADS: tl.constexpr,
    SQUARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Part `program 1` of x (K,) @ W.T, two rows of W for each warp: out (parts, N) float32."""
    first = tl.program_id(0) * (2 * WARPS)
    row = first + tl.arange(0, WARPS)
    begin = tl.program_id(1) * steps
    total, other_total = _summed(
        x, matrix, matrix, row, row + WARPS, rows, blocks, begin, steps, eps,
        KIND, PER_GROUP, WARPS, LOADS, SQUARES, OVERLAP,
    )  # fmt: skip
    out += tl.program_id(1) * rows
    tl.store(out + row, total, mask=row < rows)
    tl.store(out + row + WARPS, other_total, mask=row + WARPS < rows)


@triton.jit
def gated_kernel(
    x, gate, up, natural, planes, halves, scales, rows, blocks, steps, eps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, WARPS: tl.constexpr, LOADS: tl.constexpr,
    SQUARES: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """silu(x @ gate.T) * (x @ up.T), the same row of both for each warp, as activations."""
    first = tl.program_id(0) * WARPS
    row = first + tl.arange(0, WARPS)
    opened, total = _summed(
        x, gate, up, row, row, rows, blocks, 0, steps, eps,
        KIND, PER_GROUP, WARPS, LOADS, SQUARES, OVERLAP,
    )  # fmt: skip
    value = opened * tl.sigmoid(opened) * total
    store_row(natural, planes, halves, scales, first, rows, value, rows, WARPS, WHOLE)


@triton.jit
def added_kernel(
    x, matrix, stream, weight, natural, planes, halves, scales, squares, rows, blocks, steps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, WARPS: tl.constexpr, LOADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """stream (N,) += x @ W.T; then times weight, as activations, and its squares, word by word.

    Two rows that follow each other for each of four warps: a whole word.
    """
    first = tl.program_id(0) * (2 * WARPS)
    row = first + 2 * tl.arange(0, WARPS)
    total, other_total = _summed(
        x, matrix, matrix, row, row + 1, rows, blocks, 0, steps, 0.0,
        KIND, PER_GROUP, WARPS, LOADS, 0, OVERLAP,
    )  # fmt: skip
    row = first + tl.arange(0, 2 * WARPS)
    here = row < rows
    grown = tl.reshape(tl.join(total, other_total), (2 * WARPS,))
    grown += tl.load(stream + row, mask=here, other=0.0)
    tl.store(stream + row, grown, mask=here)
    tl.store(squares + first // (2 * WARPS), tl.sum(grown * grown, 0), mask=first < rows)
    value = grown * tl.load(weight + row, mask=here, other=0.0).to(tl.float32)
    store_row(natural, planes, halves, scales, first, rows, value, rows, 2 * WARPS, True)


@triton.jit
def _summed(
    x, one, other, row, other_row, rows, blocks, begin, steps, eps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, WARPS: tl.constexpr, LOADS: tl.constexpr,
    SQUARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x times the rows `row` (WARPS,) of one matrix and `other_row` of another: (WARPS,) each.

    A thread loads four words, 16 bytes of codes, and while it multiplies the next are on their way.
    Every number has the words' place, (warps, loads, words): nothing is exchanged until the end.
    """
    loads = blocks * 2 if KIND == INT8 else blocks
    first_row, other_first_row = row, other_row
    row, other_row = row[:, None, None], other_row[:, None, None]
    stop = tl.minimum(begin + steps, tl.cdiv(loads, LOADS))
    load = begin * LOADS + tl.arange(0, LOADS)[None, :, None]
    end = tl.minimum(stop * LOADS, loads)
    AHEAD: tl.constexpr = 2 if KIND < INT3 else 1  # codes in two planes take more registers
    kept = _load_both(one, other, row, other_row, rows, load, loads, end, KIND, PER_GROUP)
    after = kept
    if AHEAD == 2:
        after = _load_both(
            one, other, row, other_row, rows, load + LOADS, loads, end, KIND, PER_GROUP
        )
    settled(OVERLAP)
    factor = _norm_factor(x[3], blocks * 32, eps, SQUARES, WARPS, LOADS)
    total = tl.zeros((WARPS, LOADS, 4), tl.float32)
    other_total = tl.zeros((WARPS, LOADS, 4), tl.float32)
    for _ in range(begin, stop):
        later = load + AHEAD * LOADS
        coming = _load_both(one, other, row, other_row, rows, later, loads, end, KIND, PER_GROUP)
        if KIND == LEVELS or KIND == NESTED:  # noqa: SIM109  # Triton knows no `in`
            found, other_found, plain = _times_levels(
                x, kept[0], kept[1], one[3], other[3], row, load, blocks
            )
        else:
            found, other_found, plain = _times_whole(x, kept[0], kept[1], row, load, blocks, KIND)
        groups, inside = blocks // PER_GROUP, load < loads
        at = row * groups + load // PER_GROUP, inside & (row < rows)
        total += _weighed(found, plain, kept[0], one, at, KIND)
        at = other_row * groups + load // PER_GROUP, inside & (other_row < rows)
        other_total += _weighed(other_found, plain, kept[1], other, at, KIND)
        if AHEAD == 2:
            kept, after = after, coming
        else:
            kept = coming
        load += LOADS
    return (
        _row_sums(total, one, first_row, rows, KIND) * factor,
        _row_sums(other_total, other, other_first_row, rows, KIND) * factor,
    )


@triton.jit
def _norm_factor(
    squares, columns, eps, SQUARES: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr
):
    """What RMSNorm multiplies a row by whose `squares` are summed word by word; 1 without any.

    Each warp sums all of them by itself, in the words' place, so that none waits: (WARPS,).
    """
    factor = 1.0
    if SQUARES > 0:
        warp, lane = tl.arange(0, WARPS)[:, None, None], tl.arange(0, LANES)[None, :, None]
        word = warp * 0 + lane * 4 + tl.arange(0, 4)[None, None, :]
        total = tl.zeros((WARPS, LANES, 4), tl.float32)
        for first in tl.static_range(0, SQUARES, LANES * 4):
            here = first + word < columns // 8
            total += tl.load(squares + first + word, mask=here, other=0.0)
        factor = 1 / tl.sqrt_rn(tl.sum(tl.sum(total, 2), 1) / columns + eps)
    return factor


@triton.jit
def _load_both(
    one, other, row, other_row, rows, load, loads, end, KIND: tl.constexpr, PER_GROUP: tl.constexpr
):
    """What a step reads of two rows."""
    return (
        _load_row(one, row, rows, load, loads, end, KIND, PER_GROUP),
        _load_row(other, other_row, rows, load, loads, end, KIND, PER_GROUP),
    )


@triton.jit
def _load_row(matrix, row, rows, load, loads, end, KIND: tl.constexpr, PER_GROUP: tl.constexpr):
    """Four words of `row` at each `load` before `end`, their upper plane, scale and zero.

    All as stored: nothing is converted yet, so that nobody waits for it.
    """
    codes, scales, zeros, upper, _ = matrix
    here = (load < end) & (row < rows)
    at = (row * loads + load) * 4 + tl.arange(0, 4)[None, None, :]
    low = tl.load(codes + at, mask=here, other=0)
    high = low
    if KIND >= INT3:
        high = tl.load(upper + at, mask=here, other=0)
    scale, zero = 0.0, 0.0
    if KIND != INT8:
        group = row * (loads // PER_GROUP) + load // PER_GROUP
        scale = tl.load(scales + group, mask=here, other=0)
        zero = scale
        if KIND == INT4 or KIND >= INT3:
            zero = tl.load(zeros + group, mask=here, other=0)
    return low, high, scale, zero


@triton.jit
def _times_whole(x, kept, other, row, load, blocks, KIND: tl.constexpr):
    """Codes of two rows times whole numbers (activation.py), each word's sum; and x's sums."""
    halves, scales = x[1], x[2]
    lower, word = blocks * 8, row * 0 + tl.arange(0, 4)[None, None, :]
    if KIND == INT8:
        here = load < blocks * 2
        at = halves + load * 4 + word
        even = tl.load(at, mask=here, other=0)
        even_low = tl.load(at + lower, mask=here, other=0)
        found = dot4(kept[0], even_low, dot4(kept[0], even, even * 0) * 256)
        other_found = dot4(other[0], even_low, dot4(other[0], even, even * 0) * 256)
        scale, plain = tl.load(scales + load * 2 + word // 2, mask=here, other=0.0), 0.0
    else:
        here = load < blocks
        at = halves + 2 * lower + load * 8 + word
        even, odd = tl.load(at, mask=here, other=0), tl.load(at + 4, mask=here, other=0)
        at += lower
        even_low, odd_low = tl.load(at, mask=here, other=0), tl.load(at + 4, mask=here, other=0)
        found = _dot_words(kept, even, odd, even_low, odd_low, KIND)
        other_found = _dot_words(other, even, odd, even_low, odd_low, KIND)
        at = scales + load * 4 + word
        scale = tl.load(at, mask=here, other=0.0)
        plain = tl.load(at + blocks * 4, mask=here, other=0.0)
    return found.to(tl.float32) * scale, other_found.to(tl.float32) * scale, plain


@triton.jit
def _times_levels(x, kept, other, levels, other_levels, row, load, blocks):
    """The same of levels, in float32; they have no use for x's sums."""
    at, here = x[0] + load * 4 + tl.arange(0, 4)[None, None, :] + row * 0, load < blocks
    factor = tl.load(at, mask=here, other=0.0).to(tl.float32)
    found = factor * tl.load(levels + ((kept[0] >> 4) & 15))
    other_found = factor * tl.load(other_levels + ((other[0] >> 4) & 15))
    for column in tl.static_range(1, 8):
        factor = tl.load(at + column * blocks * 4, mask=here, other=0.0).to(tl.float32)
        found += factor * tl.load(levels + ((kept[0] >> (4 * (column ^ 1))) & 15))
        other_found += factor * tl.load(other_levels + ((other[0] >> (4 * (column ^ 1))) & 15))
    return found, other_found, 0.0


@triton.jit
def _dot_words(kept, even, odd, even_low, odd_low, KIND: tl.constexpr):
    """Codes of words of eight columns times whole numbers, each word's sum: int32.

    `even` and `odd` are the upper halves of every other column's number, `_low` the lower ones.
    """
    first, second = _bytes(kept[0], kept[1], KIND)
    upper = dot4(second, odd, dot4(first, even, even * 0))
    return dot4(second, odd_low, dot4(first, even_low, upper * 256))


@triton.jit
def _bytes(low, high, KIND: tl.constexpr):
    """A word's even and odd columns, each four bytes in an int32."""
    if KIND == INT3:
        pairs = _spread_twos(low)
        even, odd = pairs & 0x03030303, (pairs >> 2) & 0x03030303
    else:
        even, odd = low & 0x0F0F0F0F, (low >> 4) & 0x0F0F0F0F
    if KIND == INT6:
        pairs = _spread_twos(high)
        even, odd = even | (pairs & 0x03030303) << 4, odd | (pairs & 0x0C0C0C0C) << 2
    elif KIND >= INT3:
        ABOVE: tl.constexpr = 2 if KIND == INT3 else 4
        ones = _spread_ones(high)
        even, odd = even | (ones & 0x01010101) << ABOVE, odd | (ones & 0x02020202) << ABOVE - 1
    return even, odd


@triton.jit
def _spread_twos(word):
    """Eight columns of two bits: two columns at the bottom of each byte of an int32."""
    wide = word.to(tl.int32) & 0xFFFF
    wide = (wide | wide << 8) & 0x00FF00FF
    return (wide | wide << 4) & 0x0F0F0F0F


@triton.jit
def _spread_ones(word):
    """Eight columns of one bit: two columns at the bottom of each byte of an int32."""
    wide = word.to(tl.int32) & 0xFF
    wide = (wide | wide << 12) & 0x000F000F
    return (wide | wide << 6) & 0x03030303


@triton.jit
def dot4(one, other, total):
    """`total` and the product of four signed bytes with four others: one instruction of a card."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            total += (one << (24 - 8 * byte) >> 24) * (other << (24 - 8 * byte) >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [one, other, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return total


@triton.jit
def _weighed(found, plain, kept, matrix, at, KIND: tl.constexpr):
    """Each word's sum of weights times x: `found` of codes times x, and `plain` of x alone."""
    _, _, scale, zero = kept
    if KIND == INT8:  # whose scale is that of a row, and applied to the sums
        total = found
    elif KIND == LEVELS:
        total = found * scale
    elif KIND == NESTED:
        total = found * nested(scale, matrix[4], at[0], at[1])
    else:
        scale = scale.to(tl.float32)
        total = found * scale + plain * (zero.to(tl.float32) - middle(KIND) * scale)
    return total


@triton.jit
def _row_sums(total, matrix, row, rows, KIND: tl.constexpr):
    """The sums of the rows `row` (WARPS,), each of one warp's numbers."""
    sums = tl.sum(tl.sum(total, 2), 1)
    if KIND == INT8:
        sums *= tl.load(matrix[1] + row, mask=row < rows, other=0.0)
    return sums


def vector_product(x: Activation, matrix: Matrix) -> Tensor:
    """x (1, K) @ W.T -> (parts, N) float32, the sum of whose parts is the product."""
    device = x.natural.device
    programs, steps = triton.cdiv(matrix.rows, 2 * WARPS), _steps(matrix)
    parts = card(device).column_parts(programs, steps)
    out = torch.empty((parts, matrix.rows), dtype=torch.float32, device=device)
    vector_kernel[(programs, parts)](
        _row(x), _vectors(matrix), out, matrix.rows, matrix.blocks, triton.cdiv(steps, parts),
        x.eps, KIND=matrix.kind, PER_GROUP=matrix.per_group, WARPS=WARPS, LOADS=LANES,
        SQUARES=_squares(x), num_warps=WARPS, **begun_early(device),
    )  # fmt: skip
    return out


def gated_product(x: Activation, gate: Matrix, up: Matrix, out: Activation) -> None:
    """`out` (1, N) becomes silu(x @ gate.T) * (x @ up.T), of two matrices that are `alike`."""
    gated_kernel[(triton.cdiv(gate.rows, WORD),)](
        _row(x), _vectors(gate), _vectors(up), *out.tensors, gate.rows, gate.blocks, _steps(gate),
        x.eps, KIND=gate.kind, PER_GROUP=gate.per_group, WARPS=WORD, LOADS=LANES,
        SQUARES=_squares(x), WHOLE=out.whole, num_warps=WORD, **begun_early(x.natural.device),
    )  # fmt: skip


def added_product(
    x: Activation, matrix: Matrix, stream: Tensor, weight: Tensor, out: Activation
) -> None:
    """`stream` (N,) float32 += x (1, K) @ W.T; `out` becomes its RMSNorm with `weight` (N,).

    But for the norm's factor, which every product with `out` applies; `out` has `squares` for that.
    """
    added_kernel[(triton.cdiv(matrix.rows, WORD),)](
        _row(x), _vectors(matrix), stream, weight, *out.tensors, out.squares,
        matrix.rows, matrix.blocks, _steps(matrix),
        KIND=matrix.kind, PER_GROUP=matrix.per_group, WARPS=WORD // 2, LOADS=LANES,
        num_warps=WORD // 2, **begun_early(stream.device),
    )  # fmt: skip


def _steps(matrix: Matrix) -> int:
    """Of LANES loads of 16 bytes in a row."""
    return -(-matrix.blocks * (2 if matrix.kind == INT8_KIND else 1) // LANES)


def _row(x: Activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations as the kernels take them: whole numbers four at a time."""
    return x.planes, x.halves.view(torch.int32), x.scales, x.squares


def _squares(x: Activation) -> int:
    """How many squares a program reads, as a power of two."""
    words: int = x.squares.numel()
    return 1 << (words - 1).bit_length() if words else 0


def _vectors(matrix: Matrix) -> tuple[Tensor, ...]:
    """The matrix's tensors as the kernel for one row takes them: words of four bytes."""
    codes, *rest = matrix.tensors
    return codes.view(torch.int32) if matrix.kind == INT8_KIND else codes, *rest


def alike(one: Matrix, other: Matrix) -> bool:
    """Whether a row can be multiplied by both in one launch."""
    stored = (one.kind, one.per_group, one.shape)
    return stored == (other.kind, other.per_group, other.shape)
