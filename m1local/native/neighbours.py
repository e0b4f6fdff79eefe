"""What stands between the products of a layer, in the compiled library: norm, heads, gate.

What it is: tensors in, tensors out; None where there is no library or it does not serve, and then
torch does it (m1local/model.py), the oracle of tests/test_native_neighbours.py. Everything is
computed in float32 and rounded once, where torch rounds bfloat16 after every step. What it is not:
for training, or for a card.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from m1local.native.library import address, library


class _Heads(ctypes.Structure):
    """`Heads` of common.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "taps_k", "taps_v")),
        *((name, ctypes.c_void_p) for name in ("before_k", "before_v", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "width")),
        ("before_stride", ctypes.c_int64),
        ("is_wide", ctypes.c_int32),
    )


class HeadTurn(NamedTuple):
    """What heads are mixed with and turned by.

    `taps` of keys and values hold two numbers for each of their heads, `before` (1, Hkv, 1, D)
    their raw values of the token before, `turn` cosines and sines (T, D/2) in float32.
    """

    taps: tuple[Tensor, Tensor]
    before: tuple[Tensor, Tensor]
    turn: tuple[Tensor, Tensor]
    kv_heads: int


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """RMSNorm of x (..., C) by `weight` (C,)."""
    compiled = _serving(x, weight)
    if compiled is None:
        return None
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    compiled.m1_norm(
        address(x), address(weight), x.dtype != torch.bfloat16,
        ctypes.c_int64(x.numel() // x.shape[-1]), ctypes.c_int64(x.shape[-1]),
        ctypes.c_float(eps), address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gate(gated: Tensor, up: Tensor) -> Tensor | None:
    """silu(gated) * up, of the same shape (..., I)."""
    compiled = _serving(gated, up)
    if compiled is None or not gated.is_contiguous() or not up.is_contiguous():
        return None
    out = torch.empty_like(gated)
    compiled.m1_gate(
        address(gated), address(up), gated.dtype != torch.bfloat16,
        ctypes.c_int64(gated.numel()), address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def turn_heads(packed: Tensor, by: HeadTurn) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v side by side (1, T, (H + 2 Hkv) * D) -> heads (1, H or Hkv, T, D).

    Queries are turned, keys mixed with the token before them and turned, values mixed.
    """
    taps, before, turn, kv_heads = by
    compiled = _serving(packed, *taps, *before)
    if compiled is None or packed.shape[0] != 1:
        return None
    packed, rows, width = packed.contiguous(), packed.shape[1], 2 * turn[0].shape[1]
    heads = packed.shape[2] // width - 2 * kv_heads
    q = packed.new_empty(1, heads, rows, width)
    k, v = packed.new_empty(2, 1, kv_heads, rows, width)
    held = [tensor.contiguous() for tensor in (*taps, *before, *turn)]
    asked = _Heads(
        address(packed), *map(address, held), address(q), address(k), address(v),
        rows, heads, kv_heads, width, width, packed.dtype != torch.bfloat16,
    )  # fmt: skip
    compiled.m1_turn_heads(ctypes.byref(asked), torch.get_num_threads())
    return q, k, v


def _serving(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where it knows tensors like these: of one kind, on the CPU."""
    x = tensors[0]
    serves = (
        x.dtype in (torch.bfloat16, torch.float32)
        and all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in tensors)
        and x.numel() > 0
        and not torch.is_grad_enabled()
    )
    return library() if serves else None
