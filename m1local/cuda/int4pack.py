"""torch's packed 4-bit product on a card: what serves int4 where Triton is missing.

What it is: a wrapper around `aten::_weight_int4pack_mm`, which takes cards from 8.0 on, bfloat16
and shapes of whole tiles; the codes are rearranged once, at load. What it is not: tested; it has no
counterpart on the CPU, so only bench/gpu.py and the tests marked gpu run it.
Source: ATen/native/cuda/int4mm.cu of torch 2.8 to 2.13.
"""

import torch
from torch import Tensor

from m1local.cuda.card import card

INNER_TILES = 8  # that one thread reads at a time: 16 bytes
OLDEST = (8, 0)
NAME = "torch's _weight_int4pack_mm"


def serves(device: torch.device, shape: tuple[int, int]) -> bool:
    """Whether torch's operator takes a matrix of `shape` (N, K) on `device`."""
    if device.type != "cuda" or card(device).capability < OLDEST:
        return False
    return shape[0] % 8 == 0 and shape[1] % (16 * INNER_TILES) == 0


def pack(codes: Tensor) -> Tensor:
    """Stored codes (N, K/2) in torch's order, which has the even column in the high nibble."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(
        codes << 4 | codes >> 4, INNER_TILES
    )
    return packed


def multiply(x: Tensor, packed: Tensor, group_size: int, scales_zeros: Tensor) -> Tensor:
    """x (M, K) @ W.T -> (M, N) in x's dtype; `scales_zeros` (K/group, N, 2) bfloat16."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm(
        x.to(torch.bfloat16), packed, group_size, scales_zeros
    )
    return product.to(x.dtype)


def restored(packed: Tensor, columns: int, group_size: int, scales_zeros: Tensor) -> Tensor:
    """W (N, K) bfloat16, found by multiplying by one: torch has no way back."""
    one = torch.eye(columns, dtype=torch.bfloat16, device=packed.device)
    return multiply(one, packed, group_size, scales_zeros).T
