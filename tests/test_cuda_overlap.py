"""Where kernels begin early: only on cards that can, and where the driver takes it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from m1local.cuda.card import Card
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda import overlap  # isort: skip
from m1local.cuda.replay import WARM_UPS  # isort: skip

CPU = torch.device("cpu")


class Trial:
    """The trial kernel, without a card; it counts, or leaves out every so many."""

    def __init__(self, skipped: int = 0) -> None:
        self.skipped, self.launched = skipped, 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, count: torch.Tensor, *, launch_pdl: bool, num_warps: int) -> None:
        assert launch_pdl
        self.launched += 1
        if not self.skipped or self.launched % self.skipped:
            count.add_(1)


@pytest.fixture(autouse=True)
def _new_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(overlap, "card", lambda device: Card((9, 0), 132))
    monkeypatch.setattr(overlap, "captured", captured)
    overlap.accepted.cache_clear()
    yield
    overlap.accepted.cache_clear()


def captured(work: Callable[[], None], prepare: Callable[[], object]) -> Callable[[], None]:
    for _ in range(WARM_UPS):
        work()
    return work


def test_where_it_works_every_launch_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_trial_kernel", Trial())
    assert overlap.begun_early(CPU) == {"OVERLAP": True, "launch_pdl": True}


@pytest.mark.parametrize("capability", [(7, 5), (8, 9)])
def test_older_cards_are_not_even_tried(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial()
    monkeypatch.setattr(overlap, "_trial_kernel", trial)
    monkeypatch.setattr(overlap, "card", lambda device: Card(capability, 40))
    assert overlap.begun_early(CPU) == {"OVERLAP": False}
    assert trial.launched == 0


def test_a_wrong_count_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_trial_kernel", Trial(skipped=5))
    assert overlap.begun_early(CPU) == {"OVERLAP": False}


def test_a_driver_that_refuses_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(work: Callable[[], None], prepare: Callable[[], object]) -> Callable[[], None]:
        asked.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(overlap, "captured", refused)
    assert [overlap.begun_early(CPU) for _ in range(2)] == [{"OVERLAP": False}] * 2
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_of_9_0_or_newer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.get_device_capability(CARD) < (9, 0):
        pytest.skip("needs compute capability 9.0")
    assert overlap.accepted(CARD)
