"""`m1 bench`: its cases, its three outputs, what it counts, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from m1local.benchmark import Case, Measured, bytes_of_token, cases, measure
from m1local.engine import Engine
from m1local_app.cli import cli


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *arguments])


def test_cases_are_all_lengths_at_all_depths() -> None:
    names = [case.name for case in cases([8, 16], [4], [0, 32])]
    assert names == ["pp8", "pp8@d32", "pp16", "pp16@d32", "tg4", "tg4@d32"]


def test_figures_follow_from_the_seconds() -> None:
    found = Measured(Case(10), (1.0, 2.0, 5.0), bytes_per_token=30, bandwidth=300.0)
    assert found.tokens_per_second == 5
    assert found.bytes_per_second == 150
    assert found.share == 0.5
    prompt = Measured(Case(10, is_answer=False), (2.0,), bytes_per_token=30, bandwidth=300.0)
    assert prompt.bytes_per_second == 0


def test_a_token_reads_every_weight_but_the_embedding_and_its_context(
    tiny_checkpoint: Path,
) -> None:
    engine = Engine.load(tiny_checkpoint, context_tokens=64)
    weights = sum(p.nbytes for name, p in engine.model.named_parameters() if "embed" not in name)
    empty, deep = (bytes_of_token(engine, Case(2, depth)) for depth in (0, 30))
    layers = engine.context.cache.layers
    of_token = [
        2 * at.layout.num_kv_heads * at.layout.head_dim * at.raw_k.itemsize for at in layers
    ]
    assert empty == weights + sum(of_token)
    seen = [min(31, at.window or 31) for at in layers]
    assert deep == weights + sum(a * b for a, b in zip(of_token, seen, strict=True))


def test_a_made_up_context_is_as_long_as_it_says(tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint, context_tokens=64)
    lengths = []
    feed = engine.context.feed

    def watched(token_ids: list[int]) -> torch.Tensor:
        lengths.append((engine.context.cache.position, len(token_ids)))
        return feed(token_ids)

    engine.context.feed = watched  # type: ignore[method-assign,assignment]  # to look at it
    list(measure(engine, [Case(3, 40), Case(20, 0, is_answer=False)], repetitions=1))
    assert lengths[:3] == [(40, 1), (41, 1), (42, 1)]
    assert lengths[-1] == (0, 20)


def test_json_and_csv_say_the_same(tiny_checkpoint: Path) -> None:
    arguments = (str(tiny_checkpoint), "-p", "8", "-n", "4", "-d", "0,16", "-r", "2")
    said = json.loads(bench(*arguments, "-o", "json").stdout)
    assert [row["test"] for row in said["results"]] == ["pp8", "pp8@d16", "tg4", "tg4@d16"]
    assert said["weights_bytes"] > 0
    assert said["held_bytes"] > 0
    assert all(
        row["slowest"] <= row["tokens_per_second"] <= row["fastest"] for row in said["results"]
    )
    rows = list(csv.DictReader(bench(*arguments, "-o", "csv").stdout.splitlines()))
    assert [row["test"] for row in rows] == [row["test"] for row in said["results"]]
    assert rows[0].keys() == said["results"][0].keys()


def test_the_table_has_a_line_for_each_and_says_what_was_measured_on(tiny_checkpoint: Path) -> None:
    shown = bench(str(tiny_checkpoint), "-p", "8", "-n", "4", "-r", "1").stdout.splitlines()
    assert shown[0].split()[:2] == ["test", "tokens/s"]
    assert [line.split()[0] for line in shown[1:3]] == ["pp8", "tg4"]
    assert "can be read" in shown[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "many"], "--prompt-tokens is 'many'; give numbers"),
        (["-n", "0"], "--new-tokens is '0'"),
        (["-d", "-1"], "--depth is '-1'"),
        (["-p", "", "-n", ""], "Nothing is to be measured"),
        (["-d", "100000"], "tokens of context are wanted"),
        (["--gpu-layers", "x"], "--gpu-layers is 'x'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tiny_checkpoint: Path, arguments: list[str], said: str
) -> None:
    found = bench(str(tiny_checkpoint), *arguments)
    assert found.exit_code == 2
    assert said in found.output
    assert len(found.output.strip().splitlines()) == 1
