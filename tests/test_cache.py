"""Proves that the cache changes nothing but the speed.

Whatever is fed, rolled back, remembered or interrupted, the logits are those of a fresh pass over
the tokens that are left; and the cache is no larger than it must be.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from m1local.cache import RAW_TOKENS, KVCache
from m1local.config import M1Config
from m1local.context import Context
from m1local.errors import ContextLengthError
from m1local.model import M1Model
from tests.conftest import TINY, random_model

VOCABULARY = 64
CAPACITY = 90  # more than ten of the windows below


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Matrices this small gain nothing from a second thread, and lose much beside a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(window: int = 8) -> M1Model:
    """A global layer between two sliding ones."""
    raw = TINY | {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "sliding_window": window,
        "sliding_window_layers": [0, 2],
        "max_position_embeddings": CAPACITY,
    }
    return random_model(M1Config.from_dict(raw))


def allocate(model: M1Model, *, max_chunk: int = 6, capacity: int = CAPACITY) -> KVCache:
    """An empty float32 cache."""
    return KVCache.allocate(model.config, capacity, dtype=torch.float32, max_chunk=max_chunk)


def text(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def feed(model: M1Model, cache: KVCache | None, token_ids: Sequence[int]) -> Tensor:
    """Logits (T, V) of `token_ids`, fed in chunks as large as the cache takes."""
    step = cache.max_chunk if cache is not None else len(token_ids)
    chunks = [list(token_ids[start : start + step]) for start in range(0, len(token_ids), step)]
    return torch.cat([model(torch.tensor([chunk]), cache)[0] for chunk in chunks])


def assert_same(logits: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding."""
    # The same sums over other slices of memory, so in another order: 1e-6 of logits within ±4.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def assert_goes_on_as_fresh(model: M1Model, cache: KVCache, held: Sequence[int]) -> None:
    """What is fed after `held` gives the logits of a pass that never saw anything else."""
    more = text(cache.max_chunk + 2, seed=99)
    logits = feed(model, cache, more)
    assert_same(logits, feed(model, None, [*held, *more])[len(held) :])


@pytest.mark.parametrize("seed", range(12))
def test_any_chunking_gives_the_logits_of_one_pass(seed: int) -> None:
    draw = random.Random(seed)
    model = small_model(window=draw.randint(1, 9))
    cache = allocate(model, max_chunk=draw.randint(1, 12))
    token_ids = text(CAPACITY, seed)
    parts: list[Tensor] = []
    while (start := cache.position) < CAPACITY:
        parts.append(
            feed(model, cache, token_ids[start : start + draw.randint(1, cache.max_chunk)])
        )
    assert_same(torch.cat(parts), feed(model, None, token_ids))


@pytest.mark.parametrize("length", [5, 20, 80], ids=["before", "as", "long after the ring wraps"])
@pytest.mark.parametrize("taken_back", [0, 1, 2, 6])
def test_a_few_tokens_can_always_be_taken_back(length: int, taken_back: int) -> None:
    model = small_model()
    cache = allocate(model)
    feed(model, cache, text(length))
    left = max(0, length - taken_back)
    assert cache.can_rollback(left)
    cache.rollback(left)
    assert cache.position == left
    assert_goes_on_as_fresh(model, cache, text(length)[:left])


def test_a_rollback_may_go_to_a_remembered_boundary_beyond_the_raw_tail() -> None:
    model = small_model(window=CAPACITY)  # no ring, so that only the raw state decides
    cache = allocate(model)
    feed(model, cache, text(20))
    cache.remember(18)
    feed(model, cache, text(60, seed=1))
    assert not cache.can_rollback(19)
    cache.rollback(18)
    assert_goes_on_as_fresh(model, cache, text(20)[:18])


def test_a_rollback_to_a_boundary_survives_the_wrap_of_the_ring() -> None:
    model = small_model(window=20)
    cache = allocate(model, max_chunk=30)  # a ring of 49 slots
    feed(model, cache, text(60))
    cache.remember(60)
    feed(model, cache, text(29, seed=1))
    assert not cache.can_rollback(61), "the raw state of 60 was neither kept nor remembered"
    cache.rollback(60)
    assert_goes_on_as_fresh(model, cache, text(60)[:60])


def test_a_boundary_whose_window_was_overwritten_is_refused() -> None:
    model = small_model(window=8)
    cache = allocate(model)
    feed(model, cache, text(10))
    cache.remember(10)
    feed(model, cache, text(40, seed=1))
    assert not cache.can_rollback(10)
    with pytest.raises(ValueError, match="cannot roll back from 50 to 10"):
        cache.rollback(10)
    assert cache.position == 50
    assert_goes_on_as_fresh(model, cache, text(10) + text(40, seed=1))


@pytest.mark.parametrize("position", [-1, 13])
def test_a_rollback_outside_the_sequence_is_refused(position: int) -> None:
    model = small_model()
    cache = allocate(model)
    feed(model, cache, text(12))
    assert not cache.can_rollback(position)
    with pytest.raises(ValueError, match="cannot roll back from 12"):
        cache.rollback(position)


def test_after_a_deep_rollback_the_new_tokens_can_be_taken_back_too() -> None:
    model = small_model(window=CAPACITY)
    cache = allocate(model)
    feed(model, cache, text(20))
    cache.remember(20)
    feed(model, cache, text(60, seed=1))
    cache.rollback(20)
    feed(model, cache, text(10, seed=2))
    assert cache.can_rollback(30), "where the sequence stands, it can always end"
    assert cache.can_rollback(25)
    cache.rollback(25)
    assert_goes_on_as_fresh(model, cache, text(20) + text(10, seed=2)[:5])


def test_a_position_whose_raw_state_is_gone_cannot_be_remembered() -> None:
    model = small_model(window=CAPACITY)
    cache = allocate(model)
    feed(model, cache, text(20))
    cache.remember(20)
    feed(model, cache, text(30, seed=1))
    cache.rollback(20)
    # Position 11 is among the last sixteen, but the tokens rolled back took its place.
    with pytest.raises(ValueError, match="11"):
        cache.remember(11)
    with pytest.raises(ValueError, match="-3"):
        cache.remember(-3)
    cache.remember(20)


def test_an_empty_cache_and_a_reset_one_start_a_sequence() -> None:
    model = small_model()
    cache = allocate(model)
    feed(model, cache, text(50))
    cache.remember(50)
    cache.reset()
    assert cache.position == 0
    assert_goes_on_as_fresh(model, cache, [])
    assert not cache.can_rollback(50)


def interrupt(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> Callable[[], None]:
    """Make `module` raise KeyboardInterrupt when it is called; returns the undoing."""

    def raise_interrupt(*args: object) -> NoReturn:
        raise KeyboardInterrupt

    with_patch = monkeypatch.context()
    with_patch.__enter__().setattr(module, "forward", raise_interrupt)
    return lambda: with_patch.__exit__(None, None, None)
