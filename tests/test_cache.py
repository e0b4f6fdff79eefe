"""Proves that the cache changes nothing but the speed.

Whatever is fed, rolled back, remembered or interrupted, the logits are those of a fresh pass over
the tokens that are left; and the cache is no larger than it must be.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import Mock

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


def started(length: int, *, window: int = 8, max_chunk: int = 6) -> tuple[M1Model, KVCache]:
    """A model and a cache that holds `text(length)`."""
    model = small_model(window)
    cache = allocate(model, max_chunk=max_chunk)
    feed(model, cache, text(length))
    return model, cache


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
        stop = start + draw.randint(1, cache.max_chunk)
        parts.append(feed(model, cache, token_ids[start:stop]))
    assert_same(torch.cat(parts), feed(model, None, token_ids))


@pytest.mark.parametrize("length", [5, 20, 80], ids=["before", "as", "long after the ring wraps"])
@pytest.mark.parametrize("taken_back", [0, 1, 2, 6])
def test_a_few_tokens_can_always_be_taken_back(length: int, taken_back: int) -> None:
    model, cache = started(length)
    left = max(0, length - taken_back)
    assert cache.can_rollback(left)
    cache.rollback(left)
    assert cache.position == left
    assert_goes_on_as_fresh(model, cache, text(length)[:left])


def test_a_rollback_may_go_to_a_remembered_boundary_beyond_the_raw_tail() -> None:
    model, cache = started(20, window=CAPACITY)  # no ring, so that only the raw state decides
    cache.remember(18)
    feed(model, cache, text(60, seed=1))
    assert not cache.can_rollback(19)
    cache.rollback(18)
    assert_goes_on_as_fresh(model, cache, text(20)[:18])


def test_a_rollback_to_a_boundary_survives_the_wrap_of_the_ring() -> None:
    model, cache = started(50, window=20, max_chunk=30)  # a ring of 49 slots
    cache.remember(50)
    feed(model, cache, text(29, seed=1))
    assert not cache.can_rollback(51), "the raw state of 50 was neither kept nor remembered"
    cache.rollback(50)
    assert_goes_on_as_fresh(model, cache, text(50))


def test_a_boundary_whose_window_was_overwritten_is_refused() -> None:
    model, cache = started(10)
    cache.remember(10)
    feed(model, cache, text(40, seed=1))
    assert not cache.can_rollback(10)
    with pytest.raises(ValueError, match="cannot roll back from 50 to 10"):
        cache.rollback(10)
    assert cache.position == 50
    assert_goes_on_as_fresh(model, cache, text(10) + text(40, seed=1))


@pytest.mark.parametrize("position", [-1, 13])
def test_a_rollback_outside_the_sequence_is_refused(position: int) -> None:
    _, cache = started(12)
    assert not cache.can_rollback(position)
    with pytest.raises(ValueError, match="cannot roll back from 12"):
        cache.rollback(position)


def test_after_a_deep_rollback_the_new_tokens_can_be_taken_back_too() -> None:
    model, cache = started(20, window=CAPACITY)
    cache.remember(20)
    feed(model, cache, text(60, seed=1))
    cache.rollback(20)
    feed(model, cache, text(10, seed=2))
    assert cache.can_rollback(30), "where the sequence stands, it can always end"
    cache.rollback(25)
    assert_goes_on_as_fresh(model, cache, text(20) + text(10, seed=2)[:5])


def test_a_position_whose_raw_state_is_gone_cannot_be_remembered() -> None:
    model, cache = started(20, window=CAPACITY)
    cache.remember(20)
    feed(model, cache, text(30, seed=1))
    cache.rollback(20)
    # Position 11 is among the last sixteen, but the tokens rolled back took its place.
    with pytest.raises(ValueError, match="11"):
        cache.remember(11)
    with pytest.raises(ValueError, match="-3"):
        cache.remember(-3)
    cache.remember(20)


@contextmanager
def interrupted(module: nn.Module) -> Iterator[None]:
    """Expect KeyboardInterrupt, which `module` raises when it is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "forward", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            yield


# Where an interrupt leaves some layers ahead of others, and where all layers are ahead of the ids.
PLACES = (
    "model.layers.0.self_attn.W_pack",
    "model.layers.0.mlp",
    "model.layers.1.self_attn.o_proj",
    "model.layers.2.mlp",
    "lm_head",
)


