"""The compiled library gives torch's own results, bit for bit; torch's code is the oracle."""

import ctypes
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from m1local.formats import LinearSpec, format_class
from m1local.formats.groups import Int4Linear
from m1local.formats.slices import ROWS_QUANTIZED
from m1local.model import normalize_head
from m1local.native import library
from m1local.native import quantize as native
from m1local_quantize.methods import hqq, quantizer, refit
from m1local_quantize.source import all_finite
from tests.test_formats import assert_bit_equal

INT8 = LinearSpec("int8")
GROUPS = [LinearSpec(f"int{bits}", size) for bits in (3, 4, 5, 6) for size in (32, 64, 128)]
CHOSEN = [("rtn", INT8), *((method, spec) for method in ("rtn", "refit", "hqq") for spec in GROUPS)]
SHAPES = [(1, 128), (7, 384), (33, 640)]  # less than a block of lanes; an odd number; several
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.status().text)
every_choice = pytest.mark.parametrize(
    ("method", "spec"), CHOSEN, ids=lambda value: value if isinstance(value, str) else str(value)
)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def any_bits(shape: tuple[int, int], seed: int) -> Tensor:
    """Every bfloat16 there is: subnormal, huge, negative zero; but no NaN and no infinity."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=draw(seed)).to(torch.int16)
    found = bits.view(torch.bfloat16).float()
    return torch.where(found.isfinite(), found, -0.0)


def one_size_a_row(shape: tuple[int, int], seed: int) -> Tensor:
    sizes = 10 ** torch.empty(shape[0], 1).uniform_(-45, 38, generator=draw(seed))
    return torch.randn(shape, generator=draw(seed)).clamp(-3, 3) * sizes


def two_ends(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.where(torch.rand(shape, generator=draw(seed)) < 0.5, BFLOAT16_MAX, -BFLOAT16_MAX)


def zeros_of_both_signs(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.where(torch.rand(shape, generator=draw(seed)) < 0.5, 0.0, -0.0)


def half_constant(shape: tuple[int, int], seed: int) -> Tensor:
    found = torch.randn(shape, generator=draw(seed))
    found[:, : shape[1] // 2] = found[:, :1]
    found[0] = 0
    return found


def small_integers(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=draw(seed)) / 2  # many ties


KINDS: dict[str, Callable[[tuple[int, int], int], Tensor]] = {
    "normal": lambda shape, seed: torch.randn(shape, generator=draw(seed)) * 0.02,
    "heavy": lambda shape, seed: torch.randn(shape, generator=draw(seed)) ** 5,
    "far from zero": lambda shape, seed: 100 + torch.randn(shape, generator=draw(seed)) / 100,
    "subnormal": lambda shape, seed: torch.randn(shape, generator=draw(seed)) * 1e-39,
    "any bits": any_bits,
    "one size a row": one_size_a_row,
    "two ends": two_ends,
    "zeros of both signs": zeros_of_both_signs,
    "half constant": half_constant,
    "small integers": small_integers,
}


def by_torch(
    monkeypatch: pytest.MonkeyPatch, method: str, rows: Tensor, spec: LinearSpec
) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return dict(quantizer(method, spec)(rows, spec))


def bits_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As bytes: there 0 and -0 differ."""
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 128, 129, 640])
def test_rows_of_unit_length_have_torchs_bits(
    kind: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = KINDS[kind]((5, columns), columns)
    narrow = wide.clamp(-BFLOAT16_MAX, BFLOAT16_MAX).to(torch.bfloat16)
    for rows in (narrow, wide):
        assert native.unit_rows(rows) is not None
        kept = rows.clone()
        found = normalize_head(rows, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            expected = normalize_head(rows, torch.float32)
        assert_bit_equal(bits_of({"head": found}), bits_of({"head": expected}))
        assert torch.equal(rows, kept)
        assert normalize_head(rows).dtype == rows.dtype


@every_choice
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_torchs(
    method: str, spec: LinearSpec, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, shape in enumerate(SHAPES):
        wide = KINDS[kind](shape, seed)
        narrow = wide.clamp(-BFLOAT16_MAX, BFLOAT16_MAX).to(torch.bfloat16)
        for rows in (narrow, wide):
            expected = bits_of(by_torch(monkeypatch, method, rows, spec))
            found = bits_of(dict(quantizer(method, spec)(rows, spec)))
            assert_bit_equal(found, expected)


def test_the_library_is_what_the_formats_and_methods_use(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Mock(wraps=native._serving)
    monkeypatch.setattr(native, "_serving", serving)
    monkeypatch.setattr(refit, "fit", None)
    monkeypatch.setattr(hqq, "optimize", None)
    monkeypatch.setattr(Int4Linear, "encode", None)
    rows = torch.randn(3, 128).to(torch.bfloat16)
    for method, spec in (("rtn", INT8), *((m, GROUPS[3]) for m in ("rtn", "refit", "hqq"))):
        quantizer(method, spec)(rows, spec)
    assert serving.call_count == 4


@every_choice
def test_several_threads_give_the_same_bits(method: str, spec: LinearSpec) -> None:
    rows = torch.randn(101, 384, generator=draw(0)).to(torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(dict(quantizer(method, spec)(rows, spec)))
    finally:
        torch.set_num_threads(before)
    assert_bit_equal(*found)


@pytest.mark.parametrize("flags", library.FLAGS[1:], ids=" ".join)
def test_other_flags_give_the_same_bits(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / f"other{library.SUFFIX}"
    complaint = library._build(library._compiler(), flags, built)
    if complaint:
        pytest.skip(f"this compiler takes other flags: {complaint}")
    other = ctypes.CDLL(str(built))
    for method, spec in CHOSEN[::4]:
        for kind in ("heavy", "any bits"):
            rows = KINDS[kind]((9, 384), 1).to(torch.bfloat16)
            expected = bits_of(dict(quantizer(method, spec)(rows, spec)))
            with monkeypatch.context() as patch:
                patch.setattr(native, "library", lambda: other)
                assert_bit_equal(bits_of(dict(quantizer(method, spec)(rows, spec))), expected)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_value_that_is_no_number_is_found(bad: float, dtype: torch.dtype) -> None:
    for count in (1, 15, 16, 17, 100):
        values = any_bits((1, count), count)[0].to(dtype)
        assert native.all_finite(values) is True
        for place in {0, count // 2, count - 1}:
            spoilt = values.clone()
            spoilt[place] = bad
            assert native.all_finite(spoilt) is False


def test_without_the_library_the_same_values_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    ends = two_ends((4, 64), 0).to(torch.bfloat16)  # whose sum overflows
    assert all_finite(ends)
    assert all_finite(ends.half().float().nan_to_num())
    ends[2, 5] = float("nan")
    assert not all_finite(ends)


def test_rows_it_does_not_know_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(8, 256, generator=draw(0))
    odd = torch.zeros(8 * 256 * 4 + 1, dtype=torch.uint8)[1:]
    assert native.quantize_rows(rows.half()) is None
    assert native.quantize_rows(rows.T) is None
    assert native.quantize_rows(rows.to("meta")) is None
    assert odd.data_ptr() % 4
    for other in (rows.half(), rows[:, ::2], rows.double()):
        for method, spec in (("rtn", INT8), ("refit", GROUPS[4])):
            found = dict(quantizer(method, spec)(other, spec))
            assert_bit_equal(found, by_torch(monkeypatch, method, other.contiguous(), spec))


def test_a_whole_matrix_has_the_bits_of_its_slices() -> None:
    weight = torch.randn(2 * ROWS_QUANTIZED + 5, 128, generator=draw(0)).to(torch.bfloat16)
    for method, spec in CHOSEN[::5]:
        quantize = quantizer(method, spec)
        whole = format_class(spec.format).quantize_matrix(
            lambda start, stop: weight[start:stop], (len(weight), 128), spec, quantize
        )
        edges = [0, 1, ROWS_QUANTIZED, len(weight)]
        parts = [quantize(weight[start:stop], spec) for start, stop in pairwise(edges)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert_bit_equal(whole, joined)
