"""Multiplying by matrices as the checkpoint stores them, in the compiled library.

What it is: tensors in, a tensor out, by whole numbers: the activations are rounded to bytes, each
group of columns with a scale of its own (matmul.c); for int8 to two bytes each, which loses next to
nothing. None where there is no library, or it does not know a tensor's kind, and then torch does
it. What it is not: bit-equal to torch, as quantizing is; tests/test_native_matmul.py has the bound.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from m1local.native.library import address, library

ROWS = 512  # of activations at a time: what is summed stays in the cache
SHORT = torch.bfloat16


class Matrix(ctypes.Structure):
    """`Stored` of common.h: a matrix as it is stored, valid while its tensors are held."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("low", "high", "scales", "zeros", "row_scales")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("low_bits", "high_bits", "middle", "size")),
    )


def usable() -> bool:
    """Whether the library is there."""
    return library() is not None


def multiply(x: Tensor, matrix: Matrix) -> Tensor | None:
    """x (M, K) @ W.T -> (M, N) in x's dtype."""
    compiled, rows = library(), _rows(x)
    if compiled is None or rows is None:
        return None
    product = rows.new_empty(rows.shape[0], matrix.rows)
    for start in range(0, rows.shape[0], ROWS):
        part, into = rows[start : start + ROWS], product[start : start + ROWS]
        done = compiled.m1_multiply(
            address(part), rows.dtype != SHORT, ctypes.c_int64(part.shape[0]),
            ctypes.byref(matrix), address(into), torch.get_num_threads(),
        )  # fmt: skip
        if not done:
            return None
    return product.to(x.dtype)


def groups_matrix(
    planes: Sequence[Tensor], scales: Tensor, zeros: Tensor, group_size: int, middle: int
) -> Matrix | None:
    """Groups of a few bits, as stored; None where they cannot be read.

    `planes` hold (N, K * bits / 8) uint8, the lowest bits first; `scales` and `zeros`
    (N, K/group) bfloat16; `middle` is the code that means exactly the zero.
    """
    low, high = planes[0], planes[1] if len(planes) > 1 else None
    if not usable() or not _lie_well((low, high, scales, zeros)):
        return None
    columns = scales.shape[1] * group_size
    bits = [plane.shape[1] * 8 // columns for plane in planes]
    return Matrix(
        address(low), address(high), address(scales), address(zeros), None,
        low.shape[0], columns, bits[0], bits[1] if high is not None else 0, middle, group_size,
    )  # fmt: skip


def int8_matrix(codes: Tensor, scales: Tensor) -> Matrix | None:
    """Rows of bytes, `codes` (N, K) int8 and `scales` (N,) float32; None as above."""
    compiled = library()
    if compiled is None or not _lie_well((codes, scales)):
        return None
    size = compiled.m1_group_of_x()
    return Matrix(address(codes), None, None, None, address(scales), *codes.shape, 8, 0, 0, size)


def instructions() -> str:
    """What the products are made of: "AVX-512 VNNI", "AVX2" or "plain C"; "" without a library."""
    compiled = library()
    if compiled is None:
        return ""
    compiled.m1_lanes.restype = ctypes.c_char_p
    said: bytes = compiled.m1_lanes()
    return said.decode()


def _rows(x: Tensor) -> Tensor | None:
    """x as the library reads it; None where there is nothing to multiply, or not here."""
    if x.device.type != "cpu" or x.numel() == 0:
        return None
    return (x if x.dtype in (SHORT, torch.float32) else x.float()).contiguous()


def _lie_well(stored: Sequence[Tensor | None]) -> bool:
    """Whether stored tensors can be read where they lie."""
    return all(
        tensor is None
        or (
            tensor.device.type == "cpu"
            and tensor.is_contiguous()
            and tensor.data_ptr() % tensor.itemsize == 0
        )
        for tensor in stored
    )
