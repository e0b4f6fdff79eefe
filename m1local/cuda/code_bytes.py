"""Stored words as the bytes that tensor cores multiply (tensor_core.py).

What it is: a word of eight columns becomes two times four signed bytes, codes as they are; the
sixteen levels of a code that is none become whole numbers of 16 bits, whose two halves are looked
up a byte at a time, four with an instruction. What it is not: weights; scale and zero come later.
"""

import triton
import triton.language as tl

from m1local.cuda.tensor_core import INTERPRETED
from m1local.cuda.words import INT3, INT6, INT8


@triton.jit
def code_bytes(low, high, KIND: tl.constexpr):
    """A word's columns, of whole numbers: two times four bytes, int32.

    Those of INT8 in their order; else the even ones and the odd ones.
    """
    if KIND == INT8:
        even, odd = low.to(tl.int32), (low >> 32).to(tl.int32)
    elif KIND == INT3:
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
def level_bytes(word, table, HALF: tl.constexpr):
    """Upper (HALF 0) or lower halves of the levels of eight nibbles: two times four bytes.

    In the order of nibbles, so that each two columns are swapped. `table` is eight int32: sixteen
    upper and sixteen lower bytes.
    """
    place, above = word & 0x77777777, (word >> 1) & 0x44444444
    first = _looked_up(place, above, table, HALF)
    second = _looked_up((place >> 16) & 0x7777, (above >> 16) & 0x4444, table, HALF)
    return first, second


@triton.jit
def swapped(four):
    """Four bytes, each two swapped."""
    return permuted(four, four, four * 0 + 0x2301)


@triton.jit
def _looked_up(place, above, table, HALF: tl.constexpr):
    """Bytes of a table of sixteen by four nibbles `place`, of the upper eight where `above` is."""
    low = permuted(place * 0 + table[4 * HALF], place * 0 + table[4 * HALF + 1], place)
    high = permuted(place * 0 + table[4 * HALF + 2], place * 0 + table[4 * HALF + 3], place)
    chosen = permuted(place * 0, place * 0 - 1, above)
    return (low & ~chosen) | (high & chosen)


@triton.jit
def permuted(low, high, which):
    """Four of the eight bytes of `low` and `high`, by the lowest four nibbles, 0 to 7."""
    if INTERPRETED:
        eight = (low.to(tl.int64) & 0xFFFFFFFF) | high.to(tl.int64) << 32
        found = (eight * 0).to(tl.int32)
        for byte in tl.static_range(4):
            taken = eight >> (8 * ((which >> (4 * byte)) & 7)).to(tl.int64)
            found |= (taken.to(tl.int32) & 255) << (8 * byte)
    else:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, which],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return found


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
