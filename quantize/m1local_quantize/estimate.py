"""What a quantization will take, before it is begun: bytes, memory, seconds.

What it is: sizes from the plan, which are exact; memory from the largest matrix; time from
converting a few rows of one matrix of each kind on this machine. What it is not: a promise; the
disk may be slower than the processor, and gptq is not timed.
"""

import time
from dataclasses import dataclass

from m1local.formats.base import ROWS_QUANTIZED
from m1local_quantize.methods import quantizer
from m1local_quantize.plan import Plan, Step
from m1local_quantize.source import Source

FLOAT32_BYTES = 4
ROUNDS = 3
COPIES = 4  # of a slice in float32 that a method works with, about


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes read and written, bytes of memory held at most, and seconds of computing."""

    source_bytes: int
    target_bytes: int
    memory_bytes: int
    seconds: float | None  # None where a method is not timed


def estimate(source: Source, plan: Plan) -> Estimate:
    """Estimate `plan` for `source` on this machine; reads a few rows of some matrices."""
    largest = max((step.nbytes for step in plan.steps), default=0)
    widest = max((step.shape[-1] for step in plan.steps if step.is_quantized), default=0)
    slices = COPIES * ROWS_QUANTIZED * widest * FLOAT32_BYTES
    return Estimate(
        source_bytes=plan.source_bytes,
        target_bytes=plan.target_bytes,
        memory_bytes=largest + slices,
        seconds=None if plan.needs_calibration else _seconds(source, plan),
    )


def _seconds(source: Source, plan: Plan) -> float:
    kinds: dict[tuple[object, str], list[Step]] = {}
    for step in plan.steps:
        if step.is_quantized:
            kinds.setdefault((step.spec, step.method), []).append(step)
    return sum(
        _seconds_per_weight(source, max(steps, key=_weights)) * sum(map(_weights, steps))
        for steps in kinds.values()
    )


def _weights(step: Step) -> int:
    return step.shape[0] * step.shape[1]


def _seconds_per_weight(source: Source, step: Step) -> float:
    whole = source.tensor(step.name)
    rows = min(ROWS_QUANTIZED, step.shape[0])
    quantize = quantizer(step.method, step.spec)
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        quantize(source.rows(step.name, whole, 0, rows), step.spec)
        times.append(time.perf_counter() - begun)
    return min(times) / (rows * step.shape[1])
