"""Multiplying by matrices as the checkpoint stores them, in the compiled library.

What it is: tensors in, a tensor out, by whole numbers: the activations are rounded to bytes, each
group of columns with a scale of its own (matmul.c); for int8 to two bytes each, which loses next to
nothing. None where there is no library, or it does not know a tensor's kind, and then torch does
it. What it is not: bit-equal to torch, as quantizing is; tests/test_native_matmul.py has the bound.
"""

import ctypes

import torch
from torch import Tensor

from m1local.native.library import library

ROWS = 256  # of activations: above, dequantized slices and torch's float product are as fast
SHORT = torch.bfloat16


def usable() -> bool:
    """Whether the library is there."""
    return library() is not None


def multiply_int4(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int
) -> Tensor | None:
    """x (M, K) @ W.T -> (M, N) in x's dtype, for groups of four bits as stored.

    `codes` (N, K/2) uint8, `scales` and `zeros` (N, K/group) bfloat16.
    """
    size = ctypes.c_int(group_size)
    return _multiply("m1_multiply_int4", x, (codes, scales, zeros), size)


def multiply_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor | None:
    """x (M, K) @ W.T -> (M, N) in x's dtype, for `codes` (N, K) int8 and `scales` (N,) float32."""
    return _multiply("m1_multiply_int8", x, (codes, scales))


def instructions() -> str:
    """What the products are made of: "AVX-512 VNNI", "AVX2" or "plain C"; "" without a library."""
    compiled = library()
    if compiled is None:
        return ""
    compiled.m1_lanes.restype = ctypes.c_char_p
    said: bytes = compiled.m1_lanes()
    return said.decode()


def _multiply(name: str, x: Tensor, stored: tuple[Tensor, ...], *more: object) -> Tensor | None:
    """The product by the function `name`; the first of `stored` are the codes, a row for each N."""
    compiled, rows = library(), _rows(x)
    if compiled is None or rows is None or not _lie_well(*stored):
        return None
    product = rows.new_empty(rows.shape[0], stored[0].shape[0])
    done = getattr(compiled, name)(
        _at(rows),
        rows.dtype != SHORT,
        ctypes.c_int64(rows.shape[0]),
        *map(_at, stored),
        ctypes.c_int64(stored[0].shape[0]),
        ctypes.c_int64(rows.shape[1]),
        *more,
        _at(product),
        torch.get_num_threads(),
    )
    return product.to(x.dtype) if done else None


def _rows(x: Tensor) -> Tensor | None:
    """x as the library reads it; None for too many rows or none."""
    if x.device.type != "cpu" or not 0 < x.shape[0] <= ROWS or x.shape[1] == 0:
        return None
    return (x if x.dtype in (SHORT, torch.float32) else x.float()).contiguous()


def _lie_well(*stored: Tensor) -> bool:
    """Whether stored tensors can be read where they lie."""
    return all(
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.data_ptr() % tensor.itemsize == 0
        for tensor in stored
    )


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
