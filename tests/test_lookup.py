"""Prompt lookup: an answer is the same with it and without (what is proposed: test_proposals.py).

In float32, where a token read together with others differs from one read alone by about 1e-6 of a
logit; none of these texts has two tokens that are as close as that.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from m1local import lookup
from m1local.cache import KVCache
from m1local.chat import ChatSession, Overflow
from m1local.checkpoint import load_model
from m1local.context import Context
from m1local.engine import Engine
from m1local.generate import (
    Event,
    Finished,
    FinishReason,
    GenerationSettings,
    TextDelta,
    generate,
)
from m1local.generation_config import GenerationConfig
from m1local.home import DEMO
from m1local.lookup import LookAhead, Pace
from m1local.native import library
from m1local.sampling import SamplingParams
from m1local.tokenizer import M1Tokenizer
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe

PROMPT = "The heart pumps blood. The heart pumps blood through the body. The heart pumps"
GREEDY = SamplingParams(temperature=0)
PENALIZED = SamplingParams(
    temperature=0, repetition_penalty=1.05, frequency_penalty=0.05, dry_multiplier=0.3
)
DRAWN = SamplingParams(temperature=0.7, top_k=20, repetition_penalty=1.05, seed=5)
# Only three tokens come, so an answer repeats itself whatever a random model thinks.
FEW = tuple((token_id, 50.0) for token_id in (50, 51, 52))
REPEATING = SamplingParams(temperature=0, logit_bias=FEW)
SAMPLINGS = {
    "greedy": GREEDY,
    "penalized": PENALIZED,
    "drawn": DRAWN,
    "repeating": REPEATING,
    "repeating, drawn": SamplingParams(temperature=0.7, logit_bias=FEW, seed=6),
}


@pytest.fixture(scope="module")
def new_engine(tiny_checkpoint: Path) -> Callable[..., Engine]:
    """Makes engines that share a model whose window of 8 tokens any text outgrows."""
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    tokenizer = M1Tokenizer.from_folder(tiny_checkpoint)
    generation = GenerationConfig.from_folder(tiny_checkpoint)

    def make(context_tokens: int = 256, max_chunk: int = 8) -> Engine:
        cache = KVCache.allocate(
            model.config, context_tokens, dtype=torch.float32, max_chunk=max_chunk
        )
        return Engine(model, tokenizer, generation, Context(model, cache))

    return make


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Propose whatever there is: with models this small it seldom pays."""
    monkeypatch.setattr(LookAhead, "pace", AlwaysPays)


class AlwaysPays(Pace):
    def __init__(self) -> None:
        super().__init__()
        self.passed(1)

    @property
    def pays(self) -> bool:
        return True


class PaysAtRandom(Pace):
    def __init__(self) -> None:
        super().__init__()
        self.passed(1)
        self._draw = random.Random(0)

    @property
    def pays(self) -> bool:
        return self._draw.random() < 0.5


def settings(
    max_new_tokens: int = 60, *, sampling: SamplingParams = GREEDY, **more: object
) -> GenerationSettings:
    return GenerationSettings(sampling=sampling, max_new_tokens=max_new_tokens, **more)  # type: ignore[arg-type]  # as given below


def ids_of(events: Iterable[Event]) -> list[int]:
    return [i for event in events if isinstance(event, TextDelta) for i in event.token_ids]


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


@dataclass(frozen=True)
class Answered:
    """An answer, and what the context then is."""

    deltas: list[TextDelta]
    end: Finished
    held: list[int]
    logits: torch.Tensor | None  # after one more token, if there is room


# What lookup has no part in is computed once.
_WITHOUT: dict[tuple[Callable[..., Engine], str, int, int, str], Answered] = {}


def answer(engine: Engine, prompt: str, chosen: GenerationSettings) -> Answered:
    events = list(engine.complete(prompt, chosen))
    held = list(engine.context.token_ids)
    return Answered(
        [event for event in events if isinstance(event, TextDelta)],
        end_of(events),
        held,
        engine.context.feed([9]) if engine.context.room else None,
    )


def both(
    new_engine: Callable[..., Engine],
    prompt: str,
    *,
    context_tokens: int = 256,
    max_chunk: int = 8,
    **chosen: object,
) -> Finished:
    """Answer with and without: the same tokens, deltas, end and context; returns the end with."""
    how = prompt, context_tokens, max_chunk, repr(chosen)
    if (new_engine, *how) not in _WITHOUT:
        _WITHOUT[new_engine, *how] = answer(
            new_engine(context_tokens, max_chunk),
            prompt,
            settings(lookup=False, **chosen),  # type: ignore[arg-type]  # as above
        )
    without = _WITHOUT[new_engine, *how]
    with_it = answer(
        new_engine(context_tokens, max_chunk),
        prompt,
        settings(lookup=True, **chosen),  # type: ignore[arg-type]  # as above
    )
    assert without.deltas == with_it.deltas
    assert without.held == with_it.held
    for name in ("reason", "new_tokens"):
        assert getattr(without.end, name) == getattr(with_it.end, name)
    assert without.end.looked_up_tokens == 0
    if without.logits is not None:  # what was rolled back is as in a run that never went ahead
        torch.testing.assert_close(with_it.logits, without.logits, rtol=0, atol=2e-5)
    return with_it.end


