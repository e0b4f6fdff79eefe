"""What `--dry-run` foretells: the arithmetic, never how long anything took."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from m1local.home import DEMO
from m1local_quantize import estimate, gptq_cost
from m1local_quantize.estimate import FLOAT32_BYTES
from m1local_quantize.gptq_cost import Rates, gptq_seconds
from m1local_quantize.methods import gptq
from m1local_quantize.plan import Plan
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source

NAMES = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def source(tiny_checkpoint: Path) -> Source:
    return Source.open(tiny_checkpoint)


def plan_of(source: Source, recipe: str) -> Plan:
    return Plan.of(source, Recipe.find(recipe))


def test_the_cost_law_is_that_of_the_steps(source: Source) -> None:
    """One layer by hand; rates that no two sums of parts have in common."""
    rates, tokens = Rates(multiply=1.0, factor=1e9, column=1e-6), 100
    steps = [step for step in plan_of(source, "int4-gptq").steps if ".layers.2." in step.name]
    shapes = {s.name.split(".", 3)[3].removesuffix(".weight"): s.shape for s in steps}
    expected = 0.0
    for name in NAMES:
        rows, columns = shapes[name]
        passed = 2 * tokens * rows * columns  # as in the source, and as written
        hessian = 0 if name == "mlp.up_proj" else tokens * columns**2  # the gate's serves it too
        feedback = rows * columns**2 / 2
        expected += passed + hessian + feedback + 1e9 * columns**3 + 1e-6 * rows * columns
    assert gptq_seconds(steps, tokens, rates) == pytest.approx(expected, rel=1e-12)


def test_only_what_the_text_passes_grows_with_it(source: Source) -> None:
    steps = plan_of(source, "int4-gptq").steps
    none, some, twice = (gptq_seconds(steps, n, Rates(1, 1, 1)) for n in (0, 50, 100))
    assert twice - some == some - none > 0
    assert none > 0
    free = Rates(0, 0, 1)
    assert gptq_seconds(steps, 0, free) == gptq_seconds(steps, 10**6, free)


def test_what_no_text_comes_into_costs_none_of_it(source: Source) -> None:
    steps = plan_of(source, "int4-gptq").steps
    outside = [step for step in steps if not step.name.startswith("model.layers.")]
    assert outside
    assert gptq_seconds(outside, 1000, Rates(1, 1, 1)) == 0
    rounded = [replace(step, method="refit") for step in steps]  # but the text passes them
    assert 0 < gptq_seconds(rounded, 10, Rates(1, 1, 1)) < gptq_seconds(steps, 10, Rates(1, 1, 1))
    assert gptq_seconds(rounded, 10, Rates(0, 1, 1)) == 0


def test_gptq_is_run_on_a_piece_of_a_real_matrix(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered, pieces = gptq.quantize_ordered, []

    def watched(rows: Tensor, *rest: Any) -> dict[str, Tensor]:
        pieces.append(tuple(rows.shape))
        return ordered(rows, *rest)

    monkeypatch.setattr(gptq, "quantize_ordered", watched)
    monkeypatch.setattr(gptq_cost, "PIECE", 64)
    plan = plan_of(source, "int4-gptq")
    found = estimate.estimate(source, plan, calibration_tokens=500)
    assert found.seconds is not None
    assert found.seconds > 0
    assert pieces
    assert all(columns == 64 for _, columns in pieces)


@pytest.mark.parametrize("recipe", ["int4", "int8", "bnb-nf4"])
def test_without_gptq_no_piece_is_computed(
    source: Source, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_cost.Rates, "measured", None)
    assert estimate.estimate(source, plan_of(source, recipe)).seconds is not None


def test_gptqs_memory_is_that_of_a_layer_and_two_hessians() -> None:
    source = Source.open(DEMO)
    plan = plan_of(source, "int4-gptq")
    widest = source.config.intermediate_size
    found = estimate.estimate(source, plan, calibration_tokens=1).memory_bytes
    assert found >= estimate.HESSIANS * widest**2 * FLOAT32_BYTES
    assert found < 6 * plan.source_bytes
