"""torch's packed 4-bit layout on the CPU: pack, multiply, and read back.

What it is: a wrapper around `aten::_weight_int4pack_mm_for_cpu`, which decodes about five times
faster than a matrix dequantized in torch. Its layout depends on the processor torch found (blocks
of 32 rows with AVX2, of 64 with AVX512) and is documented nowhere, so it is learned by packing a
known matrix; reading back is what prefill and the tests need. What it is not: a storage layout;
nothing packed here is ever written to a file.
Source: ATen/native/cpu/int4mm_kernel.cpp of torch 2.8 to 2.13.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # whole blocks on every processor; other row counts stay unpacked
ROWS_PER_PACK = 1024  # packing goes through int32: bounds its memory


class Layout(NamedTuple):
    """Which row of a block lies in the low and which in the high nibble of each byte."""

    block: int
    low: Tensor  # (block / 2,)
    high: Tensor  # (block / 2,)


def serves(out_features: int, in_features: int) -> bool:
    """Whether torch's operator takes a matrix of this shape, and was found to be readable."""
    return out_features % ROWS == 0 and in_features % 32 == 0 and layout() is not None


@cache
def layout() -> Layout | None:
    """Learn the layout by packing row numbers; None where torch has no such operator."""
    columns = 32
    rows = torch.arange(ROWS, dtype=torch.int32)
    try:
        low_bits, high_bits = (
            _pack_codes(part[:, None].expand(ROWS, columns).contiguous()).flatten()
            for part in (rows & 15, rows >> 4)
        )
    except (RuntimeError, AttributeError):
        return None
    in_low = (low_bits & 15) + 16 * (high_bits & 15)
    in_high = (low_bits >> 4) + 16 * (high_bits >> 4)
    for block in (64, 32):
        half = block // 2
        seen = torch.cat((in_low[:half], in_high[:half])).sort().values
        if torch.equal(seen, torch.arange(block, dtype=seen.dtype)):
            found = Layout(block, in_low[:half].long(), in_high[:half].long())
            return found if _reads_back(found, columns) else None
    return None


def pack(nibbles: Tensor) -> Tensor:
    """Rearrange stored codes (N, K/2) into torch's order, without a second whole copy."""
    packed = torch.empty_like(nibbles, memory_format=torch.contiguous_format)
    for start in range(0, nibbles.shape[0], ROWS_PER_PACK):
        part = nibbles[start : start + ROWS_PER_PACK]
        codes = torch.stack((part & 15, part >> 4), dim=-1).flatten(1).to(torch.int32)
        packed[start : start + ROWS_PER_PACK] = _pack_codes(codes)
    return packed


def unpack(packed: Tensor, start: int, stop: int) -> Tensor:
    """Codes (n, K) of the rows `start` to `stop`."""
    found = layout()
    if found is None:
        raise ValueError("nothing can have been packed: torch has no int4 operator here")
    first, last = start // found.block, -(-stop // found.block)
    return _unpack_blocks(packed, first, last, found)[start - first * found.block :][: stop - start]


def multiply(x: Tensor, packed: Tensor, group_size: int, scales_zeros: Tensor) -> Tensor:
    """(M, K) -> (M, N) in bfloat16, the only dtype for which the operator is fast."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(torch.bfloat16), packed, group_size, scales_zeros
    )
    return product


def _pack_codes(codes: Tensor) -> Tensor:
    """(n, K) int32 codes -> (n, K/2) bytes; whole blocks of rows are independent of each other."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    return packed


def _unpack_blocks(packed: Tensor, first: int, last: int, found: Layout) -> Tensor:
    columns = packed.shape[1] * 2
    blocks = packed.flatten().view(-1, columns, found.block // 2)[first:last].transpose(1, 2)
    codes = torch.empty((blocks.shape[0], found.block, columns), dtype=torch.uint8)
    codes[:, found.low] = blocks & 15
    codes[:, found.high] = blocks >> 4
    return codes.flatten(0, 1)


def _reads_back(found: Layout, columns: int) -> bool:
    # A matrix without any regularity the layout could hide behind; no draw from a global generator.
    codes = torch.arange(ROWS * columns, dtype=torch.int32).square().view(ROWS, columns) % 251 % 16
    back = _unpack_blocks(_pack_codes(codes), 0, ROWS // found.block, found)
    return torch.equal(back, codes.to(torch.uint8))
