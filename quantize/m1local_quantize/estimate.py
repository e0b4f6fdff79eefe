"""What a quantization will take, before it is begun: bytes, memory, seconds.

What it is: sizes from the plan, which are exact; memory from what is under way at once; time from
converting a few rows of one matrix of each kind on this machine (gptq: gptq_cost.py). What it is
not: a promise; the disk may be slower than the processor, and optimum is not timed.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

from m1local.formats.base import WEIGHTS_PER_PART
from m1local.formats.slices import AHEAD, ROWS_QUANTIZED, for_slices
from m1local_quantize.gptq_cost import is_gptq, measured_seconds
from m1local_quantize.methods import gptq, optimum_gptq, quantizer
from m1local_quantize.passage import MOST_PENDING
from m1local_quantize.plan import Plan, Step
from m1local_quantize.source import Source
from m1local_quantize.stream import LAYER

FLOAT32_BYTES = 4
ROUNDS = 3
SLICES = 4  # for each thread
COPIES = 6  # of a slice in float32 that a method works with, about
HESSIANS = 2  # matrices of its size that gptq holds


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes read and written, bytes of memory held at most, and seconds of computing."""

    source_bytes: int
    target_bytes: int
    memory_bytes: int
    seconds: float | None  # None where a method is not timed


def estimate(source: Source, plan: Plan, calibration_tokens: int = 0) -> Estimate:
    """Estimate `plan` for `source` on this machine; reads a few rows of some matrices.

    `calibration_tokens` are those of the text that gptq reads.
    """
    kept = max((_kept_bytes(step) for step in plan.steps), default=0)
    widest = max((step.shape[-1] for step in plan.steps if step.is_quantized), default=0)
    rows = ROWS_QUANTIZED * torch.get_num_threads()
    parts = MOST_PENDING + 2 + (AHEAD + 1) * torch.get_num_threads()
    memory = kept + (COPIES * rows * widest + parts * WEIGHTS_PER_PART) * FLOAT32_BYTES
    if plan.needs_calibration:  # the layer is let go before its matrices' rows are copied
        layers = [step for step in plan.steps if step.name.startswith(LAYER)]
        written = 2 * max((step.nbytes for step in layers), default=0)
        floats = HESSIANS * widest**2 + max(
            _layer_weights(plan), COPIES * gptq.ROWS_PER_SLICE * widest
        )
        memory = max(memory, written + floats * FLOAT32_BYTES)
    whole = optimum_gptq.matrices(plan)
    if whole:
        weights = sum(_weights(step) for step in plan.steps if _module(step) in whole)
        memory += weights * FLOAT32_BYTES  # the original, as a whole
    timed = not whole and not source.files.passing  # which would fetch them
    return Estimate(
        source_bytes=plan.source_bytes,
        target_bytes=plan.target_bytes,
        memory_bytes=memory,
        seconds=_seconds(source, plan, calibration_tokens) if timed else None,
    )


def _seconds(source: Source, plan: Plan, calibration_tokens: int) -> float:
    kinds: dict[tuple[object, str], list[Step]] = {}
    for step in plan.steps:
        if step.is_quantized and not is_gptq(step):
            kinds.setdefault((step.spec, step.method), []).append(step)
    return measured_seconds(source, plan, calibration_tokens) + sum(
        _seconds_per_weight(source, max(steps, key=_weights)) * sum(map(_weights, steps))
        for steps in kinds.values()
    )


def _kept_bytes(step: Step) -> int:
    """Bytes that are held until all of a matrix is quantized: all but its first tensor."""
    return step.nbytes - next(iter(step.tensors.values())).nbytes


def _layer_weights(plan: Plan) -> int:
    layer: Counter[str] = Counter()
    for step in plan.steps:
        if step.name.startswith(LAYER):
            layer[step.name.removeprefix(LAYER).partition(".")[0]] += math.prod(step.shape)
    return max(layer.values(), default=0)


def _module(step: Step) -> str:
    return step.name.removesuffix(".weight")


def _weights(step: Step) -> int:
    return step.shape[0] * step.shape[1]


def _seconds_per_weight(source: Source, step: Step) -> float:
    whole = source.tensor(step.name)
    rows = min(SLICES * ROWS_QUANTIZED * torch.get_num_threads(), step.shape[0])
    quantize = quantizer(step.method, step.spec)

    def work(start: int, stop: int) -> None:
        quantize(source.narrow_rows(step.name, whole, start, stop), step.spec)

    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for_slices(work, rows, ROWS_QUANTIZED)
        times.append(time.perf_counter() - begun)
    return min(times) / (rows * step.shape[1])
