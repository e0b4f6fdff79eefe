"""Attention by torch's operators in parts, as cards without Triton need it, against the whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m1local import grouped
from m1local.grouped import attend, attend_in_parts, queries_at_a_time


def laid_out_by_tokens(*args: Any, **rest: Any) -> Tensor:
    """Torch's operator, its result as that of cards' thrifty kernel lies."""
    found = functional.scaled_dot_product_attention(*args, **rest)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("scores", [1, 300, 1 << 22])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "keys", "window"),
    [(6, 2, 11, 30, 7), (4, 4, 5, 5, None), (5, 1, 1, 40, 9), (8, 2, 33, 70, 1), (3, 3, 7, 20, 64)],
)
def test_parts_are_the_whole(
    heads: int, kv_heads: int, tokens: int, keys: int, window: int | None, scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(grouped, "SCORES", scores)
    generator = torch.Generator().manual_seed(heads + keys)
    q = torch.randn(2, heads, tokens, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, keys, 16, generator=generator, dtype=torch.float64)
    places = torch.randperm(keys, generator=generator)  # as they lie in a ring
    queries = torch.arange(keys - tokens, keys)
    wanted = attend(q, k, v, queries, places, window)
    operators = SimpleNamespace(scaled_dot_product_attention=laid_out_by_tokens)
    monkeypatch.setattr(grouped, "functional", operators)
    torch.testing.assert_close(attend_in_parts(q, k, v, queries, places, window), wanted)


def test_few_scores_are_kept_at_a_time() -> None:
    assert queries_at_a_time(20, 8192) * 20 * 8192 <= grouped.SCORES
    assert queries_at_a_time(20, 8192) == 25
    assert queries_at_a_time(40, 1 << 20) == 1
