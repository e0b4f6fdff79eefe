"""What is asked for before its kernel begins: every place once, and no more than there is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m1local.cuda.matrix import Matrix
from tests.interpreter import INTERPRETED  # skips without Triton; before its kernels
from tests.test_cuda_products import activations, quantized

import triton  # isort: skip
import triton.language as tl  # isort: skip
from m1local.cuda import ahead, one_row  # isort: skip
from m1local.cuda.activation import Activation  # isort: skip
from m1local.cuda.card import Card, RowShape  # isort: skip

if not INTERPRETED:
    pytest.skip("what is asked for shows in the interpreter alone", allow_module_level=True)

CPU = torch.device("cpu")
LIKE = torch.zeros(4)
Work = Callable[[tuple[Matrix, ...]], object]


@triton.jit
def _mark(at, here):  # type: ignore[no-untyped-def]
    """In the place of asking: count in a place's byte that it was asked for."""
    tl.store(at, tl.load(at, mask=here) + 1, mask=here)


@triton.jit
def _sign(at, here):  # type: ignore[no-untyped-def]
    """As `_mark`, but with the program that asked, counted from one."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, program + 1, mask=here)


def card(monkeypatch: pytest.MonkeyPatch, room: int, multiprocessors: int = 4) -> None:
    """A card that asks for so many bytes, and whose kernels mark them."""
    chosen = Card((8, 9), multiprocessors, 4 * room)
    monkeypatch.setattr(ahead, "ask", _mark)
    monkeypatch.setattr(ahead, "card", lambda device: chosen)


def blank(name: str = "int4-64", shape: tuple[int, int] = (100, 320)) -> Matrix:
    """A matrix without a bit, so that marks can be counted."""
    matrix = quantized(name, shape).cuda_matrix()
    assert matrix is not None
    for tensor in (*matrix.planes, *matrix.statistics):
        tensor.zero_()
    return matrix


def marks(tensor: Tensor) -> Tensor:
    """How often each byte was asked for."""
    return tensor.view(torch.uint8).view(-1).int()


def wanted(tensor: Tensor, rows: int, row_bytes: int, span: int) -> Tensor:
    """One in the first byte of each sector in the first `span` bytes of so many rows."""
    found = torch.zeros_like(marks(tensor))
    for row in range(rows):
        found[row * row_bytes : row * row_bytes + span : ahead.SECTOR] = 1
    return found


def works(shape: RowShape) -> list[Work]:
    """All kernels of one row, by what they are told to ask for."""
    matrix = quantized("int4-64", (96, 192)).cuda_matrix()
    assert matrix is not None
    x = Activation.of(activations(1, 192) / 100)
    out = Activation(96, dtype=torch.float32, device=CPU)
    stream, weight = torch.zeros(96), torch.zeros(96)
    added = Activation(96, dtype=torch.float32, device=CPU, eps=1e-6)
    return [
        lambda then: one_row.vector_product(x, matrix, shape, then=then),
        lambda then: one_row.gated_product(x, matrix, matrix, out, shape, then=then),
        lambda then: one_row.added_product(x, matrix, stream, weight, added, shape, then=then),
    ]


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 2)])
def test_the_programs_of_a_product_ask_once_for_each_place(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, 96 * (64 + 20))  # for 64 bytes of codes, and a row's scales and zeros
    for work in works(RowShape(*shape)):
        alone, gate, up = blank(), blank(), blank()
        work((alone,))
        assert torch.equal(marks(alone.codes), wanted(alone.codes, 96, 160, 64))
        for statistics in alone.statistics:  # 96 rows of 10 bytes are 30 sectors
            assert torch.equal(marks(statistics), wanted(statistics, 16, 32, 32))
        work((gate, up))  # half of the room each
        for one in (gate, up):
            assert int(marks(one.codes).sum()) == 0
    card(monkeypatch, 2 * 96 * (64 + 20))
    for work in works(RowShape(*shape))[:1]:
        work((gate, up))
        for one in (gate, up):
            assert torch.equal(marks(one.codes), wanted(one.codes, 96, 160, 64))


def test_both_planes_of_codes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 96 * (72 + 96))
    matrix = blank("int6-64", (100, 1152))
    works(RowShape(1, 4))[0]((matrix,))
    low, upper = matrix.planes
    assert torch.equal(marks(low), wanted(low, 96, 576, 64))  # two thirds of 96 bytes
    assert torch.equal(marks(upper), wanted(upper, 96, 288, 32))


def test_no_more_is_asked_for_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 1 << 20, multiprocessors=1)
    small, large = blank(), blank(shape=(333, 192))

    def regions(*matrices: Matrix) -> list[tuple[int, int, int]]:
        found = ahead.following(matrices, LIKE).regions
        assert len(found) == ahead.MOST_REGIONS
        return [region[1:] for region in found if region.rows]

    assert regions(small) == [(96, 160, 160), (16, 32, 32), (16, 32, 32)]
    # A card with one multiprocessor begins with 28 programs' rows, 7 of 16 rows each.
    assert regions(large)[0] == (112, 96, 96)
    assert regions(large, large)[0] == (48, 96, 96)
    assert regions() == []
    assert regions(blank(shape=(15, 64))) == []  # less than there is in a piece
    card(monkeypatch, 100 * 20)
    assert regions(small) == []  # no room for codes
    bytewise = quantized("int8", (100, 320)).cuda_matrix()
    assert bytewise is not None
    card(monkeypatch, 1 << 20)
    assert regions(bytewise) == [(96, 320, 320)]


def test_only_the_last_programs_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    for programs, silent in ((28, 0), (44, 16), (50, 16), (61, 32), (2, 0)):
        assert ahead.following((), LIKE, programs, 28).silent == silent
    card(monkeypatch, 1 << 20)
    chosen = Card((8, 9), 1)
    monkeypatch.setattr(ahead, "ask", _sign)
    monkeypatch.setattr(one_row, "card", lambda device: chosen)
    monkeypatch.setattr(Card, "column_parts", lambda *_: 2)
    matrix, alone = quantized("int4-64", (800, 64)).cuda_matrix(), blank()
    assert matrix is not None
    x = Activation.of(activations(1, 64))
    one_row.vector_product(x, matrix, RowShape(1, 1), then=(alone,))  # 100 programs, 28 at a time
    asked = marks(alone.codes)[: 96 * 160 : ahead.SECTOR].tolist()
    assert asked == [65 + place // 32 for place in range(480)]


def test_a_card_asks_for_a_quarter_of_its_second_cache() -> None:
    assert Card((9, 0), 132, 50 << 20).ahead == 50 << 18
    assert Card((9, 0), 132).ahead == 0
