"""Stored words into weights: the part of every product that knows a format.

What it is: functions that the kernels of products.py call. A word is eight columns of one row: an
int32 of eight nibbles, an int64 of eight bytes, or a part in each of two planes; `column` is a
weight's place in its word. Four words, 32 columns, are a block: 16 bytes of nibbles, what one
thread loads at a time, and never more than one group. What it is not: a kernel, or a copy of the
weights; they are read as stored.
"""

import triton
import triton.language as tl

from m1local.cuda.matrix import TILE_GROUPS, TILE_ROWS

_TILE_ROWS, _TILE_GROUPS = tl.constexpr(TILE_ROWS), tl.constexpr(TILE_GROUPS)
INT4 = tl.constexpr(0)  # the even column in the low nibble; w = (code - 8) * scale + zero
INT8 = tl.constexpr(1)  # w = code * scale, one scale a row
LEVELS = tl.constexpr(2)  # the even column in the high nibble; w = level[code] * scale
NESTED = tl.constexpr(3)  # the same, the scales being codes in turn
INT3 = tl.constexpr(4)  # as INT4, but two planes: two bits and one
INT5 = tl.constexpr(5)  # four bits and one
INT6 = tl.constexpr(6)  # four bits and two
NESTED_BLOCK = tl.constexpr(256)  # scales that share an outer one
# A whole number below 2^23 put into the lowest bits of this float is that number more than it:
# two fast instructions, where converting takes a slow one.
EXPONENT = tl.constexpr(0x4B000000)  # 2^23
SIGNED_EXPONENT = tl.constexpr(0x4B400000)  # 1.5 * 2^23, for numbers of either sign


@triton.jit
def load_words(codes, upper, at, here, KIND: tl.constexpr):
    """The words at the places `at`; of two planes, the upper one in the upper half of an int64."""
    raw = tl.load(codes + at, mask=here, other=0)
    if KIND >= INT3:
        MASK: tl.constexpr = 0xFFFF if KIND == INT6 else 0xFF
        high = tl.load(upper + at, mask=here, other=0).to(tl.int32) & MASK
        low = raw.to(tl.int32) & 0xFFFF if KIND == INT3 else raw
        raw = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return raw


@triton.jit
def statistics(
    scales, zeros, outer, row, block, blocks, here,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Scale and zero of `row` and `block`, in float32; zero where the format has none.

    PER_GROUP is how many blocks share them. For nested scales `outer` holds 256 levels, the
    offset, and a scale for each 256 of them.
    """
    at = group_place(row, block // PER_GROUP, blocks // PER_GROUP, TILED)
    if KIND == INT8:
        scale = tl.load(scales + row + block * 0, mask=here, other=0.0)
        zero = scale * 0.0
    elif KIND == INT4 or KIND >= INT3:
        scale = tl.load(scales + at, mask=here, other=0.0).to(tl.float32)
        zero = tl.load(zeros + at, mask=here, other=0.0).to(tl.float32)
    elif KIND == LEVELS:
        scale = tl.load(scales + at, mask=here, other=0.0)
        zero = scale * 0.0
    else:
        scale = nested(tl.load(scales + at, mask=here, other=0), outer, at, here)
        zero = scale * 0.0
    return scale, zero


@triton.jit
def group_place(row, group, groups, TILED: tl.constexpr):
    """Where the statistics of a row's group lie (matrix.py, `tiled`)."""
    if TILED:
        tile = row // _TILE_ROWS * (groups // _TILE_GROUPS) + group // _TILE_GROUPS
        inside = row % _TILE_ROWS * _TILE_GROUPS + group % _TILE_GROUPS
        at = tile * (_TILE_ROWS * _TILE_GROUPS) + inside
    else:
        at = row * groups + group
    return at


@triton.jit
def nested(code, outer, at, here):
    """The scale at the place `at` from its code; `outer` as in `statistics`."""
    level = tl.load(outer + code.to(tl.int32))
    return level * tl.load(outer + 257 + at // NESTED_BLOCK, mask=here, other=0.0) + tl.load(
        outer + 256
    )


@triton.jit
def middle(KIND: tl.constexpr):
    """The code that means exactly the zero of its group."""
    return 4.0 if KIND == INT3 else (24.0 if KIND == INT6 else 8.0)


@triton.jit
def weight(raw, column, scale, zero, levels, KIND: tl.constexpr):
    """The weight in place `column` of the words `raw`, in float32; of many columns, if they are."""
    if KIND == INT8:
        signed = (raw >> (8 * column)).to(tl.int8).to(tl.int32) + SIGNED_EXPONENT
        return (signed.to(tl.float32, bitcast=True) - 12582912.0) * scale
    if KIND == INT4:
        code = (raw >> (4 * column)) & 15 | EXPONENT
        return (code.to(tl.float32, bitcast=True) - (8388608.0 + middle(KIND))) * scale + zero
    if KIND >= INT3:
        WIDTH: tl.constexpr = 2 if KIND == INT3 else 4
        ABOVE: tl.constexpr = 2 if KIND == INT6 else 1
        low = (raw.to(tl.int32) >> (WIDTH * column)) & ((1 << WIDTH) - 1)
        high = ((raw >> 32).to(tl.int32) >> (ABOVE * column)) & ((1 << ABOVE) - 1)
        code = low | high << WIDTH | EXPONENT
        return (code.to(tl.float32, bitcast=True) - (8388608.0 + middle(KIND))) * scale + zero
    code = (raw >> (4 * (column ^ 1))) & 15
    return tl.load(levels + code) * scale
