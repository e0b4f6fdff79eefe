"""Choosing the next token from logits.

What it is: the samplers in the order the model's generation_config.json presumes (Hugging Face's):
repetition penalty over prompt and output, then temperature, top-k, top-p, min-p, then a draw.
What it is not: aware of text or of the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from m1local.errors import M1Error, SamplingError

LEAST_TEMPERATURE = 1e-30  # a float32 that a division survives; colder is the most likely token


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen; temperature 0 takes the most likely one and needs no seed."""

    temperature: float = 0.3
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise SamplingError for a value outside its range."""
        checks = (
            (0 <= self.temperature <= 100, "temperature", self.temperature, "0 to 100"),
            (self.top_k is None or self.top_k >= 0, "top-k", self.top_k, "0 (off) or more"),
            (0 < self.top_p <= 1, "top-p", self.top_p, "above 0, up to 1"),
            (0 <= self.min_p <= 1, "min-p", self.min_p, "0 to 1"),
            (
                0 < self.repetition_penalty <= 10,
                "repeat-penalty",
                self.repetition_penalty,
                "above 0, up to 10",
            ),
            (
                self.seed is None or 0 <= self.seed < 2**63,
                "seed",
                self.seed,
                "0 or more (leave it out for a random one)",
            ),
        )
        for valid, name, value, expected in checks:
            if not valid:
                raise SamplingError(f"{name} is {value}; it must be {expected}.")


class Sampler:
    """Draws tokens one after the other; remembers which it has seen, for the penalty."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """Start a fresh sequence of draws from `params.seed`, or from a random one."""
        self._params = params
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def observe(self, token_ids: Iterable[int]) -> None:
        """Count `token_ids` as seen: the prompt, or what was drawn."""
        self._seen[torch.tensor(list(token_ids), dtype=torch.long)] = True

    def __call__(self, logits: Tensor) -> int:
        """Choose a token id below `vocab_size` from logits (V,), and count it as seen."""
        # A model may have more rows than the tokenizer has tokens; those mean nothing.
        logits = logits[: self._seen.numel()].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise M1Error(
                "The model produced values that are no numbers; the checkpoint is damaged or its "
                "format does not suit this device. Check it, or quantize it again."
            )
        token_id = self._choose(self._penalize(logits))
        self._seen[token_id] = True
        return token_id

    def _penalize(self, logits: Tensor) -> Tensor:
        penalty = self._params.repetition_penalty
        if penalty == 1.0:
            return logits
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        penalized = penalized.clamp(max=torch.finfo(torch.float32).max)
        return torch.where(self._seen[: logits.numel()], penalized, logits)

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