@pytest.mark.parametrize("pace", [AlwaysPays, PaysAtRandom, Pace])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_tokens_are_the_same(
    new_engine: Callable[..., Engine],
    sampling: SamplingParams,
    pace: type[Pace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LookAhead, "pace", pace)
    for prompt in (
        PROMPT,
        "a b a b a b a",
        "What is glaucoma? It is a disease",
        "高血压是一种高血压",
    ):
        for max_chunk in (2, 8, 64):
            both(new_engine, prompt, max_chunk=max_chunk, sampling=sampling, max_new_tokens=120)


def test_a_text_that_repeats_itself_is_read_in_fewer_passes(
    new_engine: Callable[..., Engine],
) -> None:
    end = both(new_engine, PROMPT, sampling=REPEATING, max_new_tokens=150, loop_guard=False)
    assert end.looked_up_tokens > end.new_tokens // 3


@pytest.mark.parametrize("seed", range(8))
def test_other_seeds_too(new_engine: Callable[..., Engine], seed: int) -> None:
    sampling = SamplingParams(temperature=0.3, top_p=0.9, min_p=0.05, seed=seed)
    both(new_engine, PROMPT, sampling=sampling, max_new_tokens=100)


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 3, 5, 30, 31, 32, 33])
def test_the_limit_is_where_it_was(new_engine: Callable[..., Engine], max_new_tokens: int) -> None:
    end = both(
        new_engine, PROMPT, sampling=REPEATING, max_new_tokens=max_new_tokens, loop_guard=False
    )
    assert end.reason is FinishReason.LENGTH


@pytest.mark.parametrize("more", [1, 2, 3, 4, 5, 6, 20, 21, 22, 23])
def test_a_full_context_ends_it_at_the_same_place(
    new_engine: Callable[..., Engine], more: int
) -> None:
    room = len(new_engine().tokenizer.encode(PROMPT)) + more
    end = both(
        new_engine, PROMPT, sampling=REPEATING,
        context_tokens=room, max_new_tokens=200, loop_guard=False,
    )  # fmt: skip
    assert end.reason is FinishReason.CONTEXT
    assert end.new_tokens == more + 1  # the last needs no room: it is never fed


