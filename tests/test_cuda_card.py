"""What is chosen by a card's compute capability, and how work is split to fill it."""

import pytest
import torch

from m1local.cuda import support
from m1local.cuda.card import MOST_KEY_PARTS, TILES, Card, card


@pytest.mark.parametrize(
    ("capability", "like"),
    [((7, 5), (7, 5)), ((8, 7), (8, 6)), ((8, 9), (8, 9)), ((10, 0), (9, 0)), ((12, 1), (12, 0))],
)
def test_a_card_is_treated_as_the_nearest_older_one(
    capability: tuple[int, int], like: tuple[int, int]
) -> None:
    assert Card(capability, 28).tiles == TILES[like]


def test_bfloat16_from_8_0_on() -> None:
    assert Card((7, 5), 40).dtype == torch.float16
    assert Card((8, 0), 40).dtype == torch.bfloat16


@pytest.mark.parametrize("programs", [1, 160, 640, 4352])
@pytest.mark.parametrize("steps", [1, 5, 17])
def test_columns_are_split_only_where_rows_do_not_fill_the_card(programs: int, steps: int) -> None:
    big = Card((9, 0), 132)
    parts = big.column_parts(programs, steps)
    assert 1 <= parts <= steps
    each = -(-steps // parts)
    assert (parts - 1) * each < steps <= parts * each  # none is empty, none is missing
    if programs >= big.multiprocessors * big.tiles.resident:
        assert parts == 1
    elif programs == 1:
        assert parts == steps


def test_keys_are_split_by_a_power_of_two() -> None:
    for kv_heads in (1, 2, 8):
        parts = Card((8, 6), 28).key_parts(kv_heads)
        assert parts & (parts - 1) == 0
        assert 1 <= parts <= MOST_KEY_PARTS
        assert parts * kv_heads <= 2 * 28


def test_why_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.missing(torch.device("cpu")) == "the kernels are for CUDA, not cpu"
    device = torch.device("cuda", 7)  # one that nothing else asks for
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert "Triton is not installed" in (support.missing.__wrapped__(device) or "")
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    monkeypatch.setattr(support, "card", lambda device: Card((6, 1), 20))
    assert support.missing.__wrapped__(device) == "compute capability 6.1 is older than 7.5"
    monkeypatch.setattr(support, "card", lambda device: Card((8, 6), 28))
    assert support.missing.__wrapped__(device) is None


def test_the_cpu_stands_for_a_small_card() -> None:
    assert card(torch.device("cpu")).multiprocessors == 4
