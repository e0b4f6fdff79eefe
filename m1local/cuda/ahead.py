"""Asking for the next product's weights while the kernel in front of it ends.

What it is: between two kernels of a decode step the memory has nothing to do: the last programs of
one end one by one, the next is launched, and its first weights are on their way. So each program,
when it has read all its own, asks for a piece of what will be read next; it comes into the second
cache, where the next kernel finds it, and whoever asked does not wait. Nothing is computed from it,
so it changes no number. What it is not: measured; `python -m bench.gpu` times the step with and
without it. It takes a part of the second cache (card.py), so that what is read meanwhile does not
push it out.
Source: PTX ISA, prefetch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.card import card
from m1local.cuda.matrix import Matrix
from m1local.cuda.tensor_core import INTERPRETED

LINE = 128  # bytes that come at once
EVEN = 16  # lines, so that Triton compiles one kernel for all numbers of them
_LINE = tl.constexpr(LINE)


class Following(NamedTuple):
    """What is read next: two places among codes, as bytes, and how many lines from each on."""

    codes: Tensor
    more_codes: Tensor
    lines: int


def following(matrices: tuple[Matrix, ...], like: Tensor) -> Following:
    """The first lines of `matrices`, one or two that are read side by side; none without any.

    `like` is any tensor on the card, which stands in where nothing follows.
    """
    codes = [matrix.codes.view(torch.uint8).view(-1) for matrix in matrices]
    if not codes:
        nothing = like.view(torch.uint8)
        return Following(nothing, nothing, 0)
    held = min(one.numel() for one in codes) if len(codes) > 1 else codes[0].numel() // 2
    lines = min(card(like.device).ahead // 2, held) // LINE // EVEN * EVEN
    return Following(codes[0], codes[1] if len(codes) > 1 else codes[0][lines * LINE :], lines)


@triton.jit
def ask_ahead(then, WARPS: tl.constexpr):
    """This program's piece of what is read next (`Following`), a line for each thread at a time.

    The grid has two axes at most.
    """
    THREADS: tl.constexpr = 32 * WARPS
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    first = program * THREADS + tl.arange(0, THREADS)
    for line in range(0, then[2], tl.num_programs(0) * tl.num_programs(1) * THREADS):
        _ask(then[0], line + first, then[2])
        _ask(then[1], line + first, then[2])


@triton.jit
def _ask(codes, line, lines):
    """Bring `line` (threads,) into the second cache, where it is one of `lines`."""
    if not INTERPRETED:
        at = (codes + line.to(tl.int64) * _LINE).to(tl.int64)
        tl.inline_asm_elementwise(
            """{
            .reg .pred here;
            setp.lt.s32 here, $2, $3;
            @here prefetch.global.L2 [$1];
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r", [at, line, lines + line * 0],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
