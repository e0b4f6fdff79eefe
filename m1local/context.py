"""A model's context: the tokens it has read, and the cache that remembers them.

What it is: the only one who feeds tokens to the model during a conversation, so it knows what the
cache holds and can keep the common beginning of two prompts. What it is not: about text or turns.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from m1local.advice import telling
from m1local.cache import KVCache
from m1local.errors import ContextLengthError, M1Error
from m1local.memory import Setting
from m1local.model import M1Model
from m1local.sampling import Sampler, SamplingParams


class Decoder(Protocol):
    """One token at a time, as m1local/cuda/decode.py does it."""

    @property
    def reason(self) -> str:
        """Why no graph is used; "" where one is, or none was tried yet."""
        ...

    def feed(self, token_id: int) -> Tensor:
        """Append one token; returns the next one's logits (V,)."""
        ...

    def forget_ahead(self) -> None:
        """Do not use what was begun for a token nobody has fed."""
        ...

    def sampler(self, params: SamplingParams, vocab_size: int) -> Sampler | None:
        """A sampler for its logits; None where an ordinary one is needed."""
        ...


class Reader(Protocol):
    """A few tokens at a time, as m1local/native/step.py reads them."""

    most: int  # tokens

    def read(self, token_ids: list[int], *, last_only: bool) -> Tensor | None:
        """Append tokens; returns logits (1 or T, V), or None where the model is to read them."""
        ...


class Context:
    """A cache together with the ids it holds."""

    def __init__(
        self,
        model: M1Model,
        cache: KVCache,
        decoder_of: Callable[[KVCache], Decoder] | None = None,
        setting: Setting | None = None,
        reader_of: Callable[[KVCache], Reader | None] = lambda cache: None,
    ) -> None:
        """Feed `model` through `cache`, from wherever it stands empty.

        `decoder_of` makes what single tokens are fed through, `reader_of` what a few together are,
        if not the model itself; `setting` is what an error about memory gives advice on.
        """
        self._reader_of = reader_of
        self._setting = setting or Setting(cache.capacity)
        self.model = model
        self._decoder_of = decoder_of
        self.cache = cache
        self.token_ids: list[int] = []
        self.device = cache.layers[-1].raw_k.device
        first = model.model.layers[0].get_parameter("input_layernorm.weight")
        self._ids_device = first.device  # the last layers may lie on another

    def another(self) -> "Context":
        """An empty context of the same size for the same model."""
        cache = self.cache.another()
        return Context(self.model, cache, self._decoder_of, self._setting, self._reader_of)

    @cached_property
    def decoder(self) -> Decoder | None:
        """What single tokens are fed through; None where that is the model."""
        with self.telling():
            return self._decoder_of(self.cache) if self._decoder_of else None

    @cached_property
    def _reader(self) -> Reader | None:
        return self._reader_of(self.cache)

    def telling(self) -> AbstractContextManager[None]:
        """Within it a card's failed allocation becomes a MemoryLimitError with advice."""
        return telling(self._setting)

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return self.cache.capacity

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.cache.capacity - self.cache.position

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raise ContextLengthError unless `prompt` and one new token fit; M1Error for an empty one.

        Every answer follows a token: of nothing there are no logits.
        """
        if not prompt:
            raise M1Error(
                "The prompt holds no token, so nothing can follow it; begin it with the "
                f"checkpoint's beginning token, {self.model.config.bos_token_id}."
            )
        if len(prompt) >= self.capacity:
            most = self.model.config.max_position_embeddings
            larger = f", or choose a larger --ctx-size (up to {most:,})"
            raise ContextLengthError(
                f"The prompt has {len(prompt):,} tokens; with the answer at most {self.capacity:,} "
                f"fit. Shorten it, or begin a new conversation{larger * (self.capacity < most)}."
            )

    def keep_common(self, prompt: Sequence[int]) -> int:
        """Cut back to what `prompt` begins with; returns how many of its tokens are held.

        At least its last token is left to be fed, since its logits are wanted. Where it was cut is
        remembered: a question that is edited begins there again. Also mends what an interrupted
        forward pass left half written.
        """
        held = min(len(self.token_ids), self.cache.position, len(prompt) - 1)
        common = next(
            (i for i in range(held) if self.token_ids[i] != prompt[i]),
            held,
        )
        self._forget_ahead()
        kept = self.cache.nearest_boundary(common)
        self.cache.rollback(kept)
        self.cache.remember(kept)
        del self.token_ids[kept:]
        return kept

    def _forget_ahead(self) -> None:
        """What the decoder began is of no use once the cache changes otherwise."""
        if (decoder := self.__dict__.get("decoder")) is not None:
            decoder.forget_ahead()

    @torch.inference_mode()
    def feed(self, token_ids: Sequence[int]) -> Tensor:
        """Append ids, at most `cache.max_chunk` of them; returns the last one's logits (V,).

        Raises MemoryLimitError where a card has too little memory; what was fed before is kept.
        """
        with self.telling():
            if len(token_ids) == 1 and self.decoder is not None:
                last = self.decoder.feed(token_ids[0])
            else:
                last = self._read(token_ids, last_only=True)[-1]
        self.token_ids += token_ids
        return last

    @torch.inference_mode()
    def feed_all(self, token_ids: Sequence[int]) -> Tensor:
        """As `feed`, but returns the logits behind every id (T, V)."""
        with self.telling():
            logits = self._read(token_ids, last_only=False)
        self.token_ids += token_ids
        return logits

    def take_back(self, tokens: int) -> None:
        """Forget the last `tokens` ids, fewer than `cache.RAW_TOKENS`, that were just fed."""
        if tokens:
            self._forget_ahead()
            self.cache.rollback(self.cache.position - tokens)
            del self.token_ids[-tokens:]

    def _read(self, token_ids: Sequence[int], *, last_only: bool) -> Tensor:
        self._forget_ahead()
        reader = self._reader
        if reader is not None and len(token_ids) <= reader.most:
            read = reader.read(list(token_ids), last_only=last_only)
            if read is not None:
                return read
        batch = torch.tensor([token_ids], device=self._ids_device)
        logits: Tensor = self.model(batch, self.cache, last_only=last_only)[0]
        return logits
