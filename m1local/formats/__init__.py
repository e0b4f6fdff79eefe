"""Storage formats: how a matrix is stored and multiplied, one file per format.

What it is: the table of formats and the contract they keep (m1local/formats/base.py). What it is
not: quantization methods, which choose the values a format stores (m1local_quantize). To add a
format, write its file and its line in `FORMATS`.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from m1local.errors import CheckpointError

if TYPE_CHECKING:
    from m1local.formats.base import QuantizedLinear

# Modules are imported when a format is first asked for: bitsandbytes alone takes seconds.
FORMATS = {
    "int8": "m1local.formats.int8:Int8Linear",
    "int3": "m1local.formats.groups:Int3Linear",
    "int4": "m1local.formats.groups:Int4Linear",
    "int5": "m1local.formats.groups:Int5Linear",
    "int6": "m1local.formats.groups:Int6Linear",
    "bnb-nf4": "m1local.formats.bnb:BnbNf4Linear",
    "bnb-nf4-dq": "m1local.formats.bnb:BnbNf4DqLinear",
    "bnb-fp4": "m1local.formats.bnb:BnbFp4Linear",
    "bnb-int8": "m1local.formats.bnb:BnbInt8Linear",
}
GROUPED = frozenset({"int3", "int4", "int5", "int6"})  # a spec of theirs has a group size


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """How one matrix is stored; "float" means as it was."""

    format: str
    group_size: int | None = None


def format_class(name: str) -> "type[QuantizedLinear]":
    """The class of the format `name`; raises CheckpointError where there is none."""
    if name not in FORMATS:
        raise CheckpointError(
            f"The format {name!r} is unknown to this m1local; it knows {', '.join(FORMATS)}. "
            "Update m1local, or quantize again."
        )
    module, _, class_name = FORMATS[name].partition(":")
    found: type[QuantizedLinear] = getattr(import_module(module), class_name)
    return found
