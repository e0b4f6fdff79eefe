"""optimum-gptq: optimum's codes become int4 exactly, and nobody needs it who does not use it.

What needs optimum and gptqmodel is skipped without them; the rest is proven on made-up values.
"""

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m1local.checkpoint import load_model
from m1local.errors import DependencyError, RecipeError
from m1local.formats import LinearSpec
from m1local.formats.groups import Int4Linear, unpack_plane
from m1local.manifest import CheckpointManifest
from m1local_quantize.evaluate import Sample
from m1local_quantize.methods import optimum_gptq, quantizer
from m1local_quantize.pipeline import Planned, quantize_checkpoint
from m1local_quantize.plan import Plan
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source
from m1local_quantize.source_files import LocalFiles
from m1local_quantize.text import CALIBRATION
from tests.damage import refused
from tests.test_architecture import PACKAGES, python_files
from tests.test_gptq import inputs_squared, output_error
from tests.test_pipeline import bytes_of

HEAD_AND_EMBEDDING = """
[[rules]]
match = "model.embed_tokens"
format = "int8"
[[rules]]
match = "lm_head"
format = "int4"
group_size = 32
"""
REST = '[[rules]]\nmatch = "*"\nformat = "int4"\ngroup_size = 32\n'
DOWN = "model.layers.1.mlp.down_proj"
FIRST = "model.layers.0.self_attn.W_pack"  # what comes into it does not depend on any other
SPEC = LinearSpec("int4", 32)


def recipe(folder: Path, rules: str = "") -> Recipe:
    path = folder / "own.toml"
    path.write_text(f'method = "optimum-gptq"\n{HEAD_AND_EMBEDDING}{rules}{REST}')
    return Recipe.find(str(path))


def int8(module: str) -> str:
    return f'[[rules]]\nmatch = "{module}"\nformat = "int8"\n'


@pytest.mark.parametrize("missing", ["optimum", "gptqmodel"])
def test_without_the_extra_only_its_use_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    if missing == "optimum":  # whether or not the other one is installed
        monkeypatch.setitem(sys.modules, "gptqmodel", type(sys)("gptqmodel"))
    monkeypatch.setitem(sys.modules, missing, None)
    chosen = recipe(tmp_path)
    plan = Plan.of(Source.open(tiny_checkpoint), chosen)
    assert plan.needs_calibration
    match = rf'needs optimum and gptqmodel \(.*{missing}.*\): `pip install torch==2.* "optimum>='
    with refused(DependencyError, match):
        list(quantize_checkpoint(tiny_checkpoint, tmp_path / "out", chosen))
    assert not (tmp_path / "out").exists()


def test_another_group_size_for_some_matrices_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = f'[[rules]]\nmatch = "{DOWN}"\nformat = "int4"\ngroup_size = 64\n'
    with refused(RecipeError, "one group size for the whole model, but the recipe has 32 and 64"):
        list(quantize_checkpoint(tiny_checkpoint, tmp_path / "out", recipe(tmp_path, other)))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_dropped_while_it_comes_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source.open(tiny_checkpoint)
    plan = Plan.of(source, recipe(tmp_path))
    monkeypatch.setattr(LocalFiles, "passing", True)
    with refused(RecipeError, "needs the whole model at once"):
        optimum_gptq.check(source, plan)
    optimum_gptq.check(source, Plan.of(source, Recipe.find("int4-gptq")))


def test_codes_stay_as_they_are_and_only_scales_and_zeros_are_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (6, 3, 32), generator=generator)
    zero = torch.randint(0, 16, (6, 3), generator=generator).float()
    scale = torch.rand(6, 3, generator=generator) + 0.01
    weight = ((codes - zero[..., None]) * scale[..., None]).flatten(1)
    tensors = optimum_gptq.stored(weight, scale, zero)
    assert torch.equal(unpack_plane(tensors["weight"], 4), codes.flatten(1).to(torch.uint8))
    found = Int4Linear.from_tensors(tensors, (6, 96), SPEC).dequantize()
    # A bfloat16 has eight bits: scale and zero are wrong by 1/256 of themselves at most.
    steps = (found - weight).view(6, 3, 32).abs() / scale[..., None]
    assert float(steps.max()) <= (8 + 8) / 256 + 1e-5


