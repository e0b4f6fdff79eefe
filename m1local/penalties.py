"""Penalties on what was said before: logits and the tokens so far in, logits out.

What it is: the repetition penalty (Keskar et al. 2019, as Hugging Face applies it), presence and
frequency penalties (OpenAI's API reference), and DRY, "don't repeat yourself" (p-e-w, 2024), which
grows exponentially with the length of the sequence a token would repeat. What it is not: the order
they are applied in, nor the draw; that is m1local/sampling.py.
"""

import math

import numpy as np
import torch
from torch import Tensor

MAX_EXPONENT = 80.0  # natural logarithm of the greatest DRY factor: far from float32's end


def repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits (V,) of `seen` tokens by `penalty`, and multiply negative ones."""
    if penalty == 1.0:
        return logits
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    penalized = penalized.clamp(max=torch.finfo(torch.float32).max)
    return torch.where(seen, penalized, logits)


def presence_and_frequency(
    logits: Tensor, counts: Tensor, *, presence: float, frequency: float
) -> Tensor:
    """Subtract `presence` once and `frequency` per occurrence (V,) of each token that occurred."""
    if presence == 0 and frequency == 0:
        return logits
    return logits - presence * (counts > 0) - frequency * counts


def dry(
    token_ids: np.ndarray,
    breakers: frozenset[int],
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
) -> dict[int, float]:
    """What to subtract from each token's logit: multiplier · base^(length − allowed_length).

    `length` is that of the longest sequence at the end of `token_ids` (T,) that occurred earlier
    and was followed by that token. No sequence goes on across one of `breakers`.
    """
    total = len(token_ids)
    if total < 2 or multiplier == 0:
        return {}
    # Longer sequences cost no more: what is subtracted has reached its greatest by then.
    most = MAX_EXPONENT / math.log(base) if base > 1 else 0.0
    enough = min(total, max(1, allowed_length + math.ceil(most)))
    limit = next((n for n in range(enough) if int(token_ids[total - 1 - n]) in breakers), enough)
    matched = np.flatnonzero(token_ids[:-1] == token_ids[-1]) if limit else np.empty(0, np.int64)
    longest: dict[int, int] = {}
    length = 1
    while matched.size and length <= limit:
        if length >= allowed_length:  # the longer ones come later and overwrite
            longest |= dict.fromkeys(token_ids[matched + 1].tolist(), length)
        matched = matched[matched >= length]
        if length < total:
            matched = matched[token_ids[matched - length] == token_ids[total - 1 - length]]
        length += 1
    return {
        token_id: multiplier * base ** min(repeated - allowed_length, most)
        for token_id, repeated in longest.items()
        if token_id not in breakers
    }
