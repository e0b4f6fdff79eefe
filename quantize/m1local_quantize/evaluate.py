"""How much a quantized model differs from the original it was made of.

What it is: perplexity of both, the Kullback-Leibler divergence of their next-token distributions
and how often they agree on the most likely token, over given token sequences. `compare` takes two
loaded models; `certificate.py` does it layer by layer. What it is not: an exam; it says how far
two models are apart, not how good either is.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from m1local.cache import KVCache
from m1local.model import M1Model


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, and from which position on the next token is judged."""

    token_ids: tuple[int, ...]
    first_judged: int = 1  # the token at this position is the first that is predicted and judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A model against its reference over a text; the divergence is in nats."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float


@dataclass(slots=True)
class Tally:
    """Sums over judged tokens, from which a Divergence is made."""

    reference_loss: float = 0.0
    loss: float = 0.0
    agreed: int = 0
    kls: list[Tensor] = field(default_factory=list)

    def add(self, wanted: Tensor, found: Tensor, targets: Tensor) -> None:
        """Count logits (n, V) of the reference and of the model, and the tokens that came (n,)."""
        wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
        kl = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
        self.kls.append(kl)
        self.agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        self.reference_loss += float(functional.nll_loss(wanted, targets, reduction="sum"))
        self.loss += float(functional.nll_loss(found, targets, reduction="sum"))

    def result(self) -> Divergence:
        """What was counted; raises ValueError when nothing was."""
        if not self.kls:
            raise ValueError("the text is too short: no token to judge")
        divergences = torch.cat(self.kls)
        count = divergences.numel()
        return Divergence(
            tokens=count,
            reference_perplexity=math.exp(self.reference_loss / count),
            perplexity=math.exp(self.loss / count),
            mean_kl=float(divergences.mean()),
            p99_kl=float(divergences.quantile(0.99)),
            top1_agreement=self.agreed / count,
        )


@torch.inference_mode()
def compare(
    reference: Callable[[Tensor], Tensor],
    model: M1Model,
    samples: Iterable[Sample],
    *,
    decode: bool = False,
) -> Divergence:
    """Compare `model` with `reference` on `samples`; raises ValueError when nothing is judged.

    `reference` gives logits (1, T, V) for token ids (1, T), as a model does.

    With `decode` the model reads token by token through its cache, as it does while answering;
    its few-row operators round differently from those that read a prompt.
    """
    tally = Tally()
    for sample in samples:
        ids = torch.tensor([sample.token_ids])
        judged = slice(sample.first_judged - 1, -1)
        found = _decode(model, ids) if decode else model(ids)
        tally.add(reference(ids)[0, judged], found[0, judged], ids[0, sample.first_judged :])
    return tally.result()


def _decode(model: M1Model, token_ids: Tensor) -> Tensor:
    """Logits (1, T, V) of token-by-token reading."""
    dtype = next(model.parameters()).dtype
    cache = KVCache.allocate(model.config, token_ids.shape[1], dtype=dtype)
    steps = [model(token_ids[:, i : i + 1], cache) for i in range(token_ids.shape[1])]
    return torch.cat(steps, dim=1)