def test_what_comes_from_optimum_is_stored_and_it_is_asked_for_nothing_else(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, Tensor] = {}
    asked: list[object] = []

    def instead(backbone: nn.Module, *others: object) -> dict[str, tuple[Tensor, Tensor]]:
        asked.append(others)
        found = {}
        for name, linear in backbone.named_modules():
            if type(linear) is nn.Linear:  # what optimum takes
                codes = torch.arange(linear.weight.numel()).view(linear.weight.shape) % 16
                linear.weight = nn.Parameter((codes - 3) * 0.5, requires_grad=False)
                expected[f"model.{name}"] = linear.weight.clone()
                groups = (linear.out_features, linear.in_features // 32)
                found[f"model.{name}"] = torch.full(groups, 0.5), torch.full(groups, 3.0)
        return found

    monkeypatch.setattr(optimum_gptq, "quantize", instead)
    monkeypatch.setattr(optimum_gptq, "optimum_gptq", lambda: None)
    monkeypatch.setattr(optimum_gptq, "versions", lambda plan: [])
    chosen = recipe(tmp_path, int8(DOWN))
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "q", chosen, text=None))
    assert asked == [(SPEC, samples(tiny_checkpoint))]
    assert len(expected) == 4 * 5 - 1
    assert DOWN not in expected
    model = load_model(tmp_path / "q", dtype=torch.float32)
    for name, weight in expected.items():
        assert torch.equal(dequantized(model, name), weight)


def test_optimum_is_imported_in_one_file_only() -> None:
    files = python_files(*PACKAGES.values())
    users = {path.name for path in files if 'import_module("optimum' in path.read_text("utf-8")}
    assert users == {"optimum_gptq.py"}


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("optimum.gptq", "gptqmodel"):
        pytest.importorskip(package, reason="pip install -e '.[optimum]'")
    folder = tmp_path_factory.mktemp("optimum")
    list(quantize_checkpoint(tiny_checkpoint, folder / "q", recipe(folder, int8(DOWN))))
    return folder / "q"


def test_the_result_is_an_int4_checkpoint(made: Path, tiny_checkpoint: Path) -> None:
    manifest = CheckpointManifest.read(made)
    assert manifest.method == "optimum-gptq"
    assert manifest.calibration == Source.open(tiny_checkpoint).read_text(CALIBRATION).sha256
    assert manifest.linears[DOWN] == LinearSpec("int8", None)
    assert manifest.linears[FIRST] == SPEC
    model = load_model(made, dtype=torch.float32)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear) and module.in_features == 64:
            expected = x @ module.dequantize().T
            torch.testing.assert_close(module(x), expected, atol=1e-4, rtol=1e-4, msg=name)


def test_a_head_is_refitted_and_other_matrices_are_not_its_business(
    made: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "refit.toml"
    path.write_text(f'method = "refit"\n{HEAD_AND_EMBEDDING}{int8(DOWN)}{REST}')
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "q", Recipe.find(str(path)), text=None))
    found, expected = (load_model(f, dtype=torch.float32) for f in (made, tmp_path / "q"))
    for name in ("lm_head", DOWN):
        assert torch.equal(dequantized(found, name), dequantized(expected, name))
    assert not torch.equal(dequantized(found, FIRST), dequantized(expected, FIRST))


def dequantized(model: nn.Module, name: str) -> Tensor:
    weight: Tensor = model.get_submodule(name).dequantize()  # type: ignore[operator]
    return weight


def test_it_has_less_error_than_rounding_where_it_matters(
    made: Path, tiny_checkpoint: Path
) -> None:
    source = load_model(tiny_checkpoint, dtype=torch.float32)
    hessian = inputs_squared(source, FIRST, samples(tiny_checkpoint))
    weight = source.get_submodule(FIRST).get_parameter("weight")
    rounded = Int4Linear.from_tensors(quantizer("rtn", SPEC)(weight, SPEC), (192, 64), SPEC)
    found = dequantized(load_model(made, dtype=torch.float32), FIRST)
    error = output_error(weight, found, hessian)
    assert error < 0.6 * output_error(weight, rounded.dequantize(), hessian)


def samples(checkpoint: Path) -> tuple[Sample, ...]:
    return Source.open(checkpoint).read_text(CALIBRATION).samples


def test_a_continued_run_ends_in_the_same_bytes(
    made: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target, chosen = tmp_path / "out", recipe(tmp_path, int8(DOWN))
    run = quantize_checkpoint(tiny_checkpoint, target, chosen)
    list(islice(run, 15))
    run.close()  # type: ignore[attr-defined]  # a generator
    events = list(quantize_checkpoint(tiny_checkpoint, target, chosen))
    assert isinstance(events[0], Planned)
    assert events[0].resumed_bytes > 0
    assert bytes_of(target) == bytes_of(made)
