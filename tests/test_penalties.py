"""DRY over long repetitions; what the penalties do besides is in test_sampling.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from m1local import penalties
from m1local.sampling import Sampler, SamplingParams


def test_a_long_repetition_ends_in_no_overflow() -> None:
    params = SamplingParams(temperature=0, dry_multiplier=1, dry_base=100)
    sampler = Sampler(params, 4)
    sampler.observe([1, 2] * 3000)
    assert sampler(torch.tensor([0.0, 9.0, 0.0, 1.0])) == 3


class Counted(np.ndarray):
    """Token ids that count how often they are looked at."""

    looked = 0

    def __getitem__(self, key: Any) -> Any:
        Counted.looked += 1
        return super().__getitem__(key)


@pytest.mark.parametrize(("base", "greatest"), [(1.75, 0.8 * math.exp(80)), (1.0, 0.8)])
def test_a_long_repetition_is_not_followed_to_its_end(base: float, greatest: float) -> None:
    token_ids = np.full(9000, 7).view(Counted)
    Counted.looked = 0
    found = penalties.dry(token_ids, frozenset(), multiplier=0.8, base=base, allowed_length=2)
    assert found == {7: pytest.approx(greatest)}
    assert Counted.looked < 1000
