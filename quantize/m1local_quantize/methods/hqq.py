"""hqq: half-quadratic quantization, the zeros that a sparse error asks for.

What it is: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models"
(mobiusml.github.io/hqq_blog, 2023), with its constants: the weights' error is split into a part
that is given up (an l_p shrinkage, p = 0.7, which lets outliers be wrong) and one that the zero
makes up for. Five rounds are as good as its twenty. What it is not: the best here; `refit` moves
the scale as well.
"""

import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.groups import group_class, group_size_of, rounded

ITERATIONS = 5
NORM = 0.7  # p of the l_p norm
BETA = 10.0
KAPPA = 1.01  # beta grows by this in each round
SMALLEST = 1e-9


def quantize(rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Quantize rows (n, K) to a format with groups."""
    chosen = group_class(spec)
    grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    even = ((high - low) / chosen.highest).clamp_min(SMALLEST)
    scales, zeros = optimize(grouped, even, low, chosen.highest)
    # Stored is the value at the middle code. Of a constant group that value is all there is.
    middles = torch.where(high > low, scales * (chosen.middle - zeros), low)
    scales = torch.where(high > low, scales, 0)
    return chosen.encode(grouped, rounded(scales), rounded(middles))


def optimize(grouped: Tensor, scales: Tensor, low: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Scales as given and better zeros, both (n, groups), so that W ~ scale * (code - zero)."""
    scale, zero, beta = scales[..., None], (-low / scales)[..., None], BETA
    for _ in range(ITERATIONS):
        codes = (grouped / scale + zero).round_().clamp_(0, highest)
        error = shrink(grouped - scale * (codes - zero), beta)
        zero = (codes - (grouped - error) / scale).mean(dim=2, keepdim=True)
        beta *= KAPPA
    return scales, zero[..., 0]


def shrink(x: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold that goes with the l_p norm."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(SMALLEST).pow(NORM - 1) / beta).relu_()
