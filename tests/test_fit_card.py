"""The recipe fit for a card, on which the embedding never lies."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1local import home
from m1local.config import M1Config
from m1local.manifest import CheckpointManifest
from m1local_app.cli import cli
from m1local_app.fitting import Size
from m1local_quantize.fit import Sensitivities, fitted, weights_within
from m1local_quantize.plan import Plan
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source
from tests.test_fit import costs_of


@pytest.fixture(scope="module")
def found(tiny_checkpoint: Path) -> Sensitivities:
    return costs_of(tiny_checkpoint, list(Recipe.find("fit").candidates))


def test_for_a_card_the_embedding_takes_nothing(
    tiny_checkpoint: Path, found: Sensitivities
) -> None:
    source, recipe = Source.open(tiny_checkpoint), Recipe.find("fit")
    budget = 100_000
    plan = Plan.of(source, fitted(recipe, source, found, budget, Size(device=1).elsewhere))
    costs = found.costs["model.embed_tokens"]
    assert costs[plan.linears["model.embed_tokens"]] == min(costs.values())
    embedding = sum(step.nbytes for step in plan.steps if step.name.startswith("model.embed"))
    assert budget - 0.03 * budget <= plan.target_bytes - embedding <= budget
    assert Size(budget=1).elsewhere == frozenset()


def test_run_and_quantize_make_the_same_for_a_card(
    tiny_checkpoint: Path, tmp_path: Path, m1_home: Path
) -> None:
    config = M1Config.from_file(tiny_checkpoint / "config.json")
    card = 100_000 - weights_within(0, config, 64)  # what the weights there may take, and the rest
    size = ["-r", "fit", "--for", f"{card}B", "-c", "64"]
    made = []
    for command in (
        ["quantize", str(tiny_checkpoint), str(tmp_path / "made"), *size, "--no-certify"],
        ["run", str(tiny_checkpoint), *size, "-p", "hello", "-n", "2"],
    ):
        shown = CliRunner().invoke(cli, command)
        assert shown.exit_code == 0, shown.output
    (kept,) = home.models().iterdir()
    for folder in (tmp_path / "made", kept):
        made.append(CheckpointManifest.read(folder).linears)
    assert made[0] == made[1]
    budget = CliRunner().invoke(cli, ["run", str(tiny_checkpoint), "-r", "fit", "--budget",
                                      "100000B", "-p", "hello", "-n", "2"])  # fmt: skip
    assert budget.exit_code == 0, budget.output
    other = next(each for each in home.models().iterdir() if each != kept)
    assert CheckpointManifest.read(other).linears != made[0]
