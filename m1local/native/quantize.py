"""Calls into the compiled library: groups, rows of bytes, lengths, and whether finite.

What it is: tensors in, tensors out, with torch's own results to the bit; None where there is no
library or where it does not know a tensor's kind, and then torch does it. It runs on as many
threads as torch would. What it is not: the definition of a format or a method; that is the torch
code which calls it, its oracle in the tests.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from m1local.native import recycled
from m1local.native.library import address, library

NARROW = torch.bfloat16
KNOWN = (NARROW, torch.float32)


@dataclass(frozen=True, slots=True)
class Refit:
    """How scale and zero of a group are chosen by least squares (the method refit)."""

    start: float  # the first scale, as a share of the group's range
    rounds: int


@dataclass(frozen=True, slots=True)
class Hqq:
    """How the zero of a group is chosen by half-quadratic splitting (the method hqq)."""

    powers: Sequence[float]  # x^(p - 1) of each power of two, by its exponent's bits: 256
    series: Sequence[float]  # the same of 1 to 2, by powers of the distance from 1.5: 9
    weights: Sequence[float]  # of x^(p - 1), one for each round: 8 at most
    smallest: float


class _Shrinkage(ctypes.Structure):
    """`Shrinkage` of common.h."""

    _fields_ = (
        ("powers", ctypes.c_float * 256),
        ("series", ctypes.c_float * 9),
        ("weights", ctypes.c_float * 8),
        ("smallest", ctypes.c_float),
    )

    @classmethod
    def of(cls, chosen: Hqq) -> Self:
        parts = (cls._fields_[i][1] for i in range(3))
        values = (chosen.powers, chosen.series, chosen.weights)
        filled = (kind(*each) for kind, each in zip(parts, values, strict=True))
        return cls(*filled, chosen.smallest)


class _Levels(ctypes.Structure):
    """`Levels` of common.h."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("highest", ctypes.c_int32),
        ("middle", ctypes.c_int32),
        ("low_bits", ctypes.c_int32),
        ("high_bits", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("start", ctypes.c_float),
    )


def quantize_groups(
    rows: Tensor,
    size: int,
    planes: Sequence[int],
    middle: int,
    choice: Refit | Hqq | None,
) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """Quantize rows (n, K) in groups of `size`: planes of so many bits, scales and zeros.

    Scale and zero span the group's range evenly, or are chosen by a method.
    """
    compiled = _serving(rows)
    count, columns = rows.shape
    if compiled is None or columns % size:
        return None
    high_bits = planes[1] if len(planes) > 1 else 0
    levels = _Levels(size, (1 << sum(planes)) - 1, middle, planes[0], high_bits)
    shrinkage = None
    if isinstance(choice, Refit):
        levels.rounds, levels.start = choice.rounds, choice.start
    elif choice is not None:
        levels.rounds, shrinkage = len(choice.weights), ctypes.byref(_Shrinkage.of(choice))
    packed = [recycled.empty((count, columns * bits // 8), torch.uint8) for bits in planes]
    scales, zeros = torch.empty(2, count, columns // size, dtype=torch.bfloat16)
    compiled.m1_quantize_groups(
        address(rows),
        rows.dtype != NARROW,
        ctypes.c_int64(rows.numel() // size),
        ctypes.byref(levels),
        shrinkage,
        address(packed[0]),
        address(packed[-1]),
        address(scales),
        address(zeros),
        torch.get_num_threads(),
    )
    return packed, scales, zeros


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes (n, K) int8 and scales (n,) float32 of rows (n, K)."""
    compiled = _serving(rows)
    if compiled is None:
        return None
    codes = recycled.empty(rows.shape, torch.int8)
    scales = torch.empty(rows.shape[0], dtype=torch.float32)
    compiled.m1_quantize_rows(
        address(rows),
        rows.dtype != NARROW,
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(rows.shape[1]),
        address(codes),
        address(scales),
        torch.get_num_threads(),
    )
    return codes, scales


def unit_rows(rows: Tensor) -> Tensor | None:
    """Rows (n, K), each divided by its length, in float32; a row of zeros stays."""
    compiled = _serving(rows)
    if compiled is None:
        return None
    count, columns = rows.shape
    kind, sizes = rows.dtype != NARROW, (ctypes.c_int64(count), ctypes.c_int64(columns))
    scratch, squares = torch.empty(columns), torch.empty(count, 1)
    compiled.m1_squared_lengths(address(rows), kind, *sizes, address(scratch), address(squares))
    # The root is torch's: not always the nearest float, so that nothing else has the same bits.
    lengths = squares.sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
    found = recycled.empty((count, columns), torch.float32)
    compiled.m1_divide_rows(address(rows), kind, *sizes, address(lengths), address(found))
    return found


def all_finite(values: Tensor) -> bool | None:
    """Whether all `values` are finite numbers."""
    compiled = _serving(values)
    if compiled is None:
        return None
    wide = values.dtype != NARROW
    return bool(compiled.m1_all_finite(address(values), wide, ctypes.c_int64(values.numel())))


def serves(rows: Tensor) -> bool:
    """Whether the library reads these rows as they lie."""
    return _serving(rows) is not None


def _serving(tensor: Tensor) -> ctypes.CDLL | None:
    """The library, where it reads this tensor as it lies."""
    if tensor.device.type != "cpu" or tensor.dtype not in KNOWN:
        return None
    if not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:  # as a file may hold it
        return None
    return library()
