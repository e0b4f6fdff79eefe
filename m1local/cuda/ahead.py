"""Asking for the next product's weights while the kernel in front of it ends.

What it is: between two kernels of a decode step the memory has nothing to do: the last programs of
one end one by one, the next is launched, and its first weights are on their way. So each of the
last programs, when it has read all its own, asks for a piece of what will be read next; it comes
into the second cache, where the next kernel finds it, and whoever asked does not wait. It is a part
of that cache (card.py), and earlier programs ask for nothing: what the others still read would push
it out. Nothing is computed from it, so it changes no number. What it is not: measured; `python -m
bench.gpu` times the step with and without it.
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
EVEN = 16  # so that Triton compiles one kernel for all numbers
_LINE = tl.constexpr(LINE)


class Following(NamedTuple):
    """What is read next: two places among codes, as bytes, and how many lines from each on.

    The first `silent` programs do not ask.
    """

    codes: Tensor
    more_codes: Tensor
    lines: int
    silent: int


def following(matrices: tuple[Matrix, ...], like: Tensor, programs: int, warps: int) -> Following:
    """The first lines of `matrices`, one or two that are read side by side; none without any.

    `like` is any tensor on the card, which stands in where nothing follows; `programs` of `warps`
    ask, of which a card runs so many at a time, and begins them in their order.
    """
    silent = max(0, programs - card(like.device).resident(warps)) // EVEN * EVEN
    codes = [matrix.codes.view(torch.uint8).view(-1) for matrix in matrices]
    if not codes:
        nothing = like.view(torch.uint8)
        return Following(nothing, nothing, 0, silent)
    held = min(one.numel() for one in codes) if len(codes) > 1 else codes[0].numel() // 2
    lines = min(card(like.device).ahead // 2, held) // LINE // EVEN * EVEN
    more = codes[1] if len(codes) > 1 else codes[0][lines * LINE :]
    return Following(codes[0], more, lines, silent)


@triton.jit
def ask_ahead(then, WARPS: tl.constexpr):
    """This program's piece of what is read next (`Following`), a line for each thread at a time.

    The grid has two axes at most.
    """
    THREADS: tl.constexpr = 32 * WARPS
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    lines, silent = then[2], then[3]
    at = (program - silent) * THREADS
    if at >= 0:
        together = (tl.num_programs(0) * tl.num_programs(1) - silent) * THREADS
        for first in range(at, lines, together):
            line = first + tl.arange(0, THREADS)
            ask(then[0] + line.to(tl.int64) * _LINE, line < lines)
            ask(then[1] + line.to(tl.int64) * _LINE, line < lines)


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
