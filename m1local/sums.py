"""Sums whose order is written down: the same bits on every processor.

What it is: for what ends in a checkpoint's bytes. torch's own sums go in the order that suits the
width of a processor's vectors. What it is not: faster, or needed where a sum is only used.
"""

import torch
from torch import Tensor


def halved_sum(values: Tensor) -> Tensor:
    """Sums (…, 1) of values (…, n): the second half is added to the first, until one is left."""
    while (count := values.shape[-1]) > 1:
        half = (count + 1) // 2
        first, second = values[..., :half], values[..., half:]
        if count % 2:  # the last of the first half has no partner
            values = torch.cat((first[..., :-1] + second, first[..., -1:]), dim=-1)
        else:
            values = first + second
    return values
