"""refit: scale and zero of every group by least squares, in turn with its codes.

What it is: Lloyd's algorithm with levels that lie on a line: given the codes, scale and zero are
the regression of the weights on them; given these, the codes are the nearest. The squared error
falls in every round; three suffice from a start that lets the outermost weights be cut off where
levels are few. What it is not: aware of activations.
"""

import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.base import inverse_of
from m1local.formats.groups import GroupLinear, group_class, group_size_of, range_of, rounded
from m1local.native.quantize import Refit
from m1local.sums import halved_sum

ITERATIONS = 3
# The share of a group's range that the levels span at the start, by the highest code; found on
# m1-tiny and on normal weights: as good as five rounds from the whole range, or better.
START = {7: 0.9, 15: 0.97}


def quantize(rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Quantize rows (n, K) to a format with groups."""
    chosen = group_class(spec)
    compiled = chosen.quantize_compiled(rows, spec, Refit(first_scale(chosen), ITERATIONS))
    if compiled is not None:
        return compiled
    grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
    scales, zeros = fit(grouped, chosen)
    return chosen.encode(grouped, rounded(scales), rounded(zeros))


def first_scale(chosen: type[GroupLinear]) -> float:
    """What share of a group's range one step is at the start."""
    return START.get(chosen.highest, 1.0) / chosen.highest


def fit(grouped: Tensor, chosen: type[GroupLinear]) -> tuple[Tensor, Tensor]:
    """Scales and middle values (n, groups) for groups (n, groups, group) of weights."""
    lowest, size = -chosen.middle, grouped.shape[2]
    low, high = (part[..., None] for part in range_of(grouped))
    mean = halved_sum(grouped) / size
    scale = (high - low) * first_scale(chosen)
    # The middle of the range is the value of the middle of the codes; all but `mean` is relative.
    zero = (low + high) / 2 - mean + (chosen.middle - chosen.highest / 2) * scale
    centred, codes, product = grouped - mean, torch.empty_like(grouped), torch.empty_like(grouped)
    for _ in range(ITERATIONS):
        torch.sub(centred, zero, out=codes).mul_(inverse_of(scale)).round_()
        codes.clamp_(lowest, lowest + chosen.highest)
        together = halved_sum(torch.mul(codes, centred, out=product))
        # Sums of small integers are exact, and so is the spread of the codes, nearly.
        total = codes.sum(dim=2, keepdim=True)
        alone = codes.square_().sum(dim=2, keepdim=True) - total * total / size
        # A constant group has one code; its scale stays 0 and its zero says everything.
        scale = torch.where(alone > 0, together / alone.clamp_min(torch.finfo().tiny), scale)
        zero = scale * (total / -size)
    scale, zero = scale[..., 0], (zero + mean)[..., 0]
    usable = scale.isfinite() & zero.isfinite()
    if not bool(usable.all()):  # sums near the end of float32's range overflow
        even_scale, even_zero = chosen.spread(low[..., 0], high[..., 0])
        scale = torch.where(usable, scale, even_scale.to(scale.dtype))
        zero = torch.where(usable, zero, even_zero.to(zero.dtype))
    return scale, zero
