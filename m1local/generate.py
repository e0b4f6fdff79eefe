"""Generation: a prompt in, a stream of events out.

What it is: prefill in chunks, then one token at a time, as a plain generator that front ends
consume. Closing it stops the work after the present forward pass; nothing else is needed to cancel.
What it is not: a conversation (m1local/chat.py) or a sampler.

`torch.inference_mode` decorates the function: a `with` around a `yield` would leak the mode into
the caller, and lose it when another thread resumes the generator.
"""

import enum
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m1local.context import Context, Decoder
from m1local.json_schema import JsonSchema
from m1local.lookup import LookAhead
from m1local.loop_guard import LoopGuard
from m1local.sampling import Sampler, SamplingParams
from m1local.text_stream import TextStream
from m1local.tokenizer import M1Tokenizer


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"
    LOOP = "loop"


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How many tokens of the prompt have been read."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event, exactly once."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    looked_up_tokens: int = 0  # of the new ones, that were proposed (m1local/lookup.py)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; the first token belongs to the prefill."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class TurnsDropped:
    """Turns that the model no longer sees, so that the rest fits; always said, never silent."""

    turns: int
    tokens: int


Event = PrefillProgress | TextDelta | TurnsDropped | Finished


@dataclass(frozen=True, slots=True)
class ShorterPrompt:
    """What to go on with when the context is full in the middle of an answer."""

    prompt: Sequence[int]
    dropped: TurnsDropped


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How an answer is made.

    `stop` are strings that end it and are not shown; `loop_guard` ends one that repeats itself
    without end; `json_schema`, the text of a JSON schema, lets nothing else come; `lookup` proposes
    tokens that came before, which changes nothing but the speed (m1local/lookup.py).
    """

    sampling: SamplingParams
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    loop_guard: bool = True
    json_schema: str | None = None
    lookup: bool = True


@torch.inference_mode()
def generate(
    context: Context,
    tokenizer: M1Tokenizer,
    prompt: Sequence[int],
    settings: GenerationSettings,
    make_room: Callable[[int], ShorterPrompt | None] = lambda answer_tokens: None,
) -> Iterator[Event]:
    """Answer `prompt`, keeping what the context already holds of it.

    When the context is full, `make_room` is asked for a shorter prompt, with which the answer of so
    many tokens goes on; None ends it. Before anything is computed raises ContextLengthError when
    the prompt does not fit, and M1Error when it is empty.
    """
    context.check_prompt(prompt)
    with context.telling():
        answer = _Answer(tokenizer, prompt, settings, context.decoder)
    cached_tokens = context.keep_common(prompt)
    begun = time.perf_counter()
    logits = yield from _prefill(context, prompt, cached_tokens)
    prefilled = time.perf_counter()

    ahead = LookAhead(context, prompt, lookup=settings.lookup)
    reason, away = yield from _decode(context, ahead, answer, logits, make_room)
    decoded = time.perf_counter()
    reason, rest = answer.end(reason)
    if rest is not None:
        yield rest
    yield Finished(
        reason=reason,
        prompt_tokens=len(prompt),
        cached_tokens=cached_tokens,
        new_tokens=len(answer.token_ids),
        prefill_seconds=prefilled - begun,
        decode_seconds=decoded - prefilled - away,
        looked_up_tokens=ahead.accepted,
    )


def _decode(
    context: Context,
    ahead: LookAhead,
    answer: "_Answer",
    logits: Tensor,
    make_room: Callable[[int], ShorterPrompt | None],
) -> Generator[Event, None, tuple[FinishReason, float]]:
    """Token by token from `logits` on; returns why it ended, and seconds its reader took."""
    away = 0.0
    try:
        while True:
            with context.telling():
                reason = answer.extend(logits)
            if piece := answer.released():
                given = time.perf_counter()
                yield piece
                away += time.perf_counter() - given
            if reason is not None:
                return reason, away
            if ahead.room:
                logits = ahead.feed(answer.token_ids[-1], answer.left)
            elif (shorter := make_room(len(answer.token_ids))) is not None:
                yield shorter.dropped
                logits = yield from _read_again(context, [*shorter.prompt, *answer.token_ids])
            else:
                return FinishReason.CONTEXT, away
    finally:
        ahead.settle()


class _Answer:
    """The tokens of one answer, their text, and what may end it."""

    def __init__(
        self,
        tokenizer: M1Tokenizer,
        prompt: Sequence[int],
        settings: GenerationSettings,
        decoder: Decoder | None,
    ) -> None:
        self.token_ids: list[int] = []
        self._settings = settings
        self._sampler = _sampler(tokenizer, prompt, settings, decoder)
        self._text = TextStream(tokenizer.decoder(), settings.stop)
        self._guard = LoopGuard() if settings.loop_guard else None
        self._piece = ""
        self._unseen: list[int] = []  # tokens whose text has not been released yet

    def extend(self, logits: Tensor) -> FinishReason | None:
        """Draw one more token; returns the reason when there is none, or it is the last."""
        if len(self.token_ids) >= self._settings.max_new_tokens:
            return FinishReason.LENGTH
        token_id = self._sampler(logits)
        if token_id in self._settings.stop_token_ids:
            return FinishReason.STOP
        self.token_ids.append(token_id)
        self._unseen.append(token_id)
        self._piece = self._text.push(token_id)
        if self._text.stopped or self._sampler.finished:
            return FinishReason.STOP
        if self._guard is not None and self._guard.push(token_id):
            return FinishReason.LOOP
        return None

    @property
    def left(self) -> int:
        """How many more tokens it may have."""
        return self._settings.max_new_tokens - len(self.token_ids)

    def released(self) -> TextDelta | None:
        """The text that became certain with the last token, if any did."""
        return self._delta(self._piece) if self._piece else None

    def end(self, reason: FinishReason) -> tuple[FinishReason, TextDelta | None]:
        """Why the answer ended, and the text that was held back."""
        tail = self._text.flush()
        if self._text.stopped:  # a stop string may become whole only with a broken character
            reason = FinishReason.STOP
        return reason, self._delta(tail) if tail or self._unseen else None

    def _delta(self, text: str) -> TextDelta:
        delta = TextDelta(text, tuple(self._unseen))
        self._piece = ""
        self._unseen.clear()
        return delta


def _sampler(
    tokenizer: M1Tokenizer,
    prompt: Sequence[int],
    settings: GenerationSettings,
    decoder: Decoder | None,
) -> Sampler:
    """A sampler that has seen `prompt` and keeps to the settings' schema."""
    params = settings.sampling
    on_card = decoder.sampler(params, tokenizer.vocab_size) if decoder else None
    if on_card is not None and settings.json_schema is None:
        on_card.observe(prompt)
        return on_card
    constraint = None
    if settings.json_schema is not None:
        constraint = JsonSchema(settings.json_schema, tokenizer, settings.stop_token_ids)
    breakers: frozenset[int] = frozenset()
    if params.dry_multiplier:
        breakers = tokenizer.ids_containing(params.dry_sequence_breakers)
    sampler = Sampler(params, tokenizer.vocab_size, breakers=breakers, constraint=constraint)
    sampler.observe(prompt)
    return sampler


def _read_again(context: Context, prompt: Sequence[int]) -> Generator[Event, None, Tensor]:
    """Feed what the context does not hold of `prompt`; returns the last token's logits (V,)."""
    return (yield from _prefill(context, prompt, context.keep_common(prompt)))


def _prefill(
    context: Context, prompt: Sequence[int], cached_tokens: int
) -> Generator[Event, None, Tensor]:
    """Feed the rest of `prompt` in chunks; returns the last token's logits (V,)."""
    logits = torch.empty(0)
    for start in range(cached_tokens, len(prompt), context.cache.max_chunk):
        yield PrefillProgress(start, len(prompt))
        logits = context.feed(prompt[start : start + context.cache.max_chunk])
    # A retry feeds the last token again, so the cache must be able to end just before it.
    context.cache.remember(len(prompt) - 1)
    yield PrefillProgress(len(prompt), len(prompt))
    return logits
