"""Beginning a kernel while the one before it ends, on cards that can (9.0 and newer).

What it is: programmatic dependent launch. The next kernel of a decode step may begin as soon as
what lies before this one has ended: it sets up, asks for its weights, which nobody changes, and
waits at `settled` for everything that was launched before it. Since each waits, what it finds then
is as if they had run one after another. What it is not: measured yet; bench/gpu.py measures the
step with and without it.
Source: CUDA programming guide, "Programmatic dependent launch"; PTX ISA, griddepcontrol.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from m1local.cuda.card import card


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


def begun_early(device: torch.device) -> dict[str, Any]:
    """What every launch of a step is given: whether it overlaps the one before it."""
    if card(device).overlaps:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
