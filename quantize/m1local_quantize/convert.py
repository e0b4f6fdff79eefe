"""From one source tensor to what is stored of it.

What it is: the step of the pipeline that computes; one matrix at a time, in slices of rows. What
it is not: the arithmetic of a format (m1local.formats) or of a method (methods/).
"""

from pathlib import Path

import torch
from torch import Tensor

from m1local.formats import format_class
from m1local.formats.base import ROWS_PER_SLICE, ROWS_QUANTIZED
from m1local_quantize.calibration import Calibrator
from m1local_quantize.methods import gptq, optimum_gptq, quantizer
from m1local_quantize.plan import Plan, Step
from m1local_quantize.source import Source
from m1local_quantize.stream import LAYER
from m1local_quantize.text import Text


class Converter:
    """Quantizes the tensors of one source, in their order."""

    def __init__(self, source: Source, target: Path, plan: Plan, text: Text | None) -> None:
        """`text` is what gptq and optimum are calibrated with; None where neither is used."""
        self._source = source
        self._calibrator = (
            Calibrator(source, target, plan, text.samples) if text is not None else None
        )
        self._optimum = (
            optimum_gptq.Quantized(source, plan, text.samples) if text is not None else None
        )

    def convert(self, step: Step) -> dict[str, Tensor]:
        """What is stored of one source tensor."""
        source = self._source
        whole = source.tensor(step.name)
        if not step.is_quantized:
            copy = torch.empty_like(whole)
            for start in range(0, whole.shape[0], ROWS_PER_SLICE):
                stop = min(start + ROWS_PER_SLICE, whole.shape[0])
                copy[start:stop] = source.narrow_rows(step.name, whole, start, stop)
            return {step.name: copy}
        module = step.name.removesuffix(".weight")
        if self._optimum is not None and module in self._optimum:
            found = self._optimum.tensors(module)
            return {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}
        quantize, rows_per_slice = quantizer(step.method, step.spec), ROWS_QUANTIZED
        if step.method == "gptq" and self._calibrator is not None and module.startswith(LAYER):
            # Given away, not named here: two of the largest are held meanwhile, not three.
            quantize = gptq.prepare(self._calibrator.hessian(module), self._calibrator.inputs)
            rows_per_slice = gptq.ROWS_PER_SLICE
        tensors = format_class(step.spec.format).quantize_matrix(
            lambda start, stop: source.narrow_rows(step.name, whole, start, stop),
            (step.shape[0], step.shape[1]),
            step.spec,
            quantize,
            rows_per_slice,
        )
        return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
