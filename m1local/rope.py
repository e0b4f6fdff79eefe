"""Rotary position embedding, half-split, as Baichuan-M1 uses it.

What it is: the rotation of query and key heads by their absolute position. Column j turns together
with column j + D/2 over the whole head, never with its neighbour j + 1 (that is the interleaved
kind; on the golden model the mix-up costs 0.97 logits). What it is not: RoPE scaling; M1 has none.
Source: arXiv 2104.09864; the published modeling code; checked by tests/reference.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles: (T, D/2) each, float32."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """The rotation of `positions` (T,) for heads of width `head_dim`, in float32."""
    return turned(positions, frequencies(head_dim, theta, positions.device))


def frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """By how much each pair of columns turns from a position to the next: (D/2,), in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    return theta ** -(exponents / head_dim)


def turned(positions: Tensor, frequencies: Tensor) -> Rotation:
    """The rotation of `positions` (T,) by `frequencies` (D/2,)."""
    # float32 whatever the model's dtype: bfloat16 cannot tell position 4097 from 4096.
    angles = positions.to(torch.float32)[:, None] * frequencies
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the heads `x` (B, H, T, D) by the rotation of their T positions; keeps x's dtype."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
