"""Choosing the next token from logits.

What it is: the samplers in the order the model's generation_config.json presumes (Hugging Face's):
what a constraint allows and the logit bias; repetition, presence and frequency penalties and DRY
over prompt and output; then temperature, top-k, top-p, min-p; then a draw.
What it is not: aware of text or of the model.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from m1local import penalties
from m1local.errors import M1Error, SamplingError

LEAST_TEMPERATURE = 1e-30  # a float32 that a division survives; colder is the most likely token
ALL = -1  # of a number of last tokens: the whole context


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen; temperature 0 takes the most likely one and needs no seed.

    `logit_bias` holds pairs of a token id and what is added to its logit; minus infinity bans it.
    """

    temperature: float = 0.3
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int = ALL
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = ALL
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise SamplingError for a value outside its range."""
        for name, value, valid, expected in self._checks():
            if not valid:
                raise SamplingError(f"{name} is {value}; it must be {expected}.")

    def _checks(self) -> Iterator[tuple[str, object, bool, str]]:
        """Name, value, whether it is in its range, and the range in words."""
        value: float
        for name, value, least, most in (
            ("temperature", self.temperature, 0, 100),
            ("min-p", self.min_p, 0, 1),
            ("presence-penalty", self.presence_penalty, -100, 100),
            ("frequency-penalty", self.frequency_penalty, -100, 100),
            ("dry-multiplier", self.dry_multiplier, 0, 100),
            ("dry-base", self.dry_base, 1, 100),
        ):
            yield name, value, least <= value <= most, f"{least} to {most}"
        for name, value, most in (
            ("top-p", self.top_p, 1),
            ("repeat-penalty", self.repetition_penalty, 10),
        ):
            yield name, value, 0 < value <= most, f"above 0, up to {most}"
        for name, value in (
            ("repeat-last-n", self.repeat_last_n),
            ("dry-penalty-last-n", self.dry_penalty_last_n),
        ):
            yield name, value, value >= ALL, "-1 (all), 0 (off) or more"
        length = self.dry_allowed_length
        yield "dry-allowed-length", length, length >= 1, "1 or more"
        yield "top-k", self.top_k, self.top_k is None or self.top_k >= 0, "0 (off) or more"
        finite = all(bias < math.inf for _, bias in self.logit_bias)  # and none is NaN
        yield "logit-bias", self.logit_bias, finite, "numbers, or -inf to ban a token"
        seed = self.seed
        within = seed is None or 0 <= seed < 2**63
        yield "seed", seed, within, "0 to 2^63 - 1 (leave it out for a random one)"


class Constraint(Protocol):
    """What tokens may come next, as in an answer that must be JSON."""

    def allowed(self) -> Tensor:
        """Whether each token may come now: (V,) bool, at least one true."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on after `token_id`, one of the allowed."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""
        ...


def bias_of(params: SamplingParams, vocab_size: int) -> Tensor:
    """What is added to each logit (V,); raises SamplingError for a token that is none."""
    found = torch.zeros(vocab_size)
    for token_id, bias in params.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise SamplingError(
                f"logit-bias names the token {token_id}; this model has 0 to {vocab_size - 1}."
            )
        found[token_id] += bias
    return found


class Sampler:
    """Draws tokens one after the other; remembers what it has seen, for the penalties."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        breakers: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        """Start a fresh sequence of draws from `params.seed`, or from a random one.

        `breakers` are the ids over which DRY looks for no repetition. Raises SamplingError for a
        bias on a token that is none.
        """
        self._params = params
        self._breakers = breakers
        self._constraint = constraint
        self._token_ids = array("q")
        self._counts = torch.zeros(vocab_size, dtype=torch.long)
        self._bias = bias_of(params, vocab_size)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def observe(self, token_ids: Iterable[int]) -> None:
        """Count `token_ids` as seen: the prompt, or what was drawn."""
        added = array("q", token_ids)
        self._token_ids += added
        counts = torch.bincount(torch.tensor(added, dtype=torch.long), minlength=len(self._counts))
        self._counts += counts

    def __call__(self, logits: Tensor) -> int:
        """Choose a token id below `vocab_size` from logits (V,), and count it as seen."""
        # A model may have more rows than the tokenizer has tokens; those mean nothing.
        logits = logits[: len(self._counts)].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise not_finite()
        token_id = self._choose(self._permitted(self._penalized(logits)))
        self.observe([token_id])
        if self._constraint is not None:
            self._constraint.accept(token_id)
        return token_id

    @property
    def finished(self) -> bool:
        """Whether the constraint lets nothing more come."""
        return self._constraint is not None and self._constraint.finished

    def _permitted(self, logits: Tensor) -> Tensor:
        if self._params.logit_bias:
            logits = logits + self._bias
        if self._constraint is not None:
            logits = logits.masked_fill(~self._constraint.allowed(), float("-inf"))
        if not bool((logits > float("-inf")).any()):
            raise SamplingError("logit-bias bans every token that may come; allow some.")
        return logits

    def _penalized(self, logits: Tensor) -> Tensor:
        params = self._params
        if params.repeat_last_n:
            counts = self._counts
            if params.repeat_last_n != ALL:
                recent = torch.tensor(self._token_ids[-params.repeat_last_n :], dtype=torch.long)
                counts = torch.bincount(recent, minlength=logits.numel())
            counts = counts[: logits.numel()]
            logits = penalties.repetition(logits, counts > 0, params.repetition_penalty)
            logits = penalties.presence_and_frequency(
                logits, counts,
                presence=params.presence_penalty, frequency=params.frequency_penalty,
            )  # fmt: skip
        if params.dry_multiplier and params.dry_penalty_last_n:
            logits = logits.clone()
            for token_id, penalty in self._dry().items():
                logits[token_id] -= penalty
        return logits

    def _dry(self) -> dict[int, float]:
        params = self._params
        token_ids = np.frombuffer(self._token_ids, dtype=np.int64)
        if params.dry_penalty_last_n != ALL:
            token_ids = token_ids[-params.dry_penalty_last_n :]
        return penalties.dry(
            token_ids,
            self._breakers,
            multiplier=params.dry_multiplier,
            base=params.dry_base,
            allowed_length=params.dry_allowed_length,
        )

    def _choose(self, logits: Tensor) -> int:
        params = self._params
        if params.temperature == 0:
            return int(logits.argmax())
        kept = min(params.top_k or logits.numel(), logits.numel())
        scores, token_ids = torch.topk(logits, kept)
        # Relative to the greatest, and never by 0: the least temperature must not end in NaN.
        scores = (scores - scores[0]) / max(params.temperature, LEAST_TEMPERATURE)
        probabilities = scores.softmax(-1)
        keep = probabilities >= params.min_p * probabilities[0]
        if params.top_p < 1:  # 1 is "off", whatever the sum of many roundings is
            # Keep the fewest tokens that reach top_p together: all before which less has gathered.
            keep &= probabilities.cumsum(-1) - probabilities < params.top_p
        keep[0] = True
        drawn = torch.multinomial(probabilities * keep, 1, generator=self._generator)
        return int(token_ids[drawn])


def not_finite() -> M1Error:
    """What is said of logits that are no numbers."""
    return M1Error(
        "The model produced values that are no numbers; the checkpoint is damaged or its "
        "format does not suit this device. Check it, or quantize it again."
    )
