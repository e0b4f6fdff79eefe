"""Beginning a kernel while the one before it ends, on cards that can (9.0 and newer).

What it is: programmatic dependent launch. The next kernel of a decode step may begin as soon as
what lies before this one has ended: it sets up, asks for its weights, which nobody changes, and
waits at `settled` for everything that was launched before it. Since each waits, what it finds then
is as if they had run one after another. What it is not: much of a gain on the one card that ran it
(an H200: from 1 % slower to 0.3 % faster); bench/gpu.py measures the step with and without it.
Source: CUDA programming guide, "Programmatic dependent launch"; PTX ISA, griddepcontrol.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from m1local.cuda.card import card
from m1local.cuda.replay import WARM_UPS, captured

EARLY = {"OVERLAP": True, "launch_pdl": True}
TRIED = 4  # launches in a row


@triton.jit
def settled(OVERLAP: tl.constexpr):
    """Wait for what was launched before; only then may anything be read that it may change."""
    if OVERLAP:
        _told("griddepcontrol.wait; // $0")
        _told("griddepcontrol.launch_dependents; // $0")


@triton.jit
def _told(instruction: tl.constexpr):
    """One instruction; Triton wants a number of it, which nobody reads."""
    tl.inline_asm_elementwise(instruction, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _trial_kernel(count):
    """count (1,) += 1, when what was launched before is done."""
    settled(True)
    tl.store(count, tl.load(count) + 1)


def begun_early(device: torch.device) -> dict[str, Any]:
    """What every launch of a step is given: whether it overlaps the one before it."""
    if card(device).overlaps and accepted(device):
        return EARLY
    return {"OVERLAP": False}


@cache
def accepted(device: torch.device) -> bool:
    """Whether such launches work on `device`, also in a graph: tried once."""
    count = torch.zeros(1, device=device)

    def work() -> None:
        for _ in range(TRIED):
            _trial_kernel[(1,)](count, launch_pdl=True, num_warps=1)

    try:
        captured(work, lambda: None)()
        return int(count) == TRIED * (WARM_UPS + 1)
    except Exception:  # of Triton or the driver, whichever knows no such launches
        return False
