"""A row of activations in the orders and whole numbers in which products read it."""

import pytest
import torch
from torch import Tensor

from m1local.cuda.matrix import WORD
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda.activation import MOST, Activation  # isort: skip


def row(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(columns, generator=generator) * 4 + 0.01
    return (torch.randn(columns, generator=generator) * sizes)[None].to(CARD)


def whole(made: Activation, order: int) -> Tensor:
    """The numbers behind the halves: 256 * upper + lower."""
    numbers: Tensor = 256 * made.halves[order, 0].int() + made.halves[order, 1].int()
    return numbers


@pytest.mark.parametrize("columns", [32, 96, 1024, 1056, 2080])
def test_the_whole_numbers_are_the_row(columns: int) -> None:
    x = row(columns)
    made = Activation.of(x)
    numbers, scales = whole(made, 0), made.scales[0]
    assert int(numbers.abs().max()) == MOST
    found = (numbers.view(-1, WORD) * scales[:, None]).view(1, -1)
    greatest = x.view(-1, WORD).abs().amax(1)
    error = (found - x).abs().view(-1, WORD).amax(1)
    assert bool((error <= greatest * (0.51 / MOST)).all())
    torch.testing.assert_close(made.scales[1], found.view(-1, WORD).sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("columns", [64, 1056])
def test_the_second_order_has_even_columns_first(columns: int) -> None:
    made = Activation.of(row(columns))
    words = whole(made, 0).view(-1, WORD)
    evens_first = torch.cat((words[:, ::2], words[:, 1::2]), 1)
    assert torch.equal(whole(made, 1).view(-1, WORD), evens_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_itself_is_kept(dtype: torch.dtype) -> None:
    x = row(328).to(dtype)  # no whole blocks
    made = Activation.of(x)
    assert torch.equal(made.natural, x)
    assert made.halves.numel() == made.scales.numel() == 0


def test_nothing_is_nothing_and_what_is_tiny_does_not_overflow() -> None:
    x = torch.zeros(1, 96, device=CARD)
    x[0, 32:64] = 1e-38
    made = Activation.of(x)
    assert not bool(made.halves.any())
    assert bool(torch.isfinite(made.scales).all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(wrong: float) -> None:
    x = row(96)
    x[0, 40] = wrong
    finite = torch.isfinite(Activation.of(x).scales)
    assert [row.nonzero().flatten().tolist() for row in ~finite] == [[40 // WORD]] * 2
