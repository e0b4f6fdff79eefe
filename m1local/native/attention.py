"""Attention of a few new tokens over the cache, in the compiled library.

What it is: tensors in, a tensor out, None where there is no library or it does not serve; then
torch does it (m1local/model.py), the oracle of tests/test_native_attention.py. Keys and values are
read where the cache keeps them, as they are. What it is not: for prompts; of many rows torch's
attention is as fast.
"""

import ctypes

import torch
from torch import Tensor

from m1local.kv_store import KVStore
from m1local.native.library import address, library

ROWS = 8  # new tokens up to which it serves
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class _Attention(ctypes.Structure):
    """`Attention` of common.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scales", "v_scales")),
        *((name, ctypes.c_void_p) for name in ("query_positions", "key_positions", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "width")),
        *((name, ctypes.c_int64) for name in ("slots", "used", "window")),
        *((name, ctypes.c_int32) for name in ("is_wide", "kind")),
        ("scale", ctypes.c_float),
    )


def attend(
    q: Tensor,
    k: KVStore,
    v: KVStore,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
) -> Tensor | None:
    """Queries (1, H, T, D) over what is kept -> (1, T, H * D) in q's dtype.

    `key_positions` (S,) int64 says which position each of the first S slots holds.
    """
    compiled = library()
    if compiled is None or not _serves(q, k) or not _serves(q, v):
        return None
    _, heads, rows, width = q.shape
    q = q.contiguous()
    out = q.new_empty(1, rows, heads * width)
    asked = _Attention(
        address(q), address(k.values), address(v.values), address(k.scales), address(v.scales),
        address(query_positions), address(key_positions), address(out),
        rows, heads, k.values.shape[1], width,
        k.values.shape[2], key_positions.shape[0], window or 0,
        q.dtype != torch.bfloat16, KINDS[k.values.dtype], width**-0.5,
    )  # fmt: skip
    return out if compiled.m1_attend(ctypes.byref(asked), torch.get_num_threads()) else None


def _serves(q: Tensor, kept: KVStore) -> bool:
    return (
        q.device.type == kept.values.device.type == "cpu"
        and q.shape[0] == 1
        and 0 < q.shape[2] <= ROWS
        and q.dtype in (torch.bfloat16, torch.float32)
        and kept.values.dtype in KINDS
        and kept.values.is_contiguous()
    )
