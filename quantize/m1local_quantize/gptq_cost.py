"""How long gptq takes, from a small piece that is really computed on this machine.

What it is: three rates, measured in a second or two, and the cost law that scales them: products
for the Hessians, for the feedback and for the text's way through each layer; the cube of the
columns for the factorization; the matrix itself for going through it column by column. What it is
not: the disk, attention, or the certificate.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from m1local_quantize.calibration import SAME_INPUT
from m1local_quantize.methods import gptq
from m1local_quantize.plan import Plan, Step
from m1local_quantize.source import Source
from m1local_quantize.stream import LAYER

PIECE = 1024  # columns, and inputs, of the piece
ROUNDS = 3  # the fastest counts: the first warms up, and others use the machine, too
PASSES = 2  # of the text through a layer: as it is in the source, and as it was written


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that this machine takes."""

    multiply: float  # for a product of two numbers in a product of matrices, and its sum
    factor: float  # for the factor of a Hessian with one column; it grows with their cube
    column: float  # for a weight that is rounded and makes up for others, without products

    @classmethod
    def measured(cls, source: Source, step: Step) -> Self:
        """Compute a piece of the matrix `step` with random inputs."""
        columns = min(PIECE, step.shape[1])
        count = min(gptq.ROWS_PER_SLICE, step.shape[0])
        rows = source.rows(step.name, source.tensor(step.name), 0, count)[:, :columns].contiguous()
        x = torch.randn(PIECE, columns, generator=torch.Generator().manual_seed(0))
        multiply = _seconds(lambda: x.T @ x) / (PIECE * columns**2)
        hessian = x.T @ x
        factor = _seconds(lambda: gptq.inverse_factor(hessian.clone())) / columns**3
        quantize = gptq.prepare(hessian.clone())
        products = multiply * count * columns**2 / 2
        alone = _seconds(lambda: quantize(rows, step.spec)) - products
        return cls(multiply, factor, max(0.0, alone) / (count * columns))


def gptq_seconds(steps: Iterable[Step], tokens: int, rates: Rates) -> float:
    """Seconds for the matrices of layers among `steps`, with `tokens` of calibration text."""
    total = 0.0
    for step in steps:
        if not (step.is_quantized and step.name.startswith(LAYER)):
            continue
        rows, columns = step.shape
        name = step.name.removeprefix(LAYER).partition(".")[2].removesuffix(".weight")
        total += rates.multiply * tokens * PASSES * rows * columns
        if name not in SAME_INPUT:
            total += rates.multiply * tokens * columns**2
        if is_gptq(step):
            total += rates.factor * columns**3
            total += rates.column * rows * columns + rates.multiply * rows * columns**2 / 2
    return total


def is_gptq(step: Step) -> bool:
    """Whether the values of `step` are chosen by what comes into it; without inputs it is refit."""
    return step.method == "gptq" and step.name.startswith(LAYER)


def measured_seconds(source: Source, plan: Plan, tokens: int) -> float:
    """Seconds that gptq takes of `plan` on this machine; 0 where it uses none."""
    steps = [step for step in plan.steps if is_gptq(step)]
    if not steps:
        return 0.0
    # A piece that is no multiple of a group would be another matrix.
    largest = max(steps, key=lambda step: (step.shape[1] % PIECE == 0, step.shape[0]))
    return gptq_seconds(plan.steps, tokens, Rates.measured(source, largest))


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
