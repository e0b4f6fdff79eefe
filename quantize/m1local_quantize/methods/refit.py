"""refit: scale and zero of every group by least squares, in turn with its codes.

What it is: Lloyd's algorithm with levels that lie on a line: given the codes, scale and zero are
the regression of the weights on them; given these, the codes are the nearest. The squared error
falls in every round; three suffice from a start that lets the outermost weights be cut off where
levels are few. What it is not: aware of activations.
"""

import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.groups import GroupLinear, group_class, group_size_of

ITERATIONS = 3
# The share of a group's range that the levels span at the start, by the highest code; found on
# m1-tiny and on normal weights: as good as five rounds from the whole range, or better.
START = {7: 0.9, 15: 0.97}


def quantize(rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Quantize rows (n, K) to a format with groups."""
    grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
    chosen = group_class(spec)
    scales, zeros = fit(grouped, chosen)
    return chosen.encode(grouped, scales.to(torch.bfloat16), zeros.to(torch.bfloat16))


def fit(grouped: Tensor, chosen: type[GroupLinear]) -> tuple[Tensor, Tensor]:
    """Scales and middle values (n, groups) for groups (n, groups, group) of weights."""
    lowest, size = -chosen.middle, grouped.shape[2]
    low, high = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
    mean = grouped.mean(dim=2, keepdim=True)
    scale = (high - low) * (START.get(chosen.highest, 1.0) / chosen.highest)
    # The middle of the range is the value of the middle of the codes; all but `mean` is relative.
    zero = (low + high) / 2 - mean + (chosen.middle - chosen.highest / 2) * scale
    centred, codes, product = grouped - mean, torch.empty_like(grouped), torch.empty_like(grouped)
    for _ in range(ITERATIONS):
        inverse = torch.where(scale > 0, 1 / scale, 0)
        torch.sub(centred, zero, out=codes).mul_(inverse).round_()
        codes.clamp_(lowest, lowest + chosen.highest)
        total = codes.sum(dim=2, keepdim=True)
        together = torch.mul(codes, centred, out=product).sum(dim=2, keepdim=True)
        # The spread of the codes, exactly: they are small integers.
        alone = codes.square_().sum(dim=2, keepdim=True).addcmul_(total, total, value=-1 / size)
        # A constant group has one code; its scale stays 0 and its zero says everything.
        scale = torch.where(alone > 0, together / alone.clamp_min(torch.finfo().tiny), scale)
        zero = scale * (total / -size)
    return scale[..., 0], (zero + mean)[..., 0]
