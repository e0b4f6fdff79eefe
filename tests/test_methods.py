"""The data-free methods: their textbook formulas, written a second time, and what they are for."""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from m1local.checkpoint import load_model
from m1local.formats import LinearSpec
from m1local.formats.groups import Int4Linear, group_class
from m1local.home import DEMO
from m1local.tokenizer import M1Tokenizer, Message
from m1local_quantize.evaluate import Sample, compare
from m1local_quantize.methods import METHODS, hqq, method_for, quantizer, refit

INT4 = [LinearSpec("int4", group_size) for group_size in (32, 64, 128)]
GROUPS = [*INT4, LinearSpec("int3", 64), LinearSpec("int5", 64), LinearSpec("int6", 64)]
every_group = pytest.mark.parametrize(
    "spec", GROUPS, ids=lambda spec: f"{spec.format}-{spec.group_size}"
)


def matrix(rows: int, columns: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    heavy = torch.randn(rows, columns, generator=generator) ** 3  # with outliers
    return (heavy * size).to(torch.bfloat16)


def dequantized(tensors: dict[str, Tensor], shape: tuple[int, int], spec: LinearSpec) -> Tensor:
    return group_class(spec).from_tensors(tensors, shape, spec).dequantize()


def error(method: str, weight: Tensor, spec: LinearSpec) -> float:
    shape = (weight.shape[0], weight.shape[1])
    restored = dequantized(dict(quantizer(method, spec)(weight, spec)), shape, spec)
    return float((restored - weight.float()).square().mean())


def textbook_hqq_zero(group: list[float]) -> tuple[float, float]:
    """Scale and zero of one group, in the words of the paper; W ~ scale * (code - zero)."""
    low, high = min(group), max(group)
    scale = (high - low) / 15
    zero, beta = -low / scale, 10.0
    for _ in range(5):
        kept = []
        for w in group:
            code = min(max(float(np.round(w / scale + zero)), 0), 15)
            residual = w - scale * (code - zero)
            size = abs(residual)
            shrunk = max(0.0, size - max(size, 1e-9) ** (0.7 - 1) / beta)
            kept.append(code - (w - math.copysign(shrunk, residual)) / scale)
        zero = sum(kept) / len(kept)
        beta *= 1.01
    return scale, zero


@pytest.mark.parametrize("size", [0.02, 30.0])
def test_hqq_is_the_textbooks(size: float) -> None:
    weight = matrix(3, 64, size)
    grouped = weight.float().reshape(3, 2, 32)
    low, high = grouped.amin(2), grouped.amax(2)
    scales, zeros = hqq.optimize(grouped.double(), ((high - low) / 15).double(), low.double(), 15)
    for row in range(3):
        for group in range(2):
            expected = textbook_hqq_zero([float(w) for w in grouped[row, group]])
            found = (float(scales[row, group]), float(zeros[row, group]))
            assert found == pytest.approx(expected, rel=1e-5)


def test_the_power_is_one() -> None:
    exponents = torch.empty(100_000).uniform_(-30, 127, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([1e-9, 0.5, 1.0, 1.9999999, 2.0, 3.3e38])
    x = torch.cat((edges, 2**exponents))
    expected = x.double() ** (hqq.NORM - 1)
    assert float((hqq.power(x) / expected - 1).abs().max()) < 3e-7


@pytest.mark.parametrize("end", [3e38, 1e38, 1e-38])
def test_groups_near_the_end_of_the_range_stay_finite(end: float) -> None:
    weight, spec = (torch.linspace(-1, 1, 64) * end).to(torch.bfloat16).reshape(1, 64), INT4[0]
    for method in ("hqq", "refit"):
        restored = dequantized(dict(quantizer(method, spec)(weight, spec)), (1, 64), spec)
        assert torch.isfinite(restored).all()


def test_hqq_lets_outliers_be_wrong_only_where_errors_are_large() -> None:
    x = torch.tensor([0.0, 0.01, -0.01, 2.0, -2.0])
    shrunk = hqq.shrink(x, 0.1)
    assert shrunk[:3].tolist() == [0, 0, 0]
    assert float(shrunk[3]) == pytest.approx(2 - 2**-0.3 / 10)
    assert float(shrunk[4]) == -float(shrunk[3])


def test_refit_is_the_regression_of_weights_on_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "ITERATIONS", 1)
    monkeypatch.setattr(refit, "START", {})
    grouped = matrix(2, 128).double().reshape(2, 4, 32)
    scales, zeros = refit.fit(grouped, Int4Linear)
    for row in range(2):
        for group in range(4):
            weights = grouped[row, group].numpy()
            low, high = weights.min(), weights.max()
            codes = np.round((weights - low) / ((high - low) / 15))
            slope, offset = np.polyfit(codes - 8, weights, 1)
            assert float(scales[row, group]) == pytest.approx(slope, rel=1e-6)
            assert float(zeros[row, group]) == pytest.approx(offset, rel=1e-6, abs=1e-9)


@every_group
@pytest.mark.parametrize("columns", [128, 384])
def test_each_method_has_less_error_than_the_one_before(spec: LinearSpec, columns: int) -> None:
    weight = torch.randn(300, columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    errors = [error(method, weight, spec) for method in ("rtn", "hqq", "refit")]
    assert errors == sorted(errors, reverse=True)
    outliers = matrix(300, columns, 0.02)
    assert error("refit", outliers, spec) < 0.95 * error("rtn", outliers, spec)


def test_refits_error_never_grows_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(64, 128)
    errors = []
    for rounds in range(6):
        monkeypatch.setattr(refit, "ITERATIONS", rounds)
        scales, zeros = refit.fit(grouped := weight.float().reshape(64, -1, 32), Int4Linear)
        codes = ((grouped - zeros[..., None]) / scales[..., None]).round().clamp(-8, 7)
        restored = codes * scales[..., None] + zeros[..., None]
        errors.append(float((restored - grouped).square().sum()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", ["hqq", "refit"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30])
def test_constant_groups_stay_what_they_are(method: str, value: float) -> None:
    weight = torch.full((5, 64), value, dtype=torch.bfloat16)
    weight[1, :32] = torch.linspace(-1, 1, 32)
    spec = INT4[0]
    restored = dequantized(dict(quantizer(method, spec)(weight, spec)), (5, 64), spec)
    assert torch.isfinite(restored).all()
    assert torch.equal(restored[2:], weight[2:].float())
    assert torch.equal(restored[1, 32:], weight[1, 32:].float())


@pytest.mark.parametrize("method", METHODS)
def test_slices_of_rows_are_quantized_independently(method: str) -> None:
    spec, weight = INT4[1], matrix(70, 128)
    whole = quantizer(method, spec)(weight, spec)
    first, second = (quantizer(method, spec)(part, spec) for part in (weight[:33], weight[33:]))
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat((first[name], second[name])))


def test_a_method_leaves_other_formats_to_rounding() -> None:
    assert method_for("hqq", LinearSpec("int8")) == "rtn"
    assert method_for("hqq", INT4[0]) == "hqq"
    spec, weight = LinearSpec("int8"), matrix(4, 64)
    assert torch.equal(
        quantizer("refit", spec)(weight, spec)["weight"],
        quantizer("rtn", spec)(weight, spec)["weight"],
    )


@pytest.mark.slow
def test_on_the_demo_refit_and_hqq_are_nearer_to_the_original_than_rtn() -> None:
    tokenizer = M1Tokenizer.from_folder(DEMO)
    card = (DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    answers = re.findall(r"^- \*\*(.*?)\*\* (.*)$", card, re.MULTILINE)
    assert len(answers) == 30
    samples = []
    for question, answer in answers:
        prompt = tokenizer.render([Message("user", question)])
        ids = prompt + tokenizer.render([Message("assistant", answer)])
        samples.append(Sample(tuple(ids), len(prompt) + 1))
    reference = load_model(DEMO, dtype=torch.float32)
    divergence = {}
    for method in ("rtn", "refit", "hqq"):
        model, spec = load_model(DEMO, dtype=torch.float32), INT4[1]
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                shape = (parameter.shape[0], parameter.shape[1])
                tensors = dict(quantizer(method, spec)(parameter.data, spec))
                parameter.data.copy_(dequantized(tensors, shape, spec))
        divergence[method] = compare(reference, model, samples).mean_kl
    assert divergence["refit"] < divergence["rtn"]
    assert divergence["hqq"] < divergence["rtn"]