def read(context: Context, prompt: Sequence[int]) -> Tensor:
    """The last logits (V,) of `prompt`, reusing what the context holds."""
    for start in range(context.keep_common(prompt), len(prompt), context.cache.max_chunk):
        logits = context.feed(prompt[start : start + context.cache.max_chunk])
    return logits


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("max_chunk", [1, 6, 24], ids=["decode", "short", "longer than the tail"])
@pytest.mark.parametrize("held", [0, 5, 40])
def test_a_context_goes_on_exactly_after_an_interrupted_pass(
    place: str, max_chunk: int, held: int
) -> None:
    model = small_model()
    context = Context(model, allocate(model, max_chunk=max_chunk))
    prompt = text(held + max_chunk + 3)
    if held:
        read(context, prompt[:held])
        context.cache.remember(held)
    with interrupted(model.get_submodule(place)):
        context.feed(prompt[held : held + max_chunk])
    assert context.keep_common(prompt) == held, "what was whole before must not be read again"
    assert_same(read(context, prompt), feed(model, None, prompt)[-1])
    assert context.token_ids == prompt


def test_without_a_boundary_an_interrupted_long_chunk_costs_reading_again_but_no_error() -> None:
    model = small_model()
    context = Context(model, allocate(model, max_chunk=24))
    prompt = text(60)
    read(context, prompt[:30])
    with interrupted(model.get_submodule("model.layers.1.mlp")):
        context.feed(prompt[30:54])
    assert context.keep_common(prompt) == 0  # layer 0 lost the raw state of token 29
    assert_same(read(context, prompt), feed(model, None, prompt)[-1])


def test_edited_prompts_give_the_logits_of_fresh_ones() -> None:
    model = small_model(window=24)
    context = Context(model, allocate(model, max_chunk=9))
    draw = random.Random(4)
    prompt = text(30)
    reused = 0
    for turn in range(40):
        kept = draw.randint(0, len(prompt)) if draw.random() < 0.3 else len(prompt)
        prompt = prompt[: min(kept, CAPACITY - 20)] + text(draw.randint(1, 12), seed=turn)
        reused += context.keep_common(prompt)
        assert_same(read(context, prompt), feed(model, None, prompt)[-1])
        context.cache.remember(len(prompt) - 1)
        for token_id in text(draw.randint(0, 8), seed=100 + turn):  # the answer
            context.feed([token_id])
            prompt.append(token_id)
    assert reused > 20 * 40, "a cache that is hardly ever reused proves nothing"


def test_a_prompt_that_is_wholly_held_is_left_its_last_token() -> None:
    model = small_model()
    context = Context(model, allocate(model))
    prompt = text(12)
    first = read(context, prompt)
    assert context.keep_common(prompt) == 11
    assert_same(read(context, prompt), first)


@pytest.mark.parametrize(
    ("new_tokens", "error"), [(3, ContextLengthError), (7, ValueError)], ids=["capacity", "chunk"]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    new_tokens: int, error: type[Exception]
) -> None:
    model, cache = started(CAPACITY - 2)
    buffers = [
        buffer for at in cache.layers for buffer in (at.k.values, at.v.values, at.raw_k, at.raw_v)
    ]
    before = [buffer.clone() for buffer in buffers]
    with pytest.raises(error, match=r"88 \+ 3 tokens exceed 90|chunk of 7 tokens"):
        model(torch.tensor([text(new_tokens)]), cache)
    torch.testing.assert_close(buffers, before, rtol=0, atol=0)
    assert cache.position == CAPACITY - 2
    expected = feed(model, None, [*text(CAPACITY - 2), 1, 2])[-2:]
    assert_same(feed(model, cache, [1, 2]), expected)


@pytest.mark.parametrize("max_length", [0, CAPACITY + 1])
def test_a_cache_the_model_was_not_made_for_is_refused(max_length: int) -> None:
    with pytest.raises(ContextLengthError, match="--ctx-size"):
        allocate(small_model(), capacity=max_length)


@pytest.mark.parametrize("window", [1, 8, 200])
@pytest.mark.parametrize("max_chunk", [1, 6, 500])
def test_a_ring_holds_its_window_and_one_chunk_and_no_more(window: int, max_chunk: int) -> None:
    cache = allocate(small_model(window), max_chunk=max_chunk)
    ring, line, _ = cache.layers
    assert ring.slots == ring.k.values.shape[2] == ring.v.values.shape[2]
    assert ring.slots <= window - 1 + max_chunk
    assert ring.slots <= line.slots == line.k.values.shape[2] == CAPACITY


