"""Every kernel compiles for every listed card, without one: registers, spills, shared memory."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from m1local.cuda.card import TILES
from tests import interpreter  # noqa: F401  # skips without Triton
from tests.compile_kernels import CAPABILITIES, ONE_ROW
from tests.conftest import ROOT

from m1local.cuda.ahead import MOST_REGIONS  # isort: skip

MOST_REGISTERS = 128  # so that four programs of 128 threads fit a multiprocessor
MOST_STACK = 8  # bytes: on 8.0 the assembler gives up one register's worth in gate and up of int6
MOST_TILE_REGISTERS = 168  # where tiles are kept in registers
# So that 20 warps fit; of levels, which are looked up, and of codes in two planes 16.
MOST_VECTOR_REGISTERS = {"int4": 96, "int8": 72, "nf4": 128, "nf4-dq": 128, "int3": 96, "int6": 128}
MOST_VECTOR_REGISTERS |= {"int4-plain": 96, "int5": 128}
# Loads before a kernel waits: of two rows 32 bytes of codes, which are two loads, or four where
# they lie in two planes; and their scale and zero, if there are.
EARLY = {"int4": 8, "int8": 4, "nf4": 6, "nf4-dq": 6, "int3": 12, "int6": 12}
EARLY |= {"int4-plain": 8, "int5": 12}
# Of a loop that reads two blocks of 32 columns, or of bytes 16, for each thread and row.
MOST_INSTRUCTIONS = {"int4": 2.1, "int8": 2.1, "nf4": 5.6, "nf4-dq": 6.0, "int3": 4.2, "int6": 3.6}
MOST_INSTRUCTIONS |= {"int4-plain": 2.1, "int5": 3.6}
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
SHARED_BYTES[120] = 99 << 10
OF_A_PROMPT = ("tile", "expand", "chunk")
ROWS = ("norm_rows", "gate_rows", "turn_rows")
Compiled = dict[str, Any]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """All of them for all cards, compiled by two processes at a time."""
    cache = tmp_path_factory.mktemp("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    halves = CAPABILITIES[::2], CAPABILITIES[1::2]
    running = [_start(list(map(str, half)), environment, ROOT) for half in halves]
    found = []
    for process in running:
        said, wrong = process.communicate()
        assert process.returncode == 0, wrong[-2000:]
        found += [json.loads(line) for line in said.splitlines()]
    return found


def _start(capabilities: list[str], environment: dict[str, str], root: Path) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.compile_kernels", *capabilities],
        cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card(kernels: list[Compiled]) -> None:
    by_card = defaultdict(set)
    for found in kernels:
        by_card[found["capability"]].add(found["kernel"].partition(" ")[0])
    assert set(by_card) == set(CAPABILITIES) == {10 * a + b for a, b in TILES}
    every = {
        *ONE_ROW,
        *OF_A_PROMPT,
        *ROWS,
        "norm",
        "silu",
        "round",
        "row",
        "stored",
        "attend",
        "join",
    }
    assert all(names == every for names in by_card.values()), by_card


@pytest.mark.slow
def test_next_to_nothing_is_spilled(kernels: list[Compiled]) -> None:
    for found in kernels:
        assert found["local"] == 0, found
        assert found["stack"] <= MOST_STACK, found
        most = (
            MOST_TILE_REGISTERS
            if found["kernel"].startswith(("chunk", "tile", "attend"))
            else MOST_REGISTERS
        )
        assert found["reg"] <= most, found
        assert found["shared"] <= SHARED_BYTES[found["capability"]], found


@pytest.mark.slow
def test_one_row_reads_long_vectors_and_never_waits_in_the_loop(kernels: list[Compiled]) -> None:
    vectors = [found for found in kernels if found["kernel"].startswith(ONE_ROW)]
    assert vectors
    for found in vectors:
        assert found["vector_loads"] > 0, found
        assert found["loop_barriers"] == 0, found  # sums are handed over after the loop
        assert found["reg"] <= MOST_VECTOR_REGISTERS[found["kernel"].partition(" ")[2]], found


@pytest.mark.slow
def test_a_weight_costs_one_row_few_instructions(kernels: list[Compiled]) -> None:
    for found in kernels:
        kind, _, name = found["kernel"].partition(" ")
        if kind in ONE_ROW:
            weights = 2 * 2 * (16 if name == "int8" else 32)
            assert 0 < found["loop"] / weights <= MOST_INSTRUCTIONS[name], found


@pytest.mark.slow
def test_tensor_cores_find_in_each_thread_what_they_expect(kernels: list[Compiled]) -> None:
    """Triton says nothing about where numbers lie; other than this, sums would be wrong."""
    for found in kernels:
        kind, _, name = found["kernel"].partition(" ")
        if kind in ONE_ROW:
            words, warps = 2 if name == "int8" else 4, 8 if kind == "added" else 4
            assert found["spread"] == [
                f"#ttg.blocked<{{sizePerThread = [1, {words}], threadsPerWarp = [32, 1], "
                f"warpsPerCTA = [{warps}, 1], order = [1, 0]}}>"
            ], found
        else:
            assert not found["spread"], found


@pytest.mark.slow
def test_where_kernels_overlap_each_waits_and_only_weights_are_read_before(
    kernels: list[Compiled],
) -> None:
    for found in kernels:
        early = found["early_loads"]
        if found["capability"] < 90 or found["kernel"].startswith(OF_A_PROMPT + ROWS):
            assert early is None, found
        elif found["kernel"].startswith(ONE_ROW):
            assert early == EARLY[found["kernel"].partition(" ")[2]], found
        else:
            assert early == 0, found


@pytest.mark.slow
def test_kernels_that_others_follow_ask_for_what_those_read(kernels: list[Compiled]) -> None:
    for found in kernels:
        kind = found["kernel"].partition(" ")[0]
        asks = kind in (*ONE_ROW, "attend") and found["capability"] >= 80
        norm = asks and kind == "added"  # whose weight is asked for at once, the rest at the end
        assert found["asked_ahead"] == asks * MOST_REGIONS + norm, found
        if kind in ONE_ROW:
            assert found["asked_early"] == norm, found
