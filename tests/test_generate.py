"""Generation and chat: the order of events, every way to end, and going on after any interruption.

Everything that was cut off, reused or shared is compared with an engine that never saw it. Greedy
and in float32, where the same tokens fed in other chunks differ by about 1e-6 of a logit.
"""

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m1local.cache import KVCache
from m1local.chat import ChatSession
from m1local.checkpoint import load_model
from m1local.context import Context
from m1local.engine import Engine
from m1local.errors import ContextLengthError, M1Error
from m1local.generate import (
    Event,
    Finished,
    FinishReason,
    GenerationSettings,
    PrefillProgress,
    TextDelta,
    generate,
)
from m1local.generation_config import GenerationConfig
from m1local.sampling import SamplingParams
from m1local.tokenizer import M1Tokenizer, Message
from tests.damage import refused

GREEDY = SamplingParams(temperature=0)
PROMPT = "What is glaucoma? It is a disease of the eye."
MAX_CHUNK = 8  # so that prompts take several


@pytest.fixture(scope="module")
def new_engine(tiny_checkpoint: Path) -> Callable[..., Engine]:
    """Makes engines that share a model; each has a context of its own that has seen nothing."""
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    tokenizer = M1Tokenizer.from_folder(tiny_checkpoint)
    generation = GenerationConfig.from_folder(tiny_checkpoint)

    def make(context_tokens: int = 256, max_chunk: int = MAX_CHUNK) -> Engine:
        cache = KVCache.allocate(
            model.config, context_tokens, dtype=torch.float32, max_chunk=max_chunk
        )
        return Engine(model, tokenizer, generation, Context(model, cache))

    return make


@pytest.fixture
def engine(new_engine: Callable[..., Engine]) -> Engine:
    return new_engine()


@pytest.fixture
def other_engine(new_engine: Callable[..., Engine]) -> Engine:
    return new_engine()


def settings(
    max_new_tokens: int = 16,
    *,
    stop: tuple[str, ...] = (),
    stop_token_ids: Iterable[int] = (),
    sampling: SamplingParams = GREEDY,
) -> GenerationSettings:
    return GenerationSettings(
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset(stop_token_ids),
        stop=stop,
    )


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def ids_of(events: Iterable[Event]) -> list[int]:
    return [i for event in events if isinstance(event, TextDelta) for i in event.token_ids]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_events_are_progress_then_text_then_the_end_exactly_once(engine: Engine) -> None:
    events = list(engine.complete(PROMPT, settings()))
    prompt = engine.tokenizer.encode(PROMPT)
    kinds = [type(event) for event in events]
    steps = -(-len(prompt) // MAX_CHUNK) + 1
    assert kinds[:steps] == [PrefillProgress] * steps
    assert set(kinds[steps:-1]) == {TextDelta}
    assert kinds[-1] is Finished
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [event.done_tokens for event in progress] == [*range(0, len(prompt), 8), len(prompt)]
    assert {event.total_tokens for event in progress} == {len(prompt)}


def test_the_end_counts_what_was_read_and_written(engine: Engine) -> None:
    events = list(engine.complete(PROMPT, settings(16)))
    end = finished(events)
    assert end.prompt_tokens == len(engine.tokenizer.encode(PROMPT))
    assert end.cached_tokens == 0
    assert end.new_tokens == len(ids_of(events)) == 16
    assert text_of(events) == engine.tokenizer.decode(ids_of(events))
    assert end.prefill_seconds > 0
    assert end.decode_seconds > 0
    assert end.tokens_per_second == pytest.approx(15 / end.decode_seconds)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_tokens_are_those_of_whole_passes_one_by_one(engine: Engine, penalty: float) -> None:
    token_ids = engine.tokenizer.encode(PROMPT)
    expected: list[int] = []
    for _ in range(16):
        seen = [*token_ids, *expected]
        logits = engine.model(torch.tensor([seen]))[0, -1].tolist()[: engine.tokenizer.vocab_size]
        for i in set(seen):  # prompt and answer
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        expected.append(logits.index(max(logits)))
    sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
    assert ids_of(engine.complete(PROMPT, settings(16, sampling=sampling))) == expected


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 7])
def test_as_many_tokens_are_made_as_were_asked_for(
    engine: Engine, other_engine: Engine, max_new_tokens: int
) -> None:
    events = list(engine.complete(PROMPT, settings(max_new_tokens)))
    assert finished(events).reason is FinishReason.LENGTH
    assert finished(events).new_tokens == max_new_tokens
    longer = ids_of(other_engine.complete(PROMPT, settings(16)))
    assert ids_of(events) == longer[:max_new_tokens]


