"""hqq: half-quadratic quantization, the zeros that a sparse error asks for.

What it is: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models"
(mobiusml.github.io/hqq_blog, 2023), with its constants: the weights' error is split into a part
that is given up (an l_p shrinkage, p = 0.7, which lets outliers be wrong) and one that the zero
makes up for. Five rounds are as good as its twenty. The power is computed by additions and
multiplications that are written down, and so are the sums: the compiled library gives the same
bits. What it is not: the best here; `refit` moves the scale as well.
"""

import math

import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.groups import group_class, group_size_of, range_of, rounded
from m1local.native.quantize import Hqq
from m1local.sums import halved_sum

ITERATIONS = 5
BETA = 10.0
KAPPA = 1.01  # beta grows by this in each round
SMALLEST = 1e-9
NORM = 0.7  # p of the l_p norm; x^(p - 1) is taken apart into the next two
# 2^(-0.3 r) for r from 0 to 9; ten times as much is an eighth.
ROOTS = (
    1.0, 0.8122524, 0.659754, 0.5358867, 0.4352753, 0.35355338, 0.28717458, 0.23325825,
    0.18946457, 0.15389305,
)  # fmt: skip
# m^-0.3 for m from 1 to 2, by powers of m - 1.5; within 1e-7 of it, found as Chebyshev's series.
SERIES = (
    0.88546747, -0.17709322, 0.07674034, -0.039237842, 0.021581883, -0.012157806, 0.00715272,
    -0.0054418426, 0.0033242572,
)  # fmt: skip


def powers() -> list[float]:
    """x^(p - 1) of the power of two whose exponent stands in a float32's bits as 0, 1, ... 255."""
    parts = (divmod(bits - 127, len(ROOTS)) for bits in range(256))
    return [math.ldexp(ROOTS[rest], -3 * tens) for tens, rest in parts]


POWERS = torch.tensor(powers())
WEIGHTS = tuple(1 / (BETA * KAPPA**number) for number in range(ITERATIONS))  # of x^(p - 1)
COMPILED = Hqq(POWERS.tolist(), SERIES, WEIGHTS, SMALLEST)


def quantize(rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Quantize rows (n, K) to a format with groups."""
    chosen = group_class(spec)
    compiled = chosen.quantize_compiled(rows, spec, COMPILED)
    if compiled is not None:
        return compiled
    grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
    low, high = range_of(grouped)
    even = ((high - low) / chosen.highest).clamp_min(SMALLEST)
    scales, zeros = optimize(grouped, even, low, chosen.highest)
    # Stored is the value at the middle code. Of a constant group that value is all there is.
    middles = torch.where(high > low, scales * (chosen.middle - zeros), low)
    scales = torch.where(high > low, scales, 0)
    usable = scales.isfinite() & middles.isfinite()
    stored_scales, stored_middles = rounded(scales), rounded(middles)
    if not bool(usable.all()):  # a range near the end of float32's overflows
        even_scales, even_middles = chosen.spread(low, high)
        stored_scales = torch.where(usable, stored_scales, even_scales)
        stored_middles = torch.where(usable, stored_middles, even_middles)
    return chosen.encode(grouped, stored_scales, stored_middles)


def optimize(grouped: Tensor, scales: Tensor, low: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Scales as given and better zeros, both (n, groups), so that W ~ scale * (code - zero)."""
    scale, zero = scales[..., None], (-low / scales)[..., None]
    for weight in WEIGHTS:
        codes = (grouped / scale + zero).round_().clamp_(0, highest)
        error = shrink(grouped - scale * (codes - zero), weight)
        zero = halved_sum(codes - (grouped - error) / scale) / grouped.shape[2]
    return scales, zero[..., 0]


def shrink(x: Tensor, weight: float) -> Tensor:
    """The generalized soft threshold that goes with the l_p norm; `weight` is 1 / beta."""
    size = x.abs()
    kept = (size - power(size.clamp_min(SMALLEST)) * weight).clamp_min_(0)
    return kept.copysign_(x)


def power(x: Tensor) -> Tensor:
    """x^(p - 1) in float32 of numbers that are not negative, to its last bits."""
    bits = x.float().view(torch.int32)
    rest = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32).sub_(1.5)
    found = torch.full_like(rest, SERIES[-1])
    for coefficient in SERIES[-2::-1]:
        found.mul_(rest).add_(coefficient)
    return found.mul_(POWERS[(bits >> 23) & 0xFF])
