"""The sums of one row of activations times stored rows: what the threads of a program do.

What it is: each warp reads sixteen rows of W as they are stored, four threads a row and two blocks
of 32 columns, or of bytes 16, to a thread at a time; warps that share rows take turns along the
columns, and all keep sums of their own until the end. Codes become bytes (code_bytes.py),
activations are whole numbers in bytes too (activation.py), and tensor cores multiply them
(tensor_core.py). What it is not: a kernel; those, and what follows a product, are in one_row.py.
"""

import triton
import triton.language as tl

from m1local.cuda.code_bytes import code_bytes, level_bytes, swapped
from m1local.cuda.overlap import settled
from m1local.cuda.tensor_core import PLACES, WARP_ROWS, own_half, place_and_row, sums_of_halves
from m1local.cuda.words import INT3, INT4, INT8, LEVELS, NESTED, group_place, middle, nested

LOADS = 2  # blocks for each row and thread, one after the other; of bytes half blocks
_LOADS, _PLACES, _WARP_ROWS = tl.constexpr(LOADS), tl.constexpr(PLACES), tl.constexpr(WARP_ROWS)


@triton.jit
def summed(
    x, one, other, first, GROUP_ROWS: tl.constexpr, rows, blocks, begin, steps, eps,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
    GROUPS: tl.constexpr, TURNS: tl.constexpr, SQUARES: tl.constexpr, SMALL: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """x times eight rows of `one` and eight of `other` a group: (8 * GROUPS,) each.

    A group has GROUP_ROWS rows from `first` on: eight, which are those of both, or sixteen, of
    which the last eight are the other's. It has TURNS warps, which take turns along the columns.
    The next codes are on their way while a thread multiplies those it has. Every number has the
    words' place, (threads, words), so that nothing is exchanged until the end; and since threads
    are one axis, Triton has one way to spread them, that of tensor cores.
    """
    WARPS: tl.constexpr = GROUPS * TURNS
    loads = blocks * 2 if KIND == INT8 else blocks
    place, row = place_and_row(WARPS)
    warp = tl.arange(0, 32 * WARPS)[:, None] // 32
    row += first + warp // TURNS * GROUP_ROWS
    other_row = row + GROUP_ROWS - _WARP_ROWS
    TOGETHER: tl.constexpr = TURNS * _PLACES * _LOADS
    stop = tl.minimum(begin + steps, tl.cdiv(loads, TOGETHER))
    load = begin * TOGETHER + (warp % TURNS * _PLACES + place) * _LOADS
    end = tl.minimum(stop * TOGETHER, loads)
    kept = _load_both(one, other, row, other_row, rows, load, loads, end, KIND, PER_GROUP, TILED)
    settled(OVERLAP)
    factor = _norm_factor(x[2], blocks * 32, eps, SQUARES, WARPS)
    total = tl.zeros((32 * WARPS, 1), tl.float32)
    other_total = tl.zeros((32 * WARPS, 1), tl.float32)
    for _ in range(begin, stop):
        later = load + TOGETHER
        coming = _load_both(
            one, other, row, other_row, rows, later, loads, end, KIND, PER_GROUP, TILED
        )
        for part in tl.static_range(_LOADS):
            found, other_found, plain = _multiplied(
                x, kept[0][part], kept[1][part], one, load + part, blocks, KIND, WARPS, SMALL
            )
            block = load + part
            total += _weighed(
                found, plain, kept[0][part], one, row, rows, block, blocks, KIND, PER_GROUP
            )
            other_total += _weighed(
                other_found, plain, kept[1][part], other, other_row, rows, block, blocks, KIND,
                PER_GROUP,
            )  # fmt: skip
        kept = coming
        load = later
    behind = first + GROUP_ROWS - _WARP_ROWS
    return (
        _row_sums(total * factor, one, first, rows, GROUP_ROWS, KIND, GROUPS, TURNS),
        _row_sums(other_total * factor, other, behind, rows, GROUP_ROWS, KIND, GROUPS, TURNS),
    )


@triton.jit
def _norm_factor(squares, columns, eps, SQUARES: tl.constexpr, WARPS: tl.constexpr):
    """What RMSNorm multiplies a row by whose `squares` are summed piece by piece; 1 without any.

    Each warp sums all of them by itself, so that none waits: (threads, 1).
    """
    factor = 1.0
    if SQUARES > 0:
        lane = tl.arange(0, 32 * WARPS)[:, None] % 32
        piece = lane * 4 + tl.arange(0, 4)[None, :]
        total = tl.zeros((32 * WARPS, 4), tl.float32)
        for first in tl.static_range(0, SQUARES, 128):
            here = first + piece < columns // (2 * _WARP_ROWS)
            total += tl.load(squares + first + piece, mask=here, other=0.0)
        sums = tl.sum(tl.reshape(tl.sum(total, 1), (WARPS, 32)), 1, keep_dims=True)
        sums = tl.reshape(tl.broadcast_to(sums, (WARPS, 32)), (32 * WARPS, 1))
        factor = 1 / tl.sqrt_rn(sums / columns + eps)
    return factor


@triton.jit
def _load_both(
    one, other, row, other_row, rows, load, loads, end,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """What a step reads of two rows."""
    return (
        _load_row(one, row, rows, load, loads, end, KIND, PER_GROUP, TILED),
        _load_row(other, other_row, rows, load, loads, end, KIND, PER_GROUP, TILED),
    )


@triton.jit
def _load_row(
    matrix, row, rows, load, loads, end,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Two loads of `row` that follow each other; of an even group they share the statistics."""
    first = _load_words(matrix, row, rows, load, loads, end, KIND)
    second = _load_words(matrix, row, rows, load + 1, loads, end, KIND)
    scale, zero = _load_statistics(matrix, row, rows, load, loads, end, KIND, PER_GROUP, TILED)
    second_scale, second_zero = scale, zero
    if PER_GROUP % 2 == 1:
        second_scale, second_zero = _load_statistics(
            matrix, row, rows, load + 1, loads, end, KIND, PER_GROUP, TILED
        )
    return (first[0], first[1], scale, zero), (second[0], second[1], second_scale, second_zero)


@triton.jit
def _load_words(matrix, row, rows, load, loads, end, KIND: tl.constexpr):
    """16 bytes of words of `row` at each `load` before `end`, and their upper plane, as stored."""
    WORDS: tl.constexpr = 2 if KIND == INT8 else 4
    here = (load < end) & (row < rows)
    at = (row * loads + load) * WORDS + tl.arange(0, WORDS)[None, :]
    low = tl.load(matrix[0] + at, mask=here, other=0)
    high = low
    if KIND >= INT3:
        high = tl.load(matrix[3] + at, mask=here, other=0)
    return low, high


@triton.jit
def _load_statistics(
    matrix, row, rows, load, loads, end,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Scale and zero, not converted yet, so that nobody waits for them."""
    scale, zero = 0.0, 0.0
    if KIND != INT8:
        here = (load < end) & (row < rows)
        group = group_place(row, load // PER_GROUP, loads // PER_GROUP, TILED)
        scale = tl.load(matrix[1] + group, mask=here, other=0)
        zero = scale
        if KIND == INT4 or KIND >= INT3:
            zero = tl.load(matrix[2] + group, mask=here, other=0)
    return scale, zero


@triton.jit
def _multiplied(
    x,
    kept,
    other,
    matrix,
    load,
    blocks,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    SMALL: tl.constexpr,
):
    """A thread's codes of two rows times x: (threads, 1) each; and x's sums alone."""
    halves, scales = x[0], x[1]
    WORDS: tl.constexpr = 2 if KIND == INT8 else 4
    word = tl.arange(0, WORDS)[None, :]
    here = load * WORDS < blocks * 4
    at = scales + load * WORDS + word
    scale, plain = tl.load(at, mask=here, other=0.0), 0.0
    x_first, x_second = _own_columns(halves, load, word, here, blocks, KIND, WARPS)
    if KIND == LEVELS or KIND == NESTED:  # noqa: SIM109  # Triton knows no `in`
        found, other_found = _times_levels(kept[0], other[0], x_first, x_second, matrix[5], SMALL)
        unit = tl.load(matrix[5] + 8).to(tl.float32, bitcast=True)
        scale *= unit
    else:
        first, second = code_bytes(kept[0], kept[1], KIND)
        other_first, other_second = code_bytes(other[0], other[1], KIND)
        upper, lower, other_upper, other_lower = sums_of_halves(
            first, second, other_first, other_second, x_first, x_second, SMALL
        )
        found, other_found = upper * 256 + lower, other_upper * 256 + other_lower
        if KIND != INT8:
            plain = tl.sum(tl.load(at + blocks * 4, mask=here, other=0.0), 1, keep_dims=True)
    return (
        tl.sum(found.to(tl.float32) * scale, 1, keep_dims=True),
        tl.sum(other_found.to(tl.float32) * scale, 1, keep_dims=True),
        plain,
    )


@triton.jit
def _own_columns(halves, load, word, here, blocks, KIND: tl.constexpr, WARPS: tl.constexpr):
    """Two times four bytes of the half of x that a thread brings, for each word: int32."""
    half, brings = own_half(WARPS)
    WORDS: tl.constexpr = 2 if KIND == INT8 else 4
    # Levels and bytes are in the order of columns, other codes even ones first.
    LEVEL: tl.constexpr = (KIND == LEVELS) | (KIND == NESTED)
    ORDER: tl.constexpr = 0 if LEVEL or KIND == INT8 else 2
    at = halves.to(tl.pointer_type(tl.int64)) + (ORDER + half) * (blocks * 4) + load * WORDS
    pair = tl.load(at + word, mask=here & brings, other=0)
    first, second = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    if LEVEL:
        first, second = swapped(first), swapped(second)
    return first, second


@triton.jit
def _times_levels(word, other, x_first, x_second, table_at, SMALL: tl.constexpr):
    """Sums of levels times x, in whole numbers: both are of 16 bits, and the last 8 are left out.

    Of a level's two halves and x's two, that is (upper * upper) * 256 and the mixed ones.
    """
    table = (
        tl.load(table_at), tl.load(table_at + 1), tl.load(table_at + 2), tl.load(table_at + 3),
        tl.load(table_at + 4), tl.load(table_at + 5), tl.load(table_at + 6), tl.load(table_at + 7),
    )  # fmt: skip
    first, second = level_bytes(word, table, 0)
    other_first, other_second = level_bytes(other, table, 0)
    upper, mixed, other_upper, other_mixed = sums_of_halves(
        first, second, other_first, other_second, x_first, x_second, SMALL
    )
    first, second = level_bytes(word, table, 1)
    other_first, other_second = level_bytes(other, table, 1)
    also, last, other_also, other_last = sums_of_halves(
        first, second, other_first, other_second, x_first, x_second, SMALL
    )
    return (
        upper * 256 + mixed + also + (last >> 8),
        other_upper * 256 + other_mixed + other_also + (other_last >> 8),
    )


@triton.jit
def _weighed(
    found, plain, kept, matrix, row, rows, block, blocks,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """A thread's sum of weights times x: `found` of codes times x, and `plain` of x alone."""
    _, _, scale, zero = kept
    if KIND == INT8:  # whose scale is that of a row, and applied to the sums
        total = found
    elif KIND == LEVELS:
        total = found * scale
    elif KIND == NESTED:
        group = row * (blocks // PER_GROUP) + block // PER_GROUP
        total = found * nested(scale, matrix[4], group, (block < blocks) & (row < rows))
    else:
        scale = scale.to(tl.float32)
        total = found * scale + plain * (zero.to(tl.float32) - middle(KIND) * scale)
    return total


@triton.jit
def _row_sums(
    total, matrix, first, rows, GROUP_ROWS: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """The sums (8 * GROUPS,) of rows from `first` on, of four threads' numbers in TURNS warps."""
    ROWS: tl.constexpr = GROUPS * _WARP_ROWS
    sums = tl.sum(tl.reshape(total, (GROUPS, TURNS, _WARP_ROWS, _PLACES)), 3)
    sums = tl.reshape(tl.sum(sums, 1), (ROWS,))
    if KIND == INT8:
        place = tl.arange(0, ROWS)
        row = first + place // _WARP_ROWS * GROUP_ROWS + place % _WARP_ROWS
        sums *= tl.load(matrix[1] + row, mask=row < rows, other=0.0)
    return sums
