"""Generation: a prompt in, a stream of events out.

What it is: prefill in chunks, then one token at a time, as a plain generator that front ends
consume. Closing it stops the work after the present forward pass; nothing else is needed to cancel.
What it is not: a conversation (m1local/chat.py) or a sampler.

`torch.inference_mode` decorates the function: a `with` around a `yield` would leak the mode into
the caller, and lose it when another thread resumes the generator.
"""

import enum
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m1local.context import Context
from m1local.sampling import Sampler, SamplingParams
from m1local.text_stream import TextStream
from m1local.tokenizer import M1Tokenizer


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"


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

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; the first token belongs to the prefill."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


Event = PrefillProgress | TextDelta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How an answer is made."""

    sampling: SamplingParams
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@torch.inference_mode()
def generate(
    context: Context,
    tokenizer: M1Tokenizer,
    prompt: Sequence[int],
    settings: GenerationSettings,
) -> Iterator[Event]:
    """Answer `prompt`, keeping what the context already holds of it.

    Raises ContextLengthError before anything is computed when the prompt does not fit.
    """
    context.check_prompt(prompt)
    sampler = Sampler(settings.sampling, tokenizer.vocab_size)
    sampler.observe(prompt)
    text = TextStream(tokenizer.decoder(), settings.stop)
    cached_tokens = context.keep_common(prompt)
    begun = time.perf_counter()
    logits = yield from _prefill(context, prompt, cached_tokens)
    prefilled = time.perf_counter()

    reason, new_tokens = FinishReason.LENGTH, 0
    unseen: list[int] = []  # tokens whose text has not been released yet
    while new_tokens < settings.max_new_tokens:
        token_id = sampler(logits)
        if token_id in settings.stop_token_ids:
            reason = FinishReason.STOP
            break
        new_tokens += 1
        unseen.append(token_id)
        if piece := text.push(token_id):
            yield TextDelta(piece, tuple(unseen))
            unseen.clear()
        if text.stopped:
            reason = FinishReason.STOP
            break
        if not context.room:
            reason = FinishReason.CONTEXT
            break
        logits = context.feed([token_id])
    if (tail := text.flush()) or unseen:
        yield TextDelta(tail, tuple(unseen))
    if text.stopped:  # a stop string may become whole only with the last, broken character
        reason = FinishReason.STOP
    yield Finished(
        reason=reason,
        prompt_tokens=len(prompt),
        cached_tokens=cached_tokens,
        new_tokens=new_tokens,
        prefill_seconds=prefilled - begun,
        decode_seconds=time.perf_counter() - prefilled,
    )


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
