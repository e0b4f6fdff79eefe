"""From one source tensor to what is stored of it.

What it is: the step of the pipeline that computes; one matrix at a time, in slices of rows. What
it is not: the arithmetic of a format (m1local.formats) or of a method (methods/).
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from m1local.formats import format_class
from m1local.formats.base import ROWS_PER_SLICE
from m1local.formats.slices import ROWS_QUANTIZED
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

    def convert(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        """What is stored of one source tensor, by name and in its order, the largest in parts."""
        source = self._source
        whole = source.tensor(step.name)
        if not step.is_quantized:
            for start in range(0, whole.shape[0], ROWS_PER_SLICE):
                stop = min(start + ROWS_PER_SLICE, whole.shape[0])
                rows = source.narrow_rows(step.name, whole, start, stop)
                yield step.name, rows.to(whole.dtype)
            return
        module = step.name.removesuffix(".weight")
        if self._optimum is not None and module in self._optimum:
            found = self._optimum.tensors(module)
            yield from ((f"{module}.{suffix}", tensor) for suffix, tensor in found.items())
            return
        quantize, rows_per_slice = quantizer(step.method, step.spec), ROWS_QUANTIZED
        if step.method == "gptq" and self._calibrator is not None and module.startswith(LAYER):
            # Given away, not named here: two of the largest are held meanwhile, not three.
            quantize = gptq.prepare(self._calibrator.hessian(module), self._calibrator.inputs)
            rows_per_slice = gptq.ROWS_PER_SLICE
        for suffix, part in format_class(step.spec.format).quantize_parts(
            lambda start, stop: source.narrow_rows(step.name, whole, start, stop),
            (step.shape[0], step.shape[1]),
            step.spec,
            quantize,
            rows_per_slice,
        ):
            yield f"{module}.{suffix}", part
