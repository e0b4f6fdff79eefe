"""GPTQ against the procedure it abbreviates, and the inputs it is calibrated with."""

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m1local.checkpoint import load_model
from m1local.errors import CalibrationError
from m1local.formats import LinearSpec
from m1local.formats.groups import Int4Linear, group_class, unpack_plane
from m1local.manifest import CheckpointManifest
from m1local_quantize.calibration import Calibrator
from m1local_quantize.evaluate import Sample
from m1local_quantize.methods import gptq, quantizer, refit
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.plan import Plan
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source
from m1local_quantize.text import CALIBRATION, SHIPPED
from tests.damage import refused
from tests.test_pipeline import bytes_of

SPEC = LinearSpec("int4", 32)
RECIPE = "int4-gptq"


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs (rows, columns) whose columns go together, some far stronger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    strength = 10 ** torch.empty(columns).uniform_(-1, 1, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    inputs: Tensor = noise @ (mixing + torch.eye(columns)) * strength
    return inputs


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def restored(tensors: dict[str, Tensor], shape: tuple[int, int], spec: LinearSpec = SPEC) -> Tensor:
    return group_class(spec).from_tensors(tensors, shape, spec).dequantize()


def output_error(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """The squared error of X @ W.T, summed over everything."""
    difference = weight - found
    return float((difference @ hessian * difference).sum())


def textbook(weight: Tensor, hessian: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order: the inverse is computed anew at every column.

    Codes (N, K); O(K^4), and nothing of the Cholesky trick in it.
    """
    columns = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True).tolist()
    scales, zeros = (
        part.to(torch.bfloat16).double()
        for part in refit.fit(weight.reshape(len(weight), -1, 32), Int4Linear)
    )
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(columns)
    work, codes = weight.double().clone(), torch.zeros(weight.shape)
    for done, column in enumerate(order):
        left = order[done:]
        inverse = torch.linalg.inv(damped[left][:, left])
        scale, zero = scales[:, column // 32], zeros[:, column // 32]
        code = ((work[:, column] - zero) / scale).round().clamp(-8, 7)
        codes[:, column] = code + 8
        error = (work[:, column] - (code * scale + zero)) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("columns", [32, 96, 160])  # less than a block, and no multiple of one
def test_gptq_is_the_textbooks(columns: int) -> None:
    x, weight = correlated(400, columns), weights(12, columns)
    hessian = x.T @ x
    found = gptq.prepare(hessian.clone())(weight, SPEC)
    codes, expected = unpack_plane(found["weight"], 4), textbook(weight, hessian)
    # float32 and float64 may round a near-tie differently, which changes what follows in its row.
    same_rows = (codes == expected).all(dim=1).float().mean()
    assert float(same_rows) >= 0.8
    error = output_error(weight, restored(dict(found), (12, columns)), hessian)
    fitted = refit.fit(weight.view(12, -1, 32), Int4Linear)
    scales, zeros = (part.to(torch.bfloat16).float() for part in fitted)
    by_textbook = (expected.view(12, -1, 32) - 8) * scales[..., None] + zeros[..., None]
    assert error == pytest.approx(output_error(weight, by_textbook.flatten(1), hessian), rel=0.02)


def test_with_inputs_that_do_not_go_together_it_is_refit() -> None:
    weight = weights(9, 96)
    found = gptq.prepare(torch.eye(96) * 3)(weight, SPEC)
    expected = quantizer("refit", SPEC)(weight, SPEC)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("rows", [20, 400])  # fewer inputs than columns, and many
@pytest.mark.parametrize("name", ["int3", "int4", "int5", "int6"])
def test_it_has_less_error_than_rounding_where_it_matters(name: str, rows: int) -> None:
    x, weight, spec = correlated(rows, 128), weights(40, 128), LinearSpec(name, 32)
    hessian = x.T @ x
    by_gptq = restored(dict(gptq.prepare(hessian)(weight, spec)), (40, 128), spec)
    by_refit = restored(dict(quantizer("refit", spec)(weight, spec)), (40, 128), spec)
    error = output_error(weight, by_gptq, hessian)
    assert error < 0.6 * output_error(weight, by_refit, hessian)


def test_few_inputs_are_believed_less() -> None:
    """What matters is the error on inputs that were not seen."""
    x, weight = correlated(2000, 128), weights(40, 128)
    seen, unseen = x[:60], x[60:]
    hessian = seen.T @ seen
    errors = {}
    for inputs in (None, len(seen)):
        found = restored(dict(gptq.prepare(hessian.clone(), inputs)(weight, SPEC)), (40, 128))
        errors[inputs] = output_error(weight, found, unseen.T @ unseen)
    assert errors[60] < 0.9 * errors[None]


def test_columns_that_never_have_input_do_no_harm() -> None:
    x, weight = correlated(200, 64), weights(5, 64)
    x[:, 10:20] = 0
    found = restored(dict(gptq.prepare(x.T @ x)(weight, SPEC)), (5, 64))
    assert torch.isfinite(found).all()
    assert float((found - weight).abs().max()) < 1
    silent = restored(dict(gptq.prepare(torch.zeros(64, 64))(weight, SPEC)), (5, 64))
    assert float((silent - weight).abs().max()) < 1


def test_a_hessian_that_is_hard_to_invert_is_damped_more() -> None:
    x = torch.ones(3, 64) * 1e4
    factor = gptq.inverse_factor(x.T @ x - 3e6 * torch.eye(64))  # not positive definite any more
    assert torch.isfinite(factor).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    calibrator = object.__new__(Calibrator)
    calibrator._layer, calibrator._hessians = 0, {"mlp.down_proj": torch.full((4, 4), math.inf)}
    said = r"into model\.layers\.0\.mlp\.down_proj is not finite.*--calibration"
    with refused(CalibrationError, said):
        calibrator.hessian("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 24, 45])  # about a tile, and several
def test_the_factor_is_that_of_the_inverse(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "TILE", 8)
    x = correlated(4 * size, size)
    hessian = x.T @ x
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(size)
    factor = gptq.inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert float((factor - expected).norm() / expected.norm()) < 1e-3
    turned = torch.arange(size * size).reshape(size, size)
    gptq.reverse_(turned)
    assert torch.equal(turned.flatten(), torch.arange(size * size).flip(0))


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "q"
    list(quantize_checkpoint(tiny_checkpoint, folder, Recipe.find(RECIPE)))
    return folder


def test_hessians_come_from_the_layers_as_they_were_written(
    calibrated: Path, tiny_checkpoint: Path
) -> None:
    source = Source.open(tiny_checkpoint)
    plan = Plan.of(source, Recipe.find(RECIPE))
    samples = source.read_text(CALIBRATION).samples
    calibrator = Calibrator(source, calibrated, plan, samples)
    # A model whose embedding and first two layers are the written ones; else the original.
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    written = load_model(calibrated, dtype=torch.float32)
    model.model.embed_tokens = written.model.embed_tokens
    for layer in range(2):
        model.model.layers[layer] = written.model.layers[layer]
    for name in ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        module = f"model.layers.2.{name}"
        assert_close(calibrator.hessian(module), inputs_squared(model, module, samples))


def inputs_squared(model: nn.Module, module: str, samples: tuple[Sample, ...]) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0])
    )
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([sample.token_ids]))
    hook.remove()
    x = torch.cat(seen)
    return x.T @ x


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_it_is_nearer_to_its_original_than_refit(
    calibrated: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Even on random weights, and on a text that it was not calibrated with."""
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "q", Recipe.find("int4")))
    by_gptq, by_refit = (
        CheckpointManifest.read(folder).certificate for folder in (calibrated, tmp_path / "q")
    )
    assert by_gptq is not None
    assert by_refit is not None
    assert float(by_gptq["mean_kl"]) < float(by_refit["mean_kl"])


@pytest.mark.parametrize("tensors", [3, 17, 38])
def test_a_continued_run_passes_the_finished_layers_again(
    calibrated: Path, tiny_checkpoint: Path, tmp_path: Path, tensors: int
) -> None:
    target = tmp_path / "out"
    run = quantize_checkpoint(tiny_checkpoint, target, Recipe.find(RECIPE))
    assert len(list(islice(run, 1 + tensors))) == 1 + tensors
    run.close()  # type: ignore[attr-defined]  # a generator
    list(quantize_checkpoint(tiny_checkpoint, target, Recipe.find(RECIPE)))
    assert bytes_of(target) == bytes_of(calibrated)


def test_another_calibration_starts_over_and_is_in_the_manifest(
    tiny_checkpoint: Path, tmp_path: Path, calibrated: Path
) -> None:
    target, recipe = tmp_path / "out", Recipe.find(RECIPE)
    run = quantize_checkpoint(tiny_checkpoint, target, recipe)
    list(islice(run, 20))
    run.close()  # type: ignore[attr-defined]  # a generator
    *_, _ = quantize_checkpoint(tiny_checkpoint, target, recipe, calibration=SHIPPED)
    found, other = CheckpointManifest.read(target), CheckpointManifest.read(calibrated)
    assert found.calibration != other.calibration
    assert found.method == "gptq"
    assert bytes_of(target)["model.safetensors"] != bytes_of(calibrated)["model.safetensors"]


def test_a_calibration_of_no_use_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    with refused(CalibrationError, "has only 0 tokens"):
        list(
            quantize_checkpoint(
                tiny_checkpoint,
                tmp_path / "out",
                Recipe.find(RECIPE),
                calibration=tmp_path / "empty.txt",
            )
        )
    assert not (tmp_path / "out").exists()


def test_the_shipped_texts_share_nothing() -> None:
    calibration, measured = (
        path.read_text(encoding="utf-8").splitlines() for path in (CALIBRATION, SHIPPED)
    )
    assert not set(calibration) & set(measured)
