"""The recipe fit: costs that foretell divergences, the best choice in a size, and its command."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from m1local.checkpoint import load_model, matrix_names
from m1local.config import M1Config
from m1local.errors import RecipeError
from m1local.formats import LinearSpec, format_class
from m1local.home import DEMO
from m1local.manifest import CheckpointManifest
from m1local.memory import Model, Setting, suited
from m1local_app import fitting
from m1local_app.cli import cli
from m1local_quantize import sensitivity
from m1local_quantize.evaluate import compare
from m1local_quantize.fit import (
    GPTQ_GAIN,
    Sensitivities,
    choose,
    fitted,
    stored_bytes,
    weights_within,
)
from m1local_quantize.methods import quantizer
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.plan import Plan
from m1local_quantize.recipe import Recipe
from m1local_quantize.sensitivity import LayerRead, MatrixMeasured, measure_sensitivity
from m1local_quantize.source import Source
from m1local_quantize.text import CALIBRATION, SHIPPED
from tests.conftest import TINY
from tests.damage import refused

INT4, INT5 = LinearSpec("int4", 64), LinearSpec("int5", 64)


def costs_of(folder: Path, candidates: list[LinearSpec]) -> Sensitivities:
    source = Source.open(folder)
    samples = source.read_text(CALIBRATION).samples
    events = list(measure_sensitivity(source, samples, candidates))
    layers = source.config.num_hidden_layers
    assert events[:layers] == [LayerRead(done, layers) for done in range(1, layers + 1)]
    measured = [event for event in events if isinstance(event, MatrixMeasured)]
    assert len(measured) == len(events) - layers
    assert [event.done for event in measured] == list(range(1, len(measured) + 1))
    assert {event.total for event in measured} == {len(measured)}
    assert {event.module for event in measured} == set(matrix_names(source.config))
    return Sensitivities({event.module: event.costs for event in measured})


def divergence(folder: Path, module: str, spec: LinearSpec) -> float:
    """What storing one matrix as `spec` really costs."""
    source = Source.open(folder)
    samples = source.read_text(CALIBRATION).samples
    reference, changed = (load_model(folder, dtype=torch.float32) for _ in range(2))
    weight = changed.get_parameter(f"{module}.weight")
    shape = (weight.shape[0], weight.shape[1])
    tensors = quantizer(sensitivity.METHOD, spec)(weight.data, spec)
    weight.data = format_class(spec.format).table(tensors, shape, spec).dequantize()
    return compare(reference, changed, samples).mean_kl


def test_a_cost_foretells_the_divergence(tiny_checkpoint: Path) -> None:
    spec = LinearSpec("int4", 32)
    found = costs_of(tiny_checkpoint, [spec])
    ratios = {
        module: costs[spec] / divergence(tiny_checkpoint, module, spec)
        for module, costs in found.costs.items()
    }
    # One draw of labels; outputs taken for independent and errors for small, which those of the
    # random model's queries and keys are not: the trained one below keeps a narrower bound.
    assert all(0.25 < ratio < 2 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_a_cost_foretells_the_divergence_of_trained_weights() -> None:
    found = costs_of(DEMO, [INT4, INT5])
    for module in ("lm_head", "model.embed_tokens", "model.layers.2.mlp.down_proj"):
        for spec in (INT4, INT5):
            expected = divergence(DEMO, module, spec)
            assert 0.7 * expected < found.costs[module][spec] < 1.4 * expected


def test_the_choice_is_the_best_of_all() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        sizes = torch.randint(1, 30, (4, 3), generator=draw).tolist()
        prices = torch.rand(4, 3, generator=draw).tolist()
        items = [list(zip(s, p, strict=True)) for s, p in zip(sizes, prices, strict=True)]
        least = sum(min(size for size, _ in item) for item in items)
        budget = least + int(torch.randint(0, 40, (1,), generator=draw))
        chosen = choose(items, budget)
        picked = [item[index] for item, index in zip(items, chosen, strict=True)]
        assert sum(size for size, _ in picked) <= budget
        best = min(
            sum(cost for _, cost in combination)
            for combination in itertools.product(*items)
            if sum(size for size, _ in combination) <= budget
        )
        assert sum(cost for _, cost in picked) == pytest.approx(best)


def test_sizes_without_a_common_measure_stay_within_the_budget() -> None:
    draw = torch.Generator().manual_seed(1)
    items = [
        [(int(size), 1 / int(size)) for size in torch.randint(10**8, 10**9, (5,), generator=draw)]
        for _ in range(40)
    ]
    budget = sum(sorted(size for size, _ in item)[2] for item in items)
    picked = [item[index] for item, index in zip(items, choose(items, budget), strict=True)]
    assert 0.999 * budget < sum(size for size, _ in picked) <= budget


@pytest.fixture
def found(tiny_checkpoint: Path) -> Sensitivities:
    return costs_of(tiny_checkpoint, list(Recipe.find("fit").candidates))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_plan_stays_within_the_budget(
    tiny_checkpoint: Path, found: Sensitivities, share: float
) -> None:
    source, recipe = Source.open(tiny_checkpoint), Recipe.find("fit")

    def size(pick: Callable[[list[int]], int]) -> int:
        matrices = 0
        for name in matrix_names(source.config):
            n, k = source.files.shape(f"{name}.weight")
            matrices += pick([stored_bytes((n, k), spec) for spec in found.costs[name]])
        floats = [n for n in source.files.names if len(source.files.shape(n)) != 2]
        return matrices + sum(source.nbytes(name) for name in floats)

    least, most = size(min), size(max)
    budget = round(least + share * (most - least))
    plan = Plan.of(source, fitted(recipe, source, found, budget))
    assert plan.target_bytes <= budget
    # What is left over is less than the step from one format to the next.
    assert plan.target_bytes >= budget - 0.03 * budget
    with refused(RecipeError, "tiny-m1 takes .* MiB at least .* Allow more"):
        fitted(recipe, source, found, least - 1)


def test_more_bytes_never_cost_more(tiny_checkpoint: Path, found: Sensitivities) -> None:
    source, recipe = Source.open(tiny_checkpoint), Recipe.find("fit")
    costs = []
    for budget in range(60_000, 140_000, 5_000):
        try:
            chosen = fitted(recipe, source, found, budget)
        except RecipeError:
            continue
        costs.append(
            sum(
                found.costs[rule.pattern][rule.spec]
                * (GPTQ_GAIN if rule.method == "gptq" and "layers" in rule.pattern else 1)
                for rule in chosen.rules
            )
        )
    assert len(costs) > 5
    assert costs == sorted(costs, reverse=True)


def test_rules_of_ones_own_go_first(
    tiny_checkpoint: Path, found: Sensitivities, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'method = "refit"\nfit = ["int4/32", "int8"]\n'
        '[[rules]]\nmatch = "lm_head"\nformat = "float"\n'
        '[[rules]]\nmatch = "*o_proj"\nformat = "int5"\ngroup_size = 32\n'
    )
    source = Source.open(tiny_checkpoint)
    recipe = Recipe.find(str(path))
    plan = Plan.of(source, fitted(recipe, source, found, 215_000))
    specs = plan.linears
    assert specs["lm_head"].format == "float"
    assert {s.format for name, s in specs.items() if name.endswith("o_proj")} == {"int5"}
    others = {s for name, s in specs.items() if "o_proj" not in name and name != "lm_head"}
    assert others == {LinearSpec("int4", 32), LinearSpec("int8")}


def test_what_was_measured_is_read_back(found: Sensitivities, tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.json"
    found.write(path)
    assert Sensitivities.read(path) == found
    path.write_text(path.read_text()[:-20])
    assert Sensitivities.read(path) is None
    path.write_text("[1]")
    assert Sensitivities.read(path) is None
    assert Sensitivities.read(tmp_path / "missing") is None


def test_a_context_takes_its_bytes_from_the_weights() -> None:
    raw = TINY | {
        "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 17408,
        "num_attention_heads": 20, "num_key_value_heads": 2, "num_swa_attention_heads": 40,
        "num_swa_key_value_heads": 8, "sliding_window_layers": list(range(1, 40, 2)),
        "sliding_window": 8192, "max_position_embeddings": 32768,
    }  # fmt: skip
    config = M1Config.from_dict(raw)
    differences = {
        context: weights_within(8 * 10**9, config, 2048)
        - weights_within(8 * 10**9, config, context)
        for context in (4096, 8192)
    }
    per_token = 40_960 + 81_920  # bytes of keys and values, bf16, in global and in sliding layers
    assert differences == {4096: 2048 * per_token, 8192: 6144 * per_token}
    for context in (16, 2048, 32768):  # weights of that size are planned to fit, and no more
        model = Model(config, dict.fromkeys(matrix_names(config), INT4), torch.bfloat16)
        card = torch.device("cuda")
        demand = model.demand(suited(Setting(context), card), card)
        least = demand.device + demand.runtime
        there = model.weights - model.parts["model.embed_tokens"]
        assert weights_within(least, config, context) == there == demand.weights


@pytest.mark.parametrize("candidates", [["bnb-nf4"], ["int4"], ["int8/64"], ["int4/x"], "int8"])
def test_a_list_that_cannot_be_chosen_from_is_refused(
    candidates: list[str] | str, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(f'method = "rtn"\nfit = {json.dumps(candidates)}\n')
    with refused(RecipeError, "own.toml: fit "):
        Recipe.find(str(tmp_path / "own.toml"))


def test_a_home_that_cannot_be_written_costs_no_measurement(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("M1_HOME", str(tmp_path / "file"))
    arguments = ("quantize", str(tiny_checkpoint), str(tmp_path / "out"), "-r", "fit")
    result = m1(*arguments, "--budget", "110kB", "--no-certify")
    assert "could not be kept" in result.stderr
    assert CheckpointManifest.read(tmp_path / "out").recipe == "fit"


def test_only_so_many_tokens_are_measured(tiny_checkpoint: Path) -> None:
    samples = Source.open(tiny_checkpoint).read_text(CALIBRATION).samples
    assert sensitivity._first(samples * 100)[0] == samples[0]
    used = sensitivity._first(samples * 100)
    tokens = sum(len(sample.token_ids) for sample in used)
    assert tokens <= sensitivity.MOST_TOKENS < tokens + 512
    assert len(sensitivity._first(samples[:1])) == 1


def m1(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def test_fit_from_the_command_line_measures_once(
    tiny_checkpoint: Path, tmp_path: Path, m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = str(tiny_checkpoint), tmp_path / "out"
    first = m1("quantize", source, str(target), "-r", "fit", "--budget", "110kB")
    assert first.exit_code == 0, first.output
    assert "fit: weights within 0.1 MiB" in first.stderr
    manifest = CheckpointManifest.read(target)
    assert manifest.recipe == "fit"
    assert len(set(manifest.linears.values())) > 1
    weights = sum(r.nbytes for n, r in manifest.files.items() if n.endswith(".safetensors"))
    assert weights < 110_000 + 12_000  # the header comes on top
    monkeypatch.setattr(sensitivity, "measure_sensitivity", None)
    again = m1("quantize", source, str(target), "-r", "fit", "--budget", "130kB", "--overwrite")
    assert again.exit_code == 0, again.output
    dry = m1("quantize", source, str(tmp_path / "no"), "-r", "fit", "--for", "1GB", "-c", "64",
             "--dry-run")  # fmt: skip
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-r", "fit"], "needs a size: --budget 7GiB"),
        (["-r", "fit", "--budget", "1kB"], "at least by the recipe fit"),
        (["-r", "fit", "--for", "450MB"], "at least by the recipe fit"),
        (["-r", "int4", "--budget", "1GB"], "go with the recipe fit"),
        (["-r", "bad.toml", "--budget", "1GB"], "group size is None"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(
    tiny_checkpoint: Path,
    tmp_path: Path,
    m1_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    rule = '[[rules]]\nmatch = "*o_proj"\nformat = "int4"\n'
    (tmp_path / "bad.toml").write_text(f'method = "rtn"\nfit = ["int8"]\n{rule}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sensitivity, "measure_sensitivity", None)  # found out before that
    result = m1("quantize", str(tiny_checkpoint), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    error = result.stderr[result.stderr.index("error: ") :]
    assert complaint in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_an_occupied_target_is_refused_before_anything_is_measured(
    tiny_checkpoint: Path, tmp_path: Path, m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "measure_sensitivity", None)
    (tmp_path / "mine.txt").touch()
    result = m1("quantize", str(tiny_checkpoint), str(tmp_path), "-r", "fit", "--budget", "1GB")
    assert result.exit_code == 1
    assert "holds other files ('mine.txt')" in result.stderr


def test_run_wants_a_size_for_fit(tiny_checkpoint: Path, m1_home: Path) -> None:
    result = m1("run", str(tiny_checkpoint), "-r", "fit", "-p", "hello")
    assert result.exit_code == 1
    assert "needs a size: --budget 7GiB" in result.stderr
    other = m1("run", str(tiny_checkpoint), "--budget", "1GB", "-p", "hello")
    assert other.exit_code == 1
    assert "go with the recipe fit" in other.stderr
    page = m1("ui", str(tiny_checkpoint), "-r", "fit")
    assert page.exit_code == 1
    assert "give `m1 run` or `m1 quantize` one with --budget" in page.stderr


def test_run_makes_a_checkpoint_of_a_size_once(
    tiny_checkpoint: Path, m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("run", str(tiny_checkpoint), "-r", "fit", "-p", "hello", "-n", "2", "-c", "64")
    made: set[Path] = set()
    for size in (("--budget", "110kB"), ("--budget", "110500B"), ("--for", "700MB")):
        first = m1(*run, *size)
        assert first.exit_code == 0, first.output
        (new,) = set((m1_home / "models").iterdir()) - made
        made.add(new)
        assert re.search(r"-fit-\d+\.\d\dGiB-[0-9a-f]{8}$", new.name)
        manifest = CheckpointManifest.read(new)
        assert manifest.recipe == "fit"
        monkeypatch.setattr(sensitivity, "measure_sensitivity", None)  # measured once for all
    with monkeypatch.context() as patch:
        patch.setattr("m1local_quantize.pipeline.quantize_checkpoint", None)  # and made once
        assert m1(*run, "--budget", "110kB").exit_code == 0
    chosen = m1("run", str(new), "-r", "fit", "--budget", "1GB", "-p", "hello")
    assert chosen.exit_code == 2
    assert "was quantized by the recipe fit" in chosen.stderr


def test_a_source_that_is_dropped_cannot_be_read_twice(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source.open(tiny_checkpoint)
    monkeypatch.setattr(type(source.files), "passing", True)
    with refused(RecipeError, "reads the original twice, so it must stay: add --keep-source"):
        fitting.fitted_recipe(Recipe.find("fit"), source, fitting.Size(budget=1))


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [LinearSpec("int4", 64), LinearSpec("int5", 64)])
def test_fit_is_at_least_as_good_as_a_uniform_recipe_of_its_size(
    uniform: LinearSpec, tmp_path: Path
) -> None:
    source, fit = Source.open(DEMO), Recipe.find("fit")
    body = f'[[rules]]\nmatch = "*"\nformat = "{uniform.format}"\ngroup_size = {uniform.group_size}'
    (tmp_path / "uniform.toml").write_text(f'method = "gptq"\n{body}\n')
    even = Recipe.find(str(tmp_path / "uniform.toml"))
    budget = Plan.of(source, even).target_bytes
    chosen = fitted(fit, source, costs_of(DEMO, list(fit.candidates)), budget)
    kl = {}
    for recipe in (even, chosen):
        list(quantize_checkpoint(source, tmp_path / recipe.name, recipe, text=SHIPPED))
        manifest = CheckpointManifest.read(tmp_path / recipe.name)
        assert manifest.certificate is not None
        kl[recipe.name] = float(manifest.certificate["mean_kl"])
    assert kl["fit"] <= kl["uniform"], kl
