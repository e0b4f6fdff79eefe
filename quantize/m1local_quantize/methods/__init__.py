"""Quantization methods: how the values that a format stores are chosen, one file per method.

What it is: the table of methods and the contract they keep: rows (n, K) of a matrix and a spec in,
the tensors of those rows out, as `QuantizedLinear.quantize`. What it is not: storage; a method
changes neither the bytes of a checkpoint nor how it runs. To add one, write its file and its line
in `METHODS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from m1local.formats import FORMATS, GROUPED, LinearSpec, format_class

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    QuantizeRows = Callable[[Tensor, LinearSpec], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Method:
    """Formats a method can choose values for, and where its function is."""

    formats: frozenset[str]
    function: str | None = None  # module:name; None is the format's own rounding


METHODS = {
    "rtn": Method(frozenset(FORMATS)),
    "hqq": Method(GROUPED, "m1local_quantize.methods.hqq:quantize"),
    # With the inputs of a matrix it is gptq.prepare; without them, refit (see convert.py).
    "gptq": Method(GROUPED, "m1local_quantize.methods.refit:quantize"),
    "refit": Method(GROUPED, "m1local_quantize.methods.refit:quantize"),
    # As gptq's: the matrices of layers come from optimum_gptq.Quantized, a head from refit.
    "optimum-gptq": Method(frozenset({"int4"}), "m1local_quantize.methods.refit:quantize"),
}
NEED_INPUTS = frozenset({"gptq", "optimum-gptq"})  # a text that comes into the matrices


def method_for(method: str, spec: LinearSpec) -> str:
    """`method` where it knows the format of `spec`, else "rtn": rounding to nearest."""
    return method if spec.format in METHODS[method].formats else "rtn"


def quantizer(method: str, spec: LinearSpec) -> "QuantizeRows":
    """The function that quantizes rows by `method`, or by rounding where it does not apply."""
    function = METHODS[method_for(method, spec)].function
    if function is None:
        return format_class(spec.format).quantize
    module, _, name = function.partition(":")
    found: QuantizeRows = getattr(import_module(module), name)
    return found
