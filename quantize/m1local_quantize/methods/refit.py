"""refit: scale and zero of every group by least squares, in turn with its codes.

What it is: Lloyd's algorithm with levels that lie on a line: given the codes, scale and zero are
the regression of the weights on them; given these, the codes are the nearest. The squared error
falls in every round; three to five suffice. What it is not: aware of activations.
"""

import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.groups import GroupLinear, group_class, group_size_of

ITERATIONS = 5


def quantize(rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Quantize rows (n, K) to a format with groups."""
    grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
    chosen = group_class(spec)
    scales, zeros = fit(grouped, chosen)
    return chosen.encode(grouped, scales.to(torch.bfloat16), zeros.to(torch.bfloat16))


def fit(grouped: Tensor, chosen: type[GroupLinear]) -> tuple[Tensor, Tensor]:
    """Scales and middle values (n, groups) for groups (n, groups, group) of weights."""
    low, high = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
    scale = (high - low) / chosen.highest
    zero = low + chosen.middle * scale
    lowest = -chosen.middle
    mean = grouped.mean(dim=2, keepdim=True)
    centred = grouped - mean
    for _ in range(ITERATIONS):
        inverse = torch.where(scale > 0, 1 / scale, 0)
        codes = ((grouped - zero) * inverse).round_().clamp_(lowest, lowest + chosen.highest)
        middle = codes.mean(dim=2, keepdim=True)
        codes -= middle
        together = (codes * centred).sum(dim=2, keepdim=True)
        alone = codes.square_().sum(dim=2, keepdim=True)
        # A constant group has one code; its scale stays 0 and its zero says everything.
        scale = torch.where(alone > 0, together / alone.clamp_min(torch.finfo().tiny), scale)
        zero = mean - scale * middle
    return scale[..., 0], zero[..., 0]
