"""Codes that torch rearranges on a card are read back, whatever its order within a tile is."""

import pytest
import torch
from torch import Tensor

from m1local.cuda import int4pack
from m1local.cuda.int4pack import TILE, layout, multiplies, pack, unpack

CPU = torch.device("cpu")
ROWS, COLUMNS = 3 * TILE[0], 2 * TILE[1]
SIZE = TILE[0] * TILE[1]


def rearranged(codes: Tensor) -> Tensor:
    """Like torch's: tile after tile, its nibbles in an order that nobody documents."""
    high_first = torch.stack((codes >> 4, codes & 15), -1).flatten(1)
    rows, columns = high_first.shape
    tiles = high_first.view(rows // TILE[0], TILE[0], columns // TILE[1], TILE[1]).transpose(1, 2)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(3))
    nibbles = tiles.reshape(-1, SIZE)[:, order].to(torch.uint8)
    packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)
    return packed.view(rows // TILE[0], columns // TILE[1], 32, int4pack.INNER_TILES // 2)


@pytest.fixture(autouse=True)
def _packer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4pack, "_converted", rearranged)
    monkeypatch.setattr(int4pack, "layout", layout.__wrapped__)


@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (0, 8), (3, 5), (7, 21), (17, ROWS)])
def test_rows_are_read_back(start: int, stop: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    packed = pack(codes[:, ::2] | codes[:, 1::2] << 4)
    assert torch.equal(unpack(packed, COLUMNS, start, stop), codes[start:stop])
    assert multiplies(CPU, int4pack.MOST_ROWS)
    assert not multiplies(CPU, int4pack.MOST_ROWS + 1)


def test_what_cannot_be_read_back_is_left_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4pack, "_converted", lambda codes: rearranged(codes) & 0x77777777)
    assert int4pack.layout(CPU) is None
    assert multiplies(CPU, 1000)