REAL = TINY | {
    "vocab_size": 133120,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 20,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 40,
    "num_swa_key_value_heads": 8,
    "sliding_window": 8192,
    "sliding_window_layers": list(range(1, 40, 2)),
    "max_position_embeddings": 32768,
}


@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
def test_the_14b_cache_takes_the_bytes_its_architecture_asks_for(tokens: int) -> None:
    chunk = 512
    cache = KVCache.allocate(
        M1Config.from_dict(REAL), tokens, dtype=torch.bfloat16, device="meta", max_chunk=chunk
    )
    # Two bytes, keys and values: 20 global layers of 2 heads of 256, 20 sliding ones of 8 of 128.
    least = 40_960 * tokens + 81_920 * min(tokens, 8192)
    # On top: the rings' room for a chunk, and sixteen raw positions where one is the least.
    room_for_chunk = 81_920 * (min(tokens, 8191 + chunk) - min(tokens, 8192))
    assert cache.nbytes == least + room_for_chunk + 122_880 * RAW_TOKENS
    cache.remember(0)
    assert cache.nbytes == least + room_for_chunk + 122_880 * (RAW_TOKENS + 1)


@dataclass
class Walk:
    """A random walk: what its cache must hold, and what happened on the way."""

    model: M1Model
    cache: KVCache
    draw: random.Random
    held: list[int] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)


def walk_feed(walk: Walk) -> None:
    room = min(walk.cache.max_chunk, walk.cache.capacity - len(walk.held))
    new = walk.draw.choices(range(VOCABULARY), k=walk.draw.randint(min(1, room), room))
    if new:
        logits = feed(walk.model, walk.cache, new)
        walk.held += new
        assert_same(logits, feed(walk.model, None, walk.held)[-len(new) :])


def walk_rollback(walk: Walk) -> None:
    possible = [at for at in range(len(walk.held) + 1) if walk.cache.can_rollback(at)]
    assert possible[-1] == len(walk.held)
    asked = walk.draw.randint(0, len(walk.held))
    assert walk.cache.nearest_boundary(asked) == max(at for at in possible if at <= asked)
    refused = sorted(set(range(len(walk.held))) - set(possible))
    if refused:
        with pytest.raises(ValueError, match="cannot roll back"):
            walk.cache.rollback(walk.draw.choice(refused))
    # Not to 0, which is always possible: a walk that starts anew all the time wraps no ring.
    far = walk.draw.random() < 0.3
    to = walk.draw.choice((possible[1:4] if far else possible[-4:]) or possible)
    walk.happened["far"] += 0 < to < len(walk.held) - RAW_TOKENS
    walk.happened["wrapped"] += len(walk.held) > walk.cache.layers[0].slots
    walk.cache.rollback(to)
    del walk.held[to:]


def walk_remember(walk: Walk) -> None:
    position = max(0, len(walk.held) - walk.draw.choice([0, 0, 1, 5, 15]))
    try:
        walk.cache.remember(position)
    except ValueError:
        assert not walk.cache.can_rollback(position)


def walk_interrupt(walk: Walk) -> None:
    new = text(walk.draw.randint(1, walk.cache.max_chunk))
    if len(walk.held) + len(new) <= walk.cache.capacity:
        with interrupted(walk.model.get_submodule(walk.draw.choice(PLACES[:-1]))):
            feed(walk.model, walk.cache, new)
        kept = walk.cache.nearest_boundary(len(walk.held))
        walk.cache.rollback(kept)
        del walk.held[kept:]


@pytest.mark.parametrize(
    ("window", "max_chunk"), [(1, 1), (1, 5), (3, 4), (8, 1), (8, 20), (20, 30), (50, 18), (90, 6)]
)
def test_a_random_walk_always_gives_the_logits_of_a_fresh_pass(window: int, max_chunk: int) -> None:
    model = small_model(window)
    walk = Walk(
        model, allocate(model, max_chunk=max_chunk), random.Random(100 * window + max_chunk)
    )
    steps = (walk_feed, walk_rollback, walk_remember, walk_interrupt)
    for _ in range(300):
        (step,) = walk.draw.choices(steps, weights=(10, 4, 3, 1))
        step(walk)
        assert walk.cache.position == len(walk.held)
    # It must have gone where it hurts: back past the wrap of the ring, or far back without one.
    assert walk.happened["wrapped" if walk.cache.layers[0].slots < CAPACITY else "far"] > 5
