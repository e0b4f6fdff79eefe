"""torch's packed 4-bit product on a card: what serves int4 where Triton is missing.

What it is: a wrapper around `aten::_weight_int4pack_mm`, which takes cards from 8.0 on, bfloat16
and shapes of whole tiles; the codes are rearranged once, at load, and read back for many rows. What
it is not: fast with those by itself (five times slower than slices, on an H200), or to be had on
the CPU, where tests rearrange codes in its place.
Source: ATen/native/cuda/int4mm.cu of torch 2.8 to 2.13.
"""

from functools import cache

import torch
from torch import Tensor

from m1local.cuda.card import card

INNER_TILES = 8  # that one thread reads at a time: 16 bytes
TILE = (8, 16 * INNER_TILES)  # rows and columns that are packed together, tile after tile
DIGITS = 3  # of a place in a tile, in hexadecimal
MOST_ROWS = 64  # it decodes W once for each sixteen: more are multiplied by restored slices
OLDEST = (8, 0)
NAME = "torch's _weight_int4pack_mm"


def serves(device: torch.device, shape: tuple[int, int]) -> bool:
    """Whether torch's operator takes a matrix of `shape` (N, K) on `device`."""
    if device.type != "cuda" or card(device).capability < OLDEST:
        return False
    return shape[0] % TILE[0] == 0 and shape[1] % TILE[1] == 0


def pack(codes: Tensor) -> Tensor:
    """Stored codes (N, K/2) in torch's order, which has the even column in the high nibble."""
    return _converted(codes << 4 | codes >> 4)


def _converted(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(codes, INNER_TILES)
    return packed


def multiplies(device: torch.device, rows: int) -> bool:
    """Whether so many rows of activations are the operator's, and not those of restored slices."""
    return rows <= MOST_ROWS or layout(device) is None


def multiply(x: Tensor, packed: Tensor, group_size: int, scales_zeros: Tensor) -> Tensor:
    """x (M, K) @ W.T -> (M, N) in x's dtype; `scales_zeros` (K/group, N, 2) bfloat16."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm(
        x.to(torch.bfloat16), packed, group_size, scales_zeros
    )
    return product.to(x.dtype)


@cache
def layout(device: torch.device) -> Tensor | None:
    """Where the codes of a tile (8, 128) lie among its packed nibbles: (1024,) int64.

    Learned by packing each code's own place, since it is documented nowhere; None where what is
    packed so cannot be read back, and the operator is to multiply any number of rows.
    """
    rows, columns = TILE
    place = torch.arange(rows * columns, device=device).view(TILE)
    holds = torch.zeros(rows * columns, dtype=torch.long, device=device)
    for digit in range(DIGITS):
        nibbles = (place >> 4 * digit & 15).to(torch.uint8)
        holds += _nibbles(pack(_joined(nibbles))).long() << 4 * digit
    found = holds.argsort()
    codes = (torch.arange(4 * rows * columns, device=device) * 7 % 13).to(torch.uint8)
    codes = codes.view(2 * rows, 2 * columns)
    back = _unpacked(pack(_joined(codes)), found, 2 * columns)
    return found if torch.equal(back, codes) else None


def unpack(packed: Tensor, columns: int, start: int, stop: int) -> Tensor:
    """Codes (n, K) uint8 of the rows from `start` to `stop`; there must be a `layout`."""
    found, rows = layout(packed.device), TILE[0]
    assert found is not None, "what is packed cannot be read back"
    first = start // rows
    codes = _unpacked(packed[first : -(-stop // rows)], found, columns)
    return codes[start - first * rows : stop - first * rows]


def _unpacked(packed: Tensor, found: Tensor, columns: int) -> Tensor:
    tiles = _nibbles(packed).view(-1, len(found)).index_select(1, found)
    tiles = tiles.view(-1, columns // TILE[1], *TILE).transpose(1, 2)
    return tiles.reshape(-1, columns)


def _nibbles(packed: Tensor) -> Tensor:
    whole = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack((whole & 15, whole >> 4), -1).flatten()


def _joined(codes: Tensor) -> Tensor:
    """Codes (N, K) as they are stored, (N, K/2): the even column in the low nibble."""
    return codes[:, ::2] | codes[:, 1::2] << 4
