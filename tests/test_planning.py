"""`m1 plan`: the table and the JSON, for a checkpoint and for an original that is only a config."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.synthetic import DIMENSIONS
from m1local.memory import CARD_CHUNK
from m1local_app.cli import cli
from m1local_app.planning import Machine, plan

BIG = DIMENSIONS | {"num_hidden_layers": 40, "sliding_window_layers": list(range(1, 40, 2))}
CARD = ["--memory", "12GB", "--bandwidth", "360GB/s"]


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    return tmp_path


def test_the_14b_on_a_card_that_is_not_there(config_only: Path) -> None:
    shown = CliRunner().invoke(cli, ["plan", str(config_only), *CARD, "--json"])
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert said["bandwidth"] == 360e9
    rows = {
        (row["recipe"], row["context_tokens"]): row
        for row in said["rows"]
        if row["kv_type"] == "f16"
    }
    assert {"int4", "int8", "bnb-nf4"} <= {recipe for recipe, _ in rows}
    int4 = rows["int4", 8192]
    assert int4["fits"]
    assert int4["gpu_layers"] is None
    halved = next(
        row for row in said["rows"]
        if (row["recipe"], row["context_tokens"], row["kv_type"]) == ("int4", 8192, "q8_0")
    )  # fmt: skip
    assert halved["bytes"]["workspace"] == int4["bytes"]["workspace"]
    # But for the raw keys and values of the last tokens.
    assert halved["bytes"]["cache"] == pytest.approx(int4["bytes"]["cache"] * 8.5 / 16, rel=0.02)
    assert halved["tokens_per_second"] > int4["tokens_per_second"]
    spent = sum(int4["bytes"][name] for name in ("weights", "cache", "workspace", "graphs", "gaps"))
    assert spent + int4["bytes"]["runtime"] < 10 << 30
    assert 30 < int4["tokens_per_second"] < 46
    assert rows["int8", 8192]["gpu_layers"] is not None


def test_prompts_are_planned_in_the_chunks_in_which_a_card_reads_them(config_only: Path) -> None:
    machine = Machine(torch.device("cuda"), 24 << 30, 23 << 30, 1e12, 4e10)
    rows = [row for row in plan(config_only, machine, 8192) if row.recipe == "int4"]
    assert [row.setting and row.setting.max_chunk for row in rows] == [CARD_CHUNK] * 2


def test_the_table_names_what_each_column_is(config_only: Path) -> None:
    shown = CliRunner().invoke(cli, ["plan", str(config_only), *CARD, "-c", "4096"])
    assert shown.exit_code == 0, shown.output
    head = shown.stdout.splitlines()[2]
    assert all(word in head for word in ("recipe", "context", "KV", "weights", "tokens/s at most"))
    assert "4,096" in shown.stdout
    assert "8,192" not in shown.stdout


def test_what_fits_on_no_card_is_said(config_only: Path) -> None:
    command = ["plan", str(config_only), "--memory", "1GB", "--bandwidth", "1GB/s"]
    shown = CliRunner().invoke(cli, command)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("only on the CPU") >= 5


def test_the_demo_on_this_machine() -> None:
    shown = CliRunner().invoke(cli, ["plan"])
    assert shown.exit_code == 0, shown.output
    assert "free" in shown.stdout


def test_a_speed_that_is_none() -> None:
    assert CliRunner().invoke(cli, ["plan", "--bandwidth", "fast"]).exit_code == 2
