"""How fast a loaded model is: tokens per second of prompts and answers, beside the memory's speed.

What it is: prompts of random tokens read, and single tokens fed, with so much context before them;
each repeated, beside the bandwidth of the same minute. What it is not: about quality or text; the
context before a measured token is made up, since only its bytes cost time.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from m1local.checkpoint import EMBEDDING
from m1local.engine import Engine
from m1local.memory import bandwidth, read_bytes

SEED = 0
WARMING = 16  # tokens before the first that is measured


@dataclass(frozen=True, slots=True)
class Case:
    """So many tokens of a prompt, or of an answer, after so many others."""

    tokens: int
    depth: int = 0
    is_answer: bool = True

    @property
    def name(self) -> str:
        """As llama.cpp names it: pp512, tg64, tg64@d4096."""
        depth = f"@d{self.depth}" if self.depth else ""
        return f"{'tg' if self.is_answer else 'pp'}{self.tokens}{depth}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a case took: the seconds of each repetition."""

    case: Case
    seconds: tuple[float, ...]
    bytes_per_token: int  # weights, keys and values read for a token of an answer
    bandwidth: float  # bytes per second that the device read in between
    card_bytes: int = 0  # at most allocated on a card meanwhile

    @property
    def tokens_per_second(self) -> float:
        """The median of the repetitions."""
        return self.case.tokens / statistics.median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        """What an answer reads in a second; 0 for a prompt, which computes more than it reads."""
        return self.bytes_per_token * self.tokens_per_second if self.case.is_answer else 0.0

    @property
    def share(self) -> float:
        """What part of the bandwidth that is."""
        return self.bytes_per_second / self.bandwidth


def cases(prompts: Sequence[int], answers: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """All of them: prompts, then answers, at every depth."""
    kinds = [(tokens, False) for tokens in prompts] + [(tokens, True) for tokens in answers]
    return [Case(tokens, depth, kind) for tokens, kind in kinds for depth in depths]


def room_for(wanted: Sequence[Case]) -> int:
    """Tokens of context that all cases need."""
    return max(case.depth + case.tokens for case in wanted)


@torch.inference_mode()
def measure(engine: Engine, wanted: Sequence[Case], repetitions: int) -> Iterator[Measured]:
    """Measure every case, after tokens nobody counts; the bandwidth is read in between.

    Of a model on two devices the bandwidth is that of both, each by the bytes that lie there.
    """
    for case in wanted:
        seconds, rates, parts = [], [], bytes_by_device(engine, case)
        peaks = [_peak(engine, warm_up(case, engine.context.device))[1]]
        for _ in range(repetitions):
            rates.append(joint_bandwidth(parts, {device: bandwidth(device) for device in parts}))
            taken, peak = _peak(engine, case)
            seconds.append(taken)
            peaks.append(peak)
        read, rate = sum(parts.values()), statistics.median(rates)
        yield Measured(case, tuple(seconds), read, rate, max(peaks))


def warm_up(case: Case, device: torch.device) -> Case:
    """What is run before the clock: on a card all of a prompt, whose kernels are compiled by size.

    The first token of an answer captures the graph.
    """
    whole = device.type == "cuda" and not case.is_answer
    return case if whole else replace(case, tokens=min(case.tokens, WARMING))


def joint_bandwidth(
    nbytes: Mapping[torch.device, int], speeds: Mapping[torch.device, float]
) -> float:
    """Bytes per second of what is read from several devices, one after the other."""
    return sum(nbytes.values()) / sum(n / speeds[device] for device, n in nbytes.items())


def _peak(engine: Engine, case: Case) -> tuple[float, int]:
    """Seconds of one repetition, and the most that a card held; what the bandwidth took is gone."""
    if engine.context.device.type != "cuda":
        return _run(engine, case), 0
    torch.cuda.reset_peak_memory_stats()
    return _run(engine, case), torch.cuda.max_memory_allocated()


def _run(engine: Engine, case: Case) -> float:
    """Seconds of one repetition."""
    context, generator = engine.context, torch.Generator().manual_seed(SEED)
    _begin_at(engine, case.depth)
    vocabulary = min(engine.tokenizer.vocab_size, engine.model.config.vocab_size)
    drawn = torch.randint(vocabulary, (case.tokens,), generator=generator).tolist()
    step = 1 if case.is_answer else context.cache.max_chunk
    _finish(context.device)
    begun = time.perf_counter()
    for start in range(0, len(drawn), step):
        context.feed(drawn[start : start + step])
    _finish(context.device)
    return time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    """Wait for what a card was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _begin_at(engine: Engine, depth: int) -> None:
    """An empty context, or one that takes itself for `depth` tokens long."""
    context = engine.context
    context.keep_common([0])
    for layer in context.cache.layers:
        layer.written = layer.raw_start = depth
    context.cache.position = depth
    context.token_ids = [0] * depth


def bytes_of_token(engine: Engine, case: Case) -> int:
    """Bytes read for a token in the middle of the case: weights but the embedding, and keys."""
    return sum(bytes_by_device(engine, case).values())


def bytes_by_device(engine: Engine, case: Case) -> dict[torch.device, int]:
    """The same by where they lie."""
    model = engine.model
    found: dict[torch.device, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(EMBEDDING):
            found[tensor.device] = found.get(tensor.device, 0) + tensor.nbytes
    seen = case.depth + case.tokens // 2
    for layer in engine.context.cache.layers:
        raw = layer.raw_k
        kept = read_bytes(layer.layout, layer.kv_type, raw.dtype, seen)
        found[raw.device] = found.get(raw.device, 0) + kept
    return found