def test_stops_and_the_loop_guard_end_it_at_the_same_place(
    new_engine: Callable[..., Engine],
) -> None:
    chosen = settings(60, sampling=REPEATING, loop_guard=False)
    free = list(new_engine().complete(PROMPT, chosen))
    text = "".join(event.text for event in free if isinstance(event, TextDelta))
    ids = ids_of(free)
    for at in (5, 9, 14, 20):
        end = both(new_engine, PROMPT, sampling=REPEATING, stop_token_ids=frozenset({ids[at]}))
        assert end.reason is FinishReason.STOP
    for at in (len(text) // 3, len(text) // 2):
        end = both(new_engine, PROMPT, sampling=REPEATING, stop=(text[at : at + 4],))
        assert end.reason is FinishReason.STOP
    end = both(new_engine, PROMPT, sampling=REPEATING, max_new_tokens=200)
    assert end.reason is FinishReason.LOOP


def test_json_is_the_same(new_engine: Callable[..., Engine]) -> None:
    pytest.importorskip("llguidance", reason="the extra json")
    schema = '{"type": "array", "items": {"enum": ["ab", "cd"]}, "minItems": 12, "maxItems": 12}'
    for sampling in (GREEDY, SamplingParams(temperature=1.0, seed=3)):
        end = both(
            new_engine, PROMPT, sampling=sampling, json_schema=schema, max_new_tokens=100,
            loop_guard=False, stop_token_ids=frozenset({2}),
        )  # fmt: skip
        assert end.looked_up_tokens > 0


@pytest.mark.parametrize("events_before_closing", [3, 9, 14, 25, 40])
def test_a_stream_that_was_closed_leaves_what_was_drawn(
    new_engine: Callable[..., Engine], events_before_closing: int
) -> None:
    engine = new_engine()
    stream = engine.complete(PROMPT, settings(100, sampling=REPEATING, loop_guard=False))
    drawn = ids_of(islice(stream, events_before_closing))
    stream.close()  # type: ignore[attr-defined]  # it is a generator, which its type leaves open
    prompt = engine.tokenizer.encode(PROMPT)
    assert engine.context.token_ids == [*prompt, *drawn][: len(engine.context.token_ids)]
    assert engine.context.cache.position == len(engine.context.token_ids)
    again = ids_of(engine.complete("heart", settings(20)))
    assert again == ids_of(new_engine().complete("heart", settings(20)))


def test_after_a_pass_that_broke_off_the_next_answer_is_that_of_a_fresh_engine(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, passes = new_engine(), []
    whole = engine.context.feed_all

    def interrupted(token_ids: list[int]) -> torch.Tensor:
        passes.append(len(token_ids))
        if len(passes) == 4:
            with monkeypatch.context() as patch:
                patch.setattr(engine.model.lm_head, "forward", None)
                return whole(token_ids)
        return whole(token_ids)

    monkeypatch.setattr(engine.context, "feed_all", interrupted)
    with pytest.raises(TypeError):
        list(engine.complete(PROMPT, settings(100, sampling=REPEATING, loop_guard=False)))
    monkeypatch.undo()
    again = ids_of(engine.complete(PROMPT, settings(40)))
    assert again == ids_of(new_engine().complete(PROMPT, settings(40)))


@pytest.mark.parametrize(("context_tokens", "max_chunk"), [(50, 8), (51, 3), (52, 2), (53, 1)])
def test_no_more_is_fed_than_fits_and_than_can_be_taken_back(
    new_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    context_tokens: int,
    max_chunk: int,
) -> None:
    engine, sizes = new_engine(context_tokens, max_chunk), []
    context = engine.context
    feed_all = context.feed_all

    def counted(token_ids: list[int]) -> torch.Tensor:
        assert len(token_ids) <= min(context.room, max_chunk, 1 + lookup.MOST)
        sizes.append(len(token_ids))
        return feed_all(token_ids)

    monkeypatch.setattr(context, "feed_all", counted)
    list(engine.complete(PROMPT, settings(200, sampling=REPEATING, loop_guard=False)))
    assert set(sizes) <= {2, 3, 4}
    assert bool(sizes) == (max_chunk > 1)


@pytest.mark.parametrize("overflow", [Overflow.ROLLING, Overflow.TRUNCATE_MIDDLE])
def test_a_conversation_that_outgrows_its_context_goes_on_the_same(
    new_engine: Callable[..., Engine], overflow: Overflow
) -> None:
    said = []
    for on in (False, True):
        session = ChatSession(
            new_engine(90),
            settings=settings(30, sampling=REPEATING, lookup=on, loop_guard=False),
            overflow=overflow,
        )
        events = [
            event
            for question in ("heart heart heart", "blood blood", "The heart", "heart heart heart")
            for event in session.send(question)
            if not isinstance(event, Finished)
        ]
        said.append((events, session.context.token_ids))
    assert said[0] == said[1]


def test_where_a_decoder_serves_nothing_is_proposed(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()

    class Single:
        """Feeds as the model does, and one token only."""

        reason = "there is no card"

        def feed(self, token_id: int) -> torch.Tensor:
            batch = torch.tensor([[token_id]])
            found: torch.Tensor = engine.model(batch, context.cache, last_only=True)[0, -1]
            return found

        def forget_ahead(self) -> None:
            pass

        def sampler(self, params: SamplingParams, vocab_size: int) -> None:
            pass

    context = Context(engine.model, engine.context.cache, lambda cache: Single())
    prompt = engine.tokenizer.encode(PROMPT)
    events = list(generate(context, engine.tokenizer, prompt, settings(60, loop_guard=False)))
    assert end_of(events).looked_up_tokens == 0
    assert ids_of(events) == ids_of(new_engine().complete(PROMPT, settings(60, loop_guard=False)))


def test_the_demo_says_the_same_and_repeats_what_it_was_told() -> None:
    model = load_model(DEMO, dtype=torch.float32)
    tokenizer = M1Tokenizer.from_folder(DEMO)
    text = "Glaucoma is a disease of the eye. Gout is a disease of the joints."
    said = []
    for on in (False, True):
        cache = KVCache.allocate(model.config, 400, dtype=torch.float32)
        prompt = tokenizer.encode(f"{text}\n{text}\n{text}\nGlaucoma is")
        events = list(generate(Context(model, cache), tokenizer, prompt, settings(60, lookup=on)))
        said.append(ids_of(events))
    assert said[0] == said[1]
    assert end_of(events).looked_up_tokens > 0


@pytest.mark.skipif(library.library() is None, reason=library.status().text)
def test_a_quantized_model_reads_a_proposal_to_the_same_bits(tmp_path: Path) -> None:
    for _ in quantize_checkpoint(DEMO, tmp_path / "int4", Recipe.find("int4")):
        pass
    contexts = [Engine.load(tmp_path / "int4", context_tokens=256).context for _ in range(2)]
    token_ids = random.Random(0).choices(range(300, 1000), k=120)
    for context in contexts:
        context.feed(token_ids[:60])
    for at in range(60, 120, 1 + lookup.MOST):
        chunk = token_ids[at : at + 1 + lookup.MOST]
        alone = torch.stack([contexts[0].feed([token_id]) for token_id in chunk])
        assert torch.equal(contexts[1].feed_all(chunk), alone)
