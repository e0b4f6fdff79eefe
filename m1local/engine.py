"""A loaded checkpoint, ready to answer.

What it is: model, tokenizer, the checkpoint's own defaults and a context, loaded together and
checked against each other. What it is not: a conversation; several may share one engine, and each
then re-reads what the others pushed out of the context.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from m1local.advice import telling
from m1local.cache import KVCache
from m1local.config import M1Config
from m1local.context import Context
from m1local.contexts import ContextPool
from m1local.cuda.transfer import Moved
from m1local.errors import TokenizerError
from m1local.generate import Event, GenerationSettings, generate
from m1local.generation_config import GenerationConfig
from m1local.kv_store import FLOAT
from m1local.memory import Setting
from m1local.model import M1Model
from m1local.placement import (
    GpuLayers,
    Placement,
    decoder_of,
    demand,
    load,
    place,
    reader_of,
)
from m1local.tokenizer import M1Tokenizer

DEFAULT_CONTEXT_TOKENS = 8192
OWN_SETTINGS = (
    "max_new_tokens",
    "stop",
    "loop_guard",
    "json_schema",
    "lookup",
)  # the rest is sampling's
RAW_TEXT = 0  # the key of the context that raw text is continued in; conversations count from 1


class Engine:
    """Answers prompts with one model and one context."""

    def __init__(
        self, model: M1Model, tokenizer: M1Tokenizer, generation: GenerationConfig, context: Context
    ) -> None:
        """Join what was loaded; raises TokenizerError when vocabulary and model differ."""
        if tokenizer.vocab_size > model.config.vocab_size:
            raise TokenizerError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{model.config.vocab_size}; their files belong to different models."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.generation = generation
        self.context = context
        self.contexts = ContextPool(context)
        self.placement: Placement | None = None
        self.loaded: Moved | None = None  # to a card

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        context_tokens: int | None = None,
        gpu_layers: GpuLayers = 0,
        kv_type: str = FLOAT,
        done: Callable[[str], None] = lambda step: None,
    ) -> "Engine":
        """Load the checkpoint in `folder` with room for `context_tokens`.

        `gpu_layers` says how many of the last layers a card computes: as many as fit ("auto"),
        "all" or a number; `kv_type` how keys and values are kept (kv_store.py). `done` is told
        each step when it is: tokenizer, context, weights. Raises MemoryLimitError where they do
        not fit.
        """
        config = M1Config.from_file(folder / "config.json")
        # The small files first: their mistakes show before gigabytes are read.
        tokenizer = M1Tokenizer.from_folder(folder)
        generation = GenerationConfig.from_folder(folder)
        done("tokenizer")
        longest = min(DEFAULT_CONTEXT_TOKENS, config.max_position_embeddings)
        setting = Setting(context_tokens or longest, kv_type)
        placement = place(folder, setting, gpu_layers)
        with telling(placement.setting):
            cache = placement.allocate(config)
            done("context")
            model, loaded = load(folder, placement)
        decoder, reader = decoder_of(model, placement), reader_of(model, placement)
        context = Context(model, cache, decoder, placement.setting, reader)
        engine = cls(model, tokenizer, generation, context)
        engine.placement, engine.loaded = placement, loaded
        needed = demand(folder, placement)
        engine.contexts = ContextPool(context, needed.workspace + needed.graphs)
        done("weights")
        return engine

    @property
    def on_card(self) -> bool:
        """Whether any of it lies on a card."""
        return self.placement is not None and self.placement.card.type == "cuda"

    def release(self) -> None:
        """Give back the memory of weights and contexts: only sizes can be asked for afterwards."""
        config, of = self.model.config, self.context.cache
        with torch.device("meta"):
            self.model = M1Model(config)
        cache = KVCache.allocate(
            config, of.capacity, dtype=of.layers[0].raw_k.dtype, device="meta",
            max_chunk=of.max_chunk, kv_type=of.layers[0].kv_type,
        )  # fmt: skip
        self.context = Context(self.model, cache)
        self.contexts = ContextPool(self.context)
        gc.collect()  # what was captured and what decodes know each other

    @property
    def defaults(self) -> GenerationSettings:
        """The checkpoint's own settings, stopping at its end token and at any new turn."""
        tokenizer, generation = self.tokenizer, self.generation
        turns = tokenizer.turn_token_ids if generation.is_chat else frozenset()
        return GenerationSettings(
            sampling=generation.sampling,
            max_new_tokens=generation.max_new_tokens,
            stop_token_ids=generation.stop_token_ids | turns | {self.model.config.eos_token_id},
        )

    def complete(self, text: str, settings: GenerationSettings | None = None) -> Iterator[Event]:
        """Continue raw text, as a Base model does; without a template."""
        prompt = self.tokenizer.encode(text) or [self.model.config.bos_token_id]
        return generate(
            self.contexts.of(RAW_TEXT), self.tokenizer, prompt, settings or self.defaults
        )

    def settings(self, **changes: object) -> GenerationSettings:
        """The defaults with some sampling parameters or limits changed; None changes nothing."""
        given = {name: value for name, value in changes.items() if value is not None}
        own = {name: given.pop(name) for name in OWN_SETTINGS if name in given}
        defaults = self.defaults
        sampling = replace(defaults.sampling, **given)  # type: ignore[arg-type]  # checked by replace
        return replace(defaults, sampling=sampling, **own)  # type: ignore[arg-type]  # as above
