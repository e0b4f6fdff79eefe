"""What stands between the products of a layer, by a kernel where there is one: norm, gate, heads.

What it is: the choice, by where the tensors lie, between the compiled library on the CPU
(native/neighbours.py) and Triton's kernels on a card (cuda/rows.py); None where neither serves, and
then torch does it (model.py). What it is not: a kernel.
"""

from types import ModuleType

import torch
from torch import Tensor

from m1local.cuda import support
from m1local.native import neighbours as compiled
from m1local.native.neighbours import HeadTurn


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """RMSNorm of x (..., C) by `weight` (C,)."""
    if x.device.type == "cpu":
        return compiled.norm(x, weight, eps)
    rows = _kernels(x, weight)
    found: Tensor | None = rows.norm(x, weight, eps) if rows else None
    return found


def gate(gated: Tensor, up: Tensor) -> Tensor | None:
    """silu(gated) * up, of the same shape (..., I)."""
    if gated.device.type == "cpu":
        return compiled.gate(gated, up)
    rows = _kernels(gated, up)
    found: Tensor | None = rows.gate(gated, up) if rows else None
    return found


def turn_heads(packed: Tensor, by: HeadTurn) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v (1, T, (H + 2 Hkv) * D) -> heads (1, H or Hkv, T, D), mixed and turned."""
    if packed.device.type == "cpu":
        return compiled.turn_heads(packed, by)
    rows = _kernels(packed, *by.taps, *by.before)
    if rows is None or packed.shape[0] != 1:
        return None
    found: tuple[Tensor, Tensor, Tensor] = rows.turn_heads(packed, by)
    return found


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """Those of a card, where they know tensors like these: of one type, and some numbers."""
    x = tensors[0]
    if not support.usable(x.device) or torch.is_grad_enabled() or x.numel() == 0:
        return None
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    if any(tensor.dtype != x.dtype or tensor.device != x.device for tensor in tensors):
        return None
    from m1local.cuda import rows  # Triton, which is only there with a card

    return rows
