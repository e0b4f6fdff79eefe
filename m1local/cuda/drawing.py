"""Drawing the next token on the card, so that the next step need not wait for the host.

What it is: m1local/sampling.py's samplers, in the same order and with the same random numbers, as
operators on static buffers that a graph may hold; a seed gives the same answer on both. The random
numbers are drawn on the host, a few for each token, and sent. What it is not: complete; what needs
the text or the whole vocabulary in order (DRY, a schema, drawing from all tokens) stays with the
host's sampler, and `why_not` says so.
"""

from array import array
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from m1local import penalties
from m1local.cache import KVCache
from m1local.cuda.decode import Decoder
from m1local.cuda.replay import Replay
from m1local.model import M1Model
from m1local.sampling import (
    ALL,
    LEAST_TEMPERATURE,
    Sampler,
    SamplingParams,
    bias_of,
    not_finite,
)

MOST_DRAWN_FROM = 1024  # random numbers that are sent for a token
MOST_DRAWS = 4  # whose buffers and graphs are kept, of parameters that were used last


def why_not(params: SamplingParams) -> str:
    """Why tokens cannot be drawn on the card with `params`; "" where they can."""
    if params.dry_multiplier:
        return "DRY looks at the whole text"
    if params.repeat_last_n not in (0, ALL):
        return "--repeat-last-n forgets"
    if params.temperature and not 0 < (params.top_k or 0) <= MOST_DRAWN_FROM:
        return f"--top-k is not within 1 to {MOST_DRAWN_FROM}"
    if any(bias == float("-inf") for _, bias in params.logit_bias):
        return "--logit-bias bans tokens"
    return ""


class Draw:
    """One draw from a decoder's logits, on static buffers."""

    def __init__(self, decoder: Decoder, params: SamplingParams, vocab_size: int) -> None:
        """`params` without their seed; the draw is captured with the first token."""
        device = decoder.step.device
        self.decoder, self.params, self.vocab_size = decoder, params, vocab_size
        self.kept = min(params.top_k or vocab_size, vocab_size)
        self.counts = torch.zeros(vocab_size, dtype=torch.long, device=device)
        self.noise = torch.ones(self.kept if params.temperature else 1, device=device)
        self.found = torch.zeros(1, dtype=torch.long, device=device)  # -1 where no logit is finite
        self.one = torch.ones(1, dtype=torch.long, device=device)
        self.bias = bias_of(params, vocab_size).to(device)

    def __call__(self) -> None:
        """The decoder's next token; counts it as seen."""
        logits = self.decoder.step.logits[: self.vocab_size]
        finite = torch.isfinite(logits).all()
        token = self._choose(self._penalized(logits)).view(1)
        self.decoder.step.token.copy_(token)
        self.counts.scatter_add_(0, token, self.one)
        self.found.copy_(torch.where(finite, token, -1))

    def _penalized(self, logits: Tensor) -> Tensor:
        params = self.params
        if params.repeat_last_n:
            logits = penalties.repetition(logits, self.counts > 0, params.repetition_penalty)
            logits = penalties.presence_and_frequency(
                logits, self.counts,
                presence=params.presence_penalty, frequency=params.frequency_penalty,
            )  # fmt: skip
        return logits + self.bias if params.logit_bias else logits

    def _choose(self, logits: Tensor) -> Tensor:
        params = self.params
        if params.temperature == 0:
            return logits.argmax()
        scores, token_ids = torch.topk(logits, self.kept)
        scores = (scores - scores[0]) / max(params.temperature, LEAST_TEMPERATURE)
        probabilities = scores.softmax(-1)
        keep = probabilities >= params.min_p * probabilities[0]
        if params.top_p < 1:
            keep &= probabilities.cumsum(-1) - probabilities < params.top_p
        keep[0].fill_(True)
        # torch.multinomial's own way, with its random numbers.
        drawn = (probabilities * keep / self.noise).argmax()
        return token_ids.gather(0, drawn.view(1))  # token_ids[drawn] would wait for the card


class CardSampler(Sampler):
    """Draws on the card and begins the next step before it looks at the token."""

    def __init__(self, draw: Draw, seed: int | None, replays: dict[Draw, Replay]) -> None:
        """Start a fresh sequence with `draw`'s parameters; `replays` keeps what was captured."""
        super().__init__(replace(draw.params, seed=seed), draw.vocab_size)
        self._draw, self._replays = draw, replays
        self._draw.counts.zero_()
        pinned = draw.found.device.type == "cuda"
        self._sent = torch.ones((2, draw.noise.numel()), pin_memory=pinned)
        self._read = torch.zeros(1, dtype=torch.long, pin_memory=pinned)
        self._turn = 0

    @property
    def reason(self) -> str:
        """Why no graph draws; "" where one does, or none was tried yet."""
        replay = self._replays.get(self._draw)
        return replay.reason if replay else ""

    def observe(self, token_ids: Iterable[int]) -> None:
        """Count `token_ids` as seen, on the card."""
        seen = torch.tensor(array("q", token_ids), dtype=torch.long)
        counts = torch.bincount(seen, minlength=self._draw.vocab_size)
        self._draw.counts += counts.to(self._draw.counts.device)

    def __call__(self, logits: Tensor) -> int:
        """Choose a token id from logits (V,), count it, and begin its step."""
        draw, decoder = self._draw, self._draw.decoder
        if logits.data_ptr() != decoder.step.logits.data_ptr():  # those of the prompt
            decoder.step.logits.copy_(logits)
        self._send_noise()
        self._replay()()
        self._read.copy_(draw.found, non_blocking=True)
        drawn = None
        if draw.found.device.type == "cuda":
            drawn = torch.cuda.Event()  # type: ignore[no-untyped-call]
            drawn.record()
        decoder.launch_ahead()
        if drawn is not None:
            drawn.synchronize()
        token_id = int(self._read)
        if token_id < 0:
            raise not_finite()
        decoder.was_drawn(token_id)
        return token_id

    def _send_noise(self) -> None:
        if self._draw.params.temperature == 0:
            return
        row = self._sent[self._turn]
        row.exponential_(generator=self._generator)
        self._draw.noise.copy_(row, non_blocking=True)
        self._turn = 1 - self._turn

    def _replay(self) -> Replay:
        draw = self._draw
        if draw not in self._replays:
            counts, token = draw.counts.clone(), draw.decoder.step.token.clone()
            self._replays[draw] = Replay(draw, draw.found.device)
            draw.counts.copy_(counts)
            draw.decoder.step.token.copy_(token)
        return self._replays[draw]


class DrawingDecoder(Decoder):
    """A decoder with samplers; what was captured for one answer serves the next."""

    def __init__(self, model: M1Model, cache: KVCache, first: int = 0) -> None:
        """For `cache`; the layers before `first` are computed elsewhere."""
        super().__init__(model, cache, first)
        self._draws: dict[tuple[SamplingParams, int], Draw] = {}
        self._replays: dict[Draw, Replay] = {}

    def sampler(self, params: SamplingParams, vocab_size: int) -> Sampler | None:
        """A sampler for one answer at a time; None where the host must draw (`why_not`)."""
        if why_not(params) or self.step.first > 0:
            return None
        key = replace(params, seed=None), vocab_size
        draw = self._draws.pop(key, None) or Draw(self, *key)
        self._draws[key] = draw  # the one used last at the end
        if len(self._draws) > MOST_DRAWS:
            oldest = self._draws.pop(next(iter(self._draws)))
            self._replays.pop(oldest, None)
        return CardSampler(draw, params.seed, self._replays)
