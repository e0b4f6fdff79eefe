"""What stands between the products of a layer for the rows of a prompt, in Triton: one kernel each.

What it is: norm, gate and heads as m1local/native/neighbours.py has them on the CPU: computed in
float32 and rounded once, where torch rounds after every step and takes a launch, and a way through
memory, for each. What it is not: for the one row of a decode step, whose neighbours write
activations in whole numbers (fused.py, heads.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.card import WARPS
from m1local.native.neighbours import HeadTurn

NORM_WARPS = 8
GATED = 1024  # values of a program
TOKENS = 8  # of one head for a program


@triton.jit
def norm_rows_kernel(x, weight, out, columns, eps, BLOCK: tl.constexpr):
    """RMSNorm of row `program 0` of x (T, C)."""
    at = tl.arange(0, BLOCK)
    here = at < columns
    first = tl.program_id(0).to(tl.int64) * columns
    value = tl.load(x + first + at, mask=here, other=0.0).to(tl.float32)
    scaled = value * (1 / tl.sqrt_rn(tl.sum(value * value, 0) / columns + eps))
    scaled *= tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + first + at, scaled.to(out.dtype.element_ty), mask=here)


@triton.jit
def gate_rows_kernel(gated, up, out, count, BLOCK: tl.constexpr):
    """silu(gated) * up, value by value."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    opened = tl.load(gated + at, mask=here, other=0.0).to(tl.float32)
    value = opened * tl.sigmoid(opened) * tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["length"])
def turn_rows_kernel(
    packed, taps, before, turn, q, k, v, length, heads, kv_heads, width,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of head `program 1` among those of q, k and v, which lie side by side."""
    head, stride = tl.program_id(1), (heads + 2 * kv_heads) * width
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    inside, half = tl.arange(0, WIDTH)[None, :], width // 2
    here = (token < length) & (inside < width)
    at = packed + token.to(tl.int64) * stride + head * width
    if head < heads:
        found = _turned(at, inside, half, here, turn, token)
        tl.store(q + (head * length + token) * width + inside, found, mask=here)
    elif head < heads + kv_heads:
        head -= heads
        found = _turned_and_mixed(at, inside, half, here, turn, token, taps[0], before[0], head,
                                  stride, width)  # fmt: skip
        tl.store(k + (head * length + token) * width + inside, found, mask=here)
    else:
        head -= heads + kv_heads
        found = _mixed(at, inside, here, token, taps[1], before[1], head, stride, width)
        tl.store(v + (head * length + token) * width + inside, found, mask=here)


@triton.jit
def _turned(at, inside, half, here, turn, token):
    """Columns turned with their partners half a head away."""
    value = tl.load(at + inside, mask=here, other=0.0).to(tl.float32)
    partner = tl.where(inside < half, inside + half, inside - half)
    other = tl.load(at + partner, mask=here, other=0.0).to(tl.float32)
    turn_cos, turn_sin = _angles(inside, half, here, turn, token)
    return value * turn_cos + other * turn_sin


@triton.jit
def _turned_and_mixed(
    at, inside, half, here, turn, token, taps, before, head, stride, width
):  # fmt: skip
    """The same of what the token before is mixed with."""
    value = _mixed(at, inside, here, token, taps, before, head, stride, width)
    partner = tl.where(inside < half, inside + half, inside - half)
    other = _mixed(at, partner, here, token, taps, before, head, stride, width)
    turn_cos, turn_sin = _angles(inside, half, here, turn, token)
    return value * turn_cos + other * turn_sin


@triton.jit
def _mixed(at, inside, here, token, taps, before, head, stride, width):
    """The short convolution: a token and the one before it, which may lie before the chunk."""
    value = tl.load(at + inside, mask=here, other=0.0).to(tl.float32)
    last = tl.load(at - stride + inside, mask=here & (token > 0), other=0.0).to(tl.float32)
    outside = before + head * width + inside + token * 0
    last += tl.load(outside, mask=here & (token == 0), other=0.0).to(tl.float32)
    first = tl.load(taps + 2 * head).to(tl.float32)
    return first * last + tl.load(taps + 2 * head + 1).to(tl.float32) * value


@triton.jit
def _angles(inside, half, here, turn, token):
    """What a column is multiplied by, and what its partner is."""
    low = inside < half
    angle = token * half + tl.where(low, inside, inside - half)
    turn_sin = tl.load(turn[1] + angle, mask=here, other=0.0)
    return tl.load(turn[0] + angle, mask=here, other=0.0), tl.where(low, -turn_sin, turn_sin)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., C) by `weight` (C,)."""
    x, columns = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    norm_rows_kernel[(x.numel() // columns,)](
        x, weight, out, columns, eps,
        BLOCK=triton.next_power_of_2(columns), num_warps=NORM_WARPS,
    )  # fmt: skip
    return out


def gate(gated: Tensor, up: Tensor) -> Tensor:
    """silu(gated) * up, of the same shape (..., I)."""
    gated, up = gated.contiguous(), up.contiguous()
    out = torch.empty_like(gated)
    gate_rows_kernel[(triton.cdiv(gated.numel(), GATED),)](
        gated, up, out, gated.numel(), BLOCK=GATED, num_warps=WARPS
    )
    return out


def turn_heads(packed: Tensor, by: HeadTurn) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of q, k and v, as m1local/native/neighbours.py mixes and turns them."""
    taps, before, turn, kv_heads = by
    packed, rows, width = packed.contiguous(), packed.shape[1], 2 * turn[0].shape[1]
    heads = packed.shape[2] // width - 2 * kv_heads
    q = packed.new_empty(1, heads, rows, width)
    k, v = packed.new_empty(2, 1, kv_heads, rows, width)
    turn_rows_kernel[(triton.cdiv(rows, TOKENS), heads + 2 * kv_heads)](
        packed, tuple(each.contiguous() for each in taps),
        tuple(each.contiguous() for each in before), tuple(each.contiguous() for each in turn),
        q, k, v, rows, heads, kv_heads, width,
        TOKENS=TOKENS, WIDTH=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip
    return q, k, v
