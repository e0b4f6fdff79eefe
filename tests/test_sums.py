"""The order of a sum is the one written down, for any number of terms."""

import numpy as np
import pytest
import torch

from m1local.sums import halved_sum


def by_hand(terms: list[np.float32]) -> np.float32:
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        rest = terms[half:]
        terms = [a + b for a, b in zip(terms, rest, strict=False)] + terms[len(rest) : half]
    return terms[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 31, 32, 100, 128, 5120])
def test_halves_are_added_until_one_is_left(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(3, count, generator=generator) ** 5
    kept = values.clone()
    found = halved_sum(values)
    assert found.shape == (3, 1)
    assert found[:, 0].tolist() == [float(by_hand(list(row))) for row in values.numpy()]
    assert torch.equal(values, kept)
