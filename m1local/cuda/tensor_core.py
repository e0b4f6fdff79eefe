"""Bytes times bytes by the tensor cores, for the one row of activations of decoding.

What it is: one instruction (PTX ISA, mma.m16n8k32 on signed bytes; 7.5 has it in four pieces), and
how one row of activations fills it. Four threads hold a row of W, each its own columns of it, and a
second row beside it; so a warp has sixteen rows and four places. The instruction wants eight
columns of activations, and there is one: it is taken for each of the four places by itself, zero at
the others, once with the upper and once with the lower halves of its numbers (activation.py). What
comes out is then exactly what each thread is owed: the sums of its own columns of its two rows.
What it is not: a product; row_sums.py weighs the sums. In the interpreter the instruction is played
by arithmetic, place by place.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # which knows no assembler
PLACES = 4  # threads that hold a row
WARP_ROWS = 8  # and so many times two rows a warp


@triton.jit
def place_and_row(WARPS: tl.constexpr):
    """Each thread's place (0 to 3) and row (0 to 7): (threads, 1) each."""
    lane = tl.arange(0, 32 * WARPS)[:, None] % 32
    return lane % 4, lane // 4


@triton.jit
def own_half(WARPS: tl.constexpr):
    """Which half of the activations a thread brings, and whether it brings any: (threads, 1)."""
    place, row = place_and_row(WARPS)
    return row % 2, row // 2 == place


@triton.jit
def sums_of_halves(
    first, second, other_first, other_second, x_first, x_second, SMALL: tl.constexpr
):
    """Sums of eight columns, for each word: with the upper and with the lower halves of x.

    `first` and `second` are four bytes each of a thread's row, `other_` of its other row; `x_` the
    same columns of its half of x. All are (threads, words) int32. Four of them come back: upper
    and lower of the row, upper and lower of the other.
    """
    if INTERPRETED:
        upper, lower = _played(first, second, x_first, x_second)
        other_upper, other_lower = _played(other_first, other_second, x_first, x_second)
    elif SMALL:
        upper, lower, other_upper, other_lower = tl.inline_asm_elementwise(
            """{
            .reg .b32 none, up, low;
            mov.b32 none, 0;
            mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {up, low}, {$4}, {$8}, {none, none};
            mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {$0, $1}, {$5}, {$9}, {up, low};
            mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {up, low}, {$6}, {$8}, {none, none};
            mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {$2, $3}, {$7}, {$9}, {up, low};
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
            [first, second, other_first, other_second, x_first, x_second],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        upper, lower, other_upper, other_lower = tl.inline_asm_elementwise(
            """{
            .reg .b32 none;
            mov.b32 none, 0;
            mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
                {$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {none, none, none, none};
            }""",
            "=r,=r,=r,=r,r,r,r,r,r,r",
            [first, second, other_first, other_second, x_first, x_second],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return upper, lower, other_upper, other_lower


@triton.jit
def _played(first, second, x_first, x_second):
    """What the instruction gives each thread of one row: columns 2 * place and the one after it."""
    WARPS: tl.constexpr = first.shape[0] // 32
    WORDS: tl.constexpr = first.shape[1]
    found = tl.zeros((WARPS, 8, 8, 4, WORDS), tl.int32)  # row, column, place
    for half in tl.static_range(2):
        codes = tl.reshape(second if half else first, (WARPS, 8, 1, 4, WORDS))
        factors = tl.reshape(x_second if half else x_first, (WARPS, 1, 8, 4, WORDS))
        for byte in tl.static_range(4):
            left, right = 24 - 8 * byte, 24
            found += (codes << left >> right) * (factors << left >> right)
    columns = tl.reshape(tl.sum(found, 3), (WARPS, 8, 4, 2, WORDS))
    upper, lower = tl.split(tl.permute(columns, (0, 1, 2, 4, 3)))
    return tl.reshape(upper, first.shape), tl.reshape(lower, first.shape)
