"""What is measured on a card, how often, and by which clock: for the parts of bench/gpu.py.

What it is: the model and its sizes, smaller in tests; and the median of a piece of work. What it is
not: the parts themselves.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench.gpu_model import M1_14B, specs
from m1local.checkpoint import compute_dtype
from m1local.config import M1Config
from m1local.kv_store import FLOAT
from m1local.memory import CARD_CHUNK, Model, Setting


@dataclass(frozen=True)
class Subject:
    """What is measured, and how often; the defaults are the 14B.

    `shapes` says how often each matrix but embedding and head occurs. `caches` is what the copies
    of a matrix fill together, so that none is read from a cache.
    """

    device: torch.device
    config: M1Config = M1_14B
    contexts: tuple[int, ...] = (128, 4096, 16384, 32640)
    prompt: int = 2048
    chunk: int = CARD_CHUNK
    repeats: int = 20
    warm_ups: int = 3
    warm_seconds: float = 0.2  # at least: an idle card's clocks rise slowly
    answer: int = 64
    copied: int = 1 << 30
    caches: int = 256 << 20
    cap: int = int(7.2 * 2**30)
    shapes: Mapping[tuple[int, int], int] = field(
        default_factory=lambda: {
            (6144, 5120): 20, (7168, 5120): 20, (5120, 5120): 40, (17408, 5120): 80,
            (5120, 17408): 40,
        }
    )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return compute_dtype(self.device)

    def setting(self, tokens: int, kv_type: str = FLOAT) -> Setting:
        """A setting of at most so many tokens."""
        longest = self.config.max_position_embeddings
        return Setting(min(tokens, longest), kv_type, max_chunk=self.chunk)

    def planned(self, name: str) -> Model:
        """What the plan knows of the model in the format `name`."""
        return Model(self.config, specs(self.config, name), self.dtype)


def milliseconds(
    work: Callable[[], object], subject: Subject, most: int = 20, together: int = 1
) -> float:
    """The median of `work`'s time, of at most `most` runs, on a card by its own clock.

    So many runs are timed `together`, since in an answer a step is launched behind the one before.
    """
    on_card, times, begun = subject.device.type == "cuda", [], time.perf_counter()
    warmed = 0
    while warmed < subject.warm_ups or time.perf_counter() - begun < subject.warm_seconds:
        work()
        warmed += 1
        if on_card:
            torch.cuda.synchronize()
    for _ in range(min(most, subject.repeats)):
        if not on_card:
            begun = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - begun))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(together):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / together)
    return float(statistics.median(times))
