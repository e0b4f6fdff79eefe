"""What is asked for before its kernel begins: every line once, and no more than there is."""

from collections.abc import Callable

import pytest
import torch

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


@triton.jit
def _mark(at, here):  # type: ignore[no-untyped-def]
    """In the place of asking: count in a line's first byte that it was asked for."""
    tl.store(at, tl.load(at, mask=here) + 1, mask=here)


@triton.jit
def _sign(at, here):  # type: ignore[no-untyped-def]
    """As `_mark`, but with the program that asked, counted from one."""
    tl.store(at, tl.program_id(0) + 1, mask=here)


def marked(monkeypatch: pytest.MonkeyPatch, lines: int, multiprocessors: int = 4) -> None:
    """Let cards ask for so many lines, and kernels mark them."""
    chosen = Card((8, 9), multiprocessors, 4 * 128 * lines)
    monkeypatch.setattr(ahead, "ask", _mark)
    monkeypatch.setattr(ahead, "card", lambda device: chosen)


def blank(rows: int, columns: int) -> Matrix:
    """A matrix without a bit, so that marks can be counted."""
    matrix = quantized("int4-64", (rows, columns)).cuda_matrix()
    assert matrix is not None
    matrix.codes.zero_()
    return matrix


def marks(matrix: Matrix) -> list[int]:
    """How often each line was asked for; nothing else may have been touched."""
    codes = matrix.codes.view(torch.uint8).view(-1)
    whole = codes[: codes.numel() // 128 * 128].view(-1, 128)
    assert int(whole[:, 1:].sum()) + int(codes[whole.numel() :].sum()) == 0
    found: list[int] = whole[:, 0].tolist()
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 2)])
def test_the_programs_of_a_product_ask_once_for_each_line(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(monkeypatch, 96)
    matrix = quantized("int4-64", (96, 192)).cuda_matrix()
    assert matrix is not None
    x = Activation.of(activations(1, 192) / 100)
    out = Activation(96, dtype=torch.float32, device=CPU)
    stream, weight = torch.zeros(96), torch.ones(96)
    added = Activation(96, dtype=torch.float32, device=CPU, eps=1e-6)
    tried = RowShape(*shape)
    works: list[Callable[[tuple[Matrix, ...]], object]] = [
        lambda then: one_row.vector_product(x, matrix, tried, then=then),
        lambda then: one_row.gated_product(x, matrix, matrix, out, tried, then=then),
        lambda then: one_row.added_product(x, matrix, stream, weight, added, tried, then=then),
    ]
    for work in works:
        alone, gate, up = blank(100, 320), blank(100, 320), blank(100, 320)  # 125 lines
        work((alone,))
        assert marks(alone) == [1] * 96 + [0] * 29
        work((gate, up))
        for one in (gate, up):
            assert marks(one) == [1] * 48 + [0] * 77


def test_no_more_is_asked_for_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    marked(monkeypatch, 1 << 20)
    like = torch.zeros(4)
    small, large = blank(100, 320), blank(333, 64 * 3)
    found = ahead.following((small,), like, 8, 4)
    assert found.lines == 48  # of each half of 125 lines, evenly
    assert found.more_codes.data_ptr() == found.codes.data_ptr() + 48 * 128
    assert ahead.following((small, large), like, 8, 4).lines == 112  # of the smaller one
    assert ahead.following((), like, 8, 4).lines == 0
    assert ahead.following((blank(16, 64),), like, 8, 4).lines == 0  # less than there is in a piece


def test_only_the_last_programs_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(4)
    for programs, silent in ((28, 0), (44, 16), (50, 16), (61, 32), (2, 0)):
        marked(monkeypatch, 96)  # a card that runs 28 programs of 4 warps
        assert ahead.following((), like, programs, 4).silent == silent
    marked(monkeypatch, 96, multiprocessors=1)
    monkeypatch.setattr(ahead, "ask", _sign)
    matrix, alone = quantized("int4-64", (800, 64)).cuda_matrix(), blank(100, 320)
    assert matrix is not None
    x = Activation.of(activations(1, 64))
    one_row.vector_product(x, matrix, RowShape(1, 1), then=(alone,))  # 50 programs
    assert marks(alone) == 2 * ([17] * 32 + [18] * 16) + [0] * 29


def test_a_card_asks_for_a_quarter_of_its_second_cache() -> None:
    assert Card((9, 0), 132, 50 << 20).ahead == 50 << 18
    assert Card((9, 0), 132).ahead == 0
