"""What is chosen by a card's compute capability, and how work is split to fill it."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from m1local import memory
from m1local.cuda import support
from m1local.cuda.card import (
    MOST_KEY_PARTS,
    SMALL_CARD,
    TILES,
    Card,
    card,
    is_served,
    restored_weights,
)
from tests.conftest import CARD


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


def test_a_wave_that_is_nearly_full_is_not_made_into_two() -> None:
    big = Card((9, 0), 132)
    room = big.multiprocessors * big.tiles.resident
    assert big.column_parts(640, 5) == big.column_parts(768, 5) == 1
    for programs, steps in ((640, 17), (100, 5), (1088, 17), (2176, 5)):
        parts = big.column_parts(programs, steps)
        waves, whole = -(-programs * parts // room), -(-programs // room)
        assert waves * (-(-steps // parts) + 1) <= whole * (steps + 1)
    assert big.column_parts(300, 17) == 3  # one wave of six steps, where one has seventeen


def test_what_is_restored_at_a_time_fills_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of_tile, tokens, columns = 128, 512, 5120
    for multiprocessors in (28, 68, 132):
        rows = Card((8, 6), multiprocessors).restored_weights() // columns
        tiles = rows // rows_of_tile * tokens // rows_of_tile
        assert tiles >= 1.7 * multiprocessors
    assert restored_weights(torch.device("cpu")) == Card((9, 0), 4).restored_weights()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = restored_weights(torch.device("cuda"))
    assert absent == Card((8, 6), SMALL_CARD).restored_weights()


@pytest.mark.parametrize(
    ("capability", "built", "served"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_90", "sm_120"], True), ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 1), ["sm_90", "sm_120"], True), ((7, 0), ["sm_75", "sm_90a"], False),
        ((10, 0), ["sm_80", "sm_90", "compute_90"], True), ((8, 0), ["sm_86"], False),
        ((8, 6), [], True),
    ],
)  # fmt: skip
def test_a_card_without_code_in_this_torch_is_not_used(
    capability: tuple[int, int], built: list[str], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    assert is_served.__wrapped__(device) == served
    monkeypatch.setattr(memory, "is_served", is_served.__wrapped__)
    assert (memory.used_device() == device) == served


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

    def no_headers(device: torch.device) -> None:
        raise subprocess.CalledProcessError(1, ["gcc", "driver.c"])

    trial = ModuleType("trial")
    vars(trial).update(is_right=no_headers)
    monkeypatch.setitem(sys.modules, "m1local.cuda.trial", trial)
    assert "takes a C compiler and Python's headers" in (support.missing.__wrapped__(device) or "")
    vars(trial).update(is_right=lambda tried: tried == device)
    assert support.missing.__wrapped__(device) is None
    vars(trial).update(is_right=lambda tried: False)
    assert "multiply wrongly" in (support.missing.__wrapped__(device) or "")


def test_the_product_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from m1local.cuda import trial

    assert trial.is_right(CARD)
    from m1local.cuda.one_row import vector_product as multiply

    monkeypatch.setattr(trial, "vector_product", lambda *given: multiply(*given) * 1.01)
    assert not trial.is_right(CARD)
    monkeypatch.setattr(trial, "vector_product", lambda *given: multiply(*given) * torch.nan)
    assert not trial.is_right(CARD)


def test_the_cpu_stands_for_a_small_card() -> None:
    assert card(torch.device("cpu")).multiprocessors == 4