def test_no_new_tokens_mean_no_speed(engine: Engine) -> None:
    assert finished(list(engine.complete(PROMPT, settings(0)))).tokens_per_second == 0


def test_a_stop_token_ends_the_answer_and_is_not_shown(
    engine: Engine, other_engine: Engine
) -> None:
    free = ids_of(other_engine.complete(PROMPT, settings(16)))
    stop = free[5]
    events = list(engine.complete(PROMPT, settings(16, stop_token_ids=[stop])))
    assert finished(events).reason is FinishReason.STOP
    assert ids_of(events) == free[: free.index(stop)]


def test_a_stop_string_ends_the_answer_before_it(engine: Engine, other_engine: Engine) -> None:
    free = text_of(other_engine.complete(PROMPT, settings(16)))
    middle = len(free) // 2
    stop = free[middle : middle + 3]
    events = list(engine.complete(PROMPT, settings(16, stop=("not there", stop))))
    assert finished(events).reason is FinishReason.STOP
    assert text_of(events) == free.partition(stop)[0]
    assert finished(events).new_tokens == len(ids_of(events)) < 16


def test_a_full_context_ends_the_answer(
    new_engine: Callable[..., Engine], other_engine: Engine
) -> None:
    prompt = other_engine.tokenizer.encode(PROMPT)
    small = new_engine(len(prompt) + 5)
    events = list(small.complete(PROMPT, settings(100)))
    assert finished(events).reason is FinishReason.CONTEXT
    # The last token needs no room: it is never fed.
    assert ids_of(events) == ids_of(other_engine.complete(PROMPT, settings(6)))
    again = list(small.complete("heart", settings(4)))
    assert ids_of(again) == ids_of(other_engine.complete("heart", settings(4)))


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(
    new_engine: Callable[..., Engine], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = engine.tokenizer.encode(PROMPT)
    small = new_engine(len(prompt))
    list(small.complete("heart", settings(2)))
    held = list(small.context.token_ids)
    monkeypatch.setattr(small.context, "feed", None)  # calling it would be a TypeError
    with pytest.raises(
        ContextLengthError,
        match=rf"prompt has {len(prompt)} tokens; .* begin a new .*, or .* --ctx-size .up to 256.",
    ):
        next(small.complete(PROMPT, settings()))
    assert small.context.token_ids == held


def test_a_prompt_that_leaves_room_for_one_token_is_answered(
    new_engine: Callable[..., Engine], engine: Engine
) -> None:
    small = new_engine(len(engine.tokenizer.encode(PROMPT)) + 1)
    end = finished(list(small.complete(PROMPT, settings())))
    assert end.new_tokens >= 1
    assert end.reason is FinishReason.CONTEXT


@pytest.mark.parametrize("events_before_closing", [0, 1, 2, 4, 7, 9, 12, 18])
@pytest.mark.parametrize("next_prompt", [PROMPT, f"{PROMPT} And", "What is the heart?"])
def test_after_a_stream_was_closed_the_next_answer_is_that_of_a_fresh_engine(
    engine: Engine, other_engine: Engine, next_prompt: str, events_before_closing: int
) -> None:
    stream = engine.complete(PROMPT, settings(16))
    list(islice(stream, events_before_closing))
    stream.close()  # type: ignore[attr-defined]  # it is a generator, which its type leaves open
    again = ids_of(engine.complete(next_prompt, settings(24)))
    assert again == ids_of(other_engine.complete(next_prompt, settings(24)))


@pytest.mark.parametrize("module", ["model.layers.0.mlp", "model.layers.3.mlp", "lm_head"])
def test_after_a_pass_that_broke_off_half_way_the_next_answer_is_that_of_a_fresh_engine(
    engine: Engine, other_engine: Engine, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    stream = engine.complete(PROMPT, settings(16))
    list(islice(stream, 10))

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.get_submodule(module), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    again = ids_of(engine.complete(PROMPT, settings(24)))
    assert again == ids_of(other_engine.complete(PROMPT, settings(24)))


def test_a_prompt_asked_again_is_read_but_for_its_last_token(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine(max_chunk=64)  # so that the answer pushes nothing out of the window
    first = list(engine.complete(PROMPT, settings(30)))
    second = list(engine.complete(PROMPT, settings(30)))
    assert finished(second).cached_tokens == finished(first).prompt_tokens - 1
    assert ids_of(second) == ids_of(first)


def test_the_same_seed_gives_the_same_text(engine: Engine, other_engine: Engine) -> None:
    def answer(chosen: Engine, seed: int) -> str:
        sampling = SamplingParams(temperature=1.0, top_k=20, repetition_penalty=1.05, seed=seed)
        return text_of(chosen.complete(PROMPT, settings(20, sampling=sampling)))

    assert answer(engine, 5) == answer(engine, 5) == answer(other_engine, 5)
    assert answer(engine, 5) != answer(engine, 6)


def test_the_caller_is_not_in_inference_mode_while_the_stream_waits(engine: Engine) -> None:
    stream = engine.complete(PROMPT, settings(4))
    assert not torch.is_inference_mode_enabled()
    for _ in stream:
        assert not torch.is_inference_mode_enabled()
    weight = torch.ones(1, requires_grad=True)
    assert (weight * 2).requires_grad


def test_a_stream_may_go_on_in_another_thread(engine: Engine, other_engine: Engine) -> None:
    stream = engine.complete(PROMPT, settings(8))
    events: list[Event] = list(islice(stream, 9))
    thread = threading.Thread(target=lambda: events.extend(stream))
    thread.start()
    thread.join()
    assert ids_of(events) == ids_of(other_engine.complete(PROMPT, settings(8)))


def test_raw_text_is_continued_without_a_marker(engine: Engine, other_engine: Engine) -> None:
    prompt = engine.tokenizer.encode(PROMPT)
    expected = generate(other_engine.context, other_engine.tokenizer, prompt, settings())
    assert ids_of(engine.complete(PROMPT, settings())) == ids_of(expected)
    assert engine.context.token_ids[: len(prompt)] == prompt


def test_an_empty_text_is_continued_from_the_beginning_token(engine: Engine) -> None:
    events = list(engine.complete("", settings(3)))
    assert finished(events).prompt_tokens == 1
    assert finished(events).new_tokens == 3
    assert engine.context.token_ids[0] == engine.model.config.bos_token_id


def test_a_prompt_without_a_token_is_one_line(engine: Engine) -> None:
    held = list(engine.context.token_ids)
    with refused(M1Error, r"prompt holds no token.*begin it with .* beginning token, \d+\.$"):
        list(generate(engine.context, engine.tokenizer, [], settings()))
    assert engine.context.token_ids == held


def twin(session: ChatSession, engine: Engine) -> ChatSession:
    """The same conversation with an engine that has not seen any of it."""
    copy = ChatSession(engine, system=session.system, settings=session.settings)
    copy.turns = list(session.turns)
    return copy


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_conversation_reuses_its_beginning_and_says_the_same(
    engine: Engine, new_engine: Callable[..., Engine], system: str
) -> None:
    session = ChatSession(engine, system=system, settings=settings(12))
    for question in ("What is glaucoma?", "高血压是什么？", "<C_A>🩺"):
        held = list(engine.context.token_ids)
        expected = list(twin(session, new_engine()).send(question))
        events = list(session.send(question))
        assert ids_of(events) == ids_of(expected)
        assert finished(expected).cached_tokens == 0
        assert finished(events).cached_tokens == len(held)
    assert [message.role for message in session.messages] == ["user", "assistant"] * 3


def test_a_prompt_is_made_of_system_questions_and_answers(engine: Engine) -> None:
    session = ChatSession(engine, system="Be brief.", settings=settings(3))
    events = [*session.send("<C_A> heart?"), *session.send("Why?")]
    encode, answer = engine.tokenizer.encode, ids_of(events)
    prompt = [4, *encode("Be brief."), 6, *encode("<C_A> heart?"), 7, *answer[:3]]
    prompt += [6, *encode("Why?"), 7]
    assert engine.context.token_ids == prompt + answer[3:]
    assert session.messages[2] == Message("user", "Why?")
    assert session.messages[3] == Message("assistant", engine.tokenizer.decode(answer[3:]))


def test_a_cleared_conversation_keeps_only_its_system_prompt(
    engine: Engine, other_engine: Engine
) -> None:
    session = ChatSession(engine, system="Be brief.", settings=settings(8))
    list(session.send("What is glaucoma?"))
    session.clear()
    assert session.messages == []
    again = ChatSession(other_engine, system="Be brief.", settings=settings(8))
    assert ids_of(session.send("heart?")) == ids_of(again.send("heart?"))


@pytest.mark.parametrize("deltas", [1, 2, 5])
def test_an_abandoned_answer_stays_as_far_as_it_went(
    engine: Engine, other_engine: Engine, deltas: int
) -> None:
    session = ChatSession(engine, settings=settings(20))
    stream = session.send("What is the heart?")
    seen = list(islice((event for event in stream if isinstance(event, TextDelta)), deltas))
    stream.close()  # type: ignore[attr-defined]  # as above
    assert session.messages[1:] == [Message("assistant", text_of(seen))]
    expected = ids_of(twin(session, other_engine).send("Why?"))
    assert ids_of(session.send("Why?")) == expected


@pytest.mark.parametrize("events", [0, 1, 2])
def test_a_question_that_was_not_answered_is_taken_back(engine: Engine, events: int) -> None:
    session = ChatSession(engine, settings=settings(4))
    stream = session.send("What is the heart?")
    assert not any(isinstance(event, TextDelta) for event in islice(stream, events))
    stream.close()  # type: ignore[attr-defined]  # as above
    assert session.messages == []


def test_a_question_that_does_not_fit_is_taken_back(engine: Engine, other_engine: Engine) -> None:
    session = ChatSession(engine, settings=settings(4))
    list(session.send("What is the heart?"))
    before = list(session.turns)
    with pytest.raises(ContextLengthError, match=r"or begin a new conversation\.$"):
        list(session.send("heart " * 300))
    assert session.turns == before
    expected = ids_of(twin(session, other_engine).send("Why?"))
    assert ids_of(session.send("Why?")) == expected


def test_an_answer_cut_by_a_stop_string_goes_on_from_what_was_shown(
    engine: Engine, other_engine: Engine
) -> None:
    free = text_of(ChatSession(other_engine, settings=settings(12)).send("heart?"))
    for stop in (free[:2], free[5:8]):
        session = ChatSession(engine, settings=settings(12, stop=(stop,)))
        list(session.send("heart?"))
        assert session.messages[1].content == free.partition(stop)[0]
        rendered = engine.tokenizer.render([*session.messages, Message("user", "Why?")])
        list(session.send("Why?"))
        assert session.context.token_ids[: len(rendered)] == rendered
