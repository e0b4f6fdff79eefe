"""Products in the compiled library, against the formula in torch and against the exact ones.

The formula: activations rounded to bytes, a scale for each group of columns, everything after that
exact but for the order of float32 sums. What the rounding costs is bounded beside it.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m1local.formats import LinearSpec, format_class
from m1local.formats.base import QuantizedLinear
from m1local.native import library, matmul

SPECS = [
    LinearSpec("int8"),
    *(LinearSpec("int4", size) for size in (32, 64, 128)),
    *(LinearSpec(name, size) for name in ("int3", "int5", "int6") for size in (32, 64, 128)),
]
FEW = 4  # rows up to which matmul_few.c serves
GROUP_OF_X = 128  # columns that share a scale where the format has no groups
# (N, K): fewer than a vector, tails, blocks and more, a single row of W.
SHAPES = [(1, 128), (3, 384), (33, 640), (70, 256), (130, 1280), (33, 4224)]
ROWS = [1, 2, 3, 4, 5, 8, 9, 31, 70]
ROUNDED = {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 0}  # the result itself
SUMS = 2e-6  # of float32, relative to the usual size of a product

pytestmark = pytest.mark.skipif(
    not matmul.usable(), reason=f"nothing is compiled: {library.status().text}"
)


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(shape[0], 1).uniform_(-3, 1, generator=generator)
    return (torch.randn(shape, generator=generator) * sizes).to(torch.bfloat16)


def build(shape: tuple[int, int], spec: LinearSpec) -> QuantizedLinear:
    chosen = format_class(spec.format)
    return chosen.from_tensors(chosen.quantize(matrix(shape), spec), shape, spec)


def activations(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x[:, ::37] *= 30  # outliers, as models have
    return x.to(dtype)


def rounded(x: Tensor, spec: LinearSpec) -> Tensor:
    """Rows (M, K) to bytes and back, each group of columns with a scale of its own.

    For int8 a second byte holds what the first has lost.
    """
    columns, size = x.shape[1], spec.group_size or GROUP_OF_X
    padded = torch.nn.functional.pad(x.float(), (0, -columns % size))
    grouped = padded.view(x.shape[0], -1, size)
    scales = grouped.abs().amax(dim=2, keepdim=True) / 127
    exact = grouped * torch.where(scales > 0, 1 / scales, 0)
    codes = exact.round()
    if spec.format == "int8":
        codes = codes + ((exact - codes) * 256).round().clamp(-127, 127) / 256
    return (codes * scales).flatten(1)[:, :columns]


def assert_close(product: Tensor, x: Tensor, weight: Tensor, tolerance: float) -> None:
    expected = x.double() @ weight.double().T
    usual = (x.double().square() @ weight.double().square().T).sqrt()
    assert (
        (product.double() - expected).abs() / (usual + expected.abs() + 1e-30)
    ).max() <= tolerance


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_formula(shape: tuple[int, int], spec: LinearSpec) -> None:
    module = build(shape, spec)
    for rows in ROWS:
        x = activations(rows, shape[1])
        product = module(x)
        assert_close(product, rounded(x, spec), module.dequantize(), SUMS * 4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("outliers", "bound"), [(1, 0.01), (30, 0.04)])
def test_what_the_rounding_costs(
    spec: LinearSpec, dtype: torch.dtype, outliers: int, bound: float
) -> None:
    # Half a step is a 254th of a group's greatest: little, unless that is far above the others.
    module = build((70, 1280), spec)
    x = torch.randn(9, 1280, generator=torch.Generator().manual_seed(0))
    x[:, ::37] *= outliers
    product = module(x.to(dtype))
    assert product.dtype == dtype
    exact = x.to(dtype).double() @ module.dequantize().double().T
    bound /= 200 if spec.format == "int8" else 1
    assert (product.double() - exact).norm() <= max(bound, ROUNDED[dtype]) * exact.norm()


@pytest.mark.parametrize("columns", [1, 31, 33, 63, 65, 97, 200])
def test_rows_of_bytes_may_have_any_length(columns: int) -> None:
    module = build((37, columns), LinearSpec("int8"))
    for rows in (1, 6, 19):
        x = activations(rows, columns)
        assert_close(module(x), rounded(x, LinearSpec("int8")), module.dequantize(), SUMS * 4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(spec: LinearSpec) -> None:
    module, x = build((70, 640), spec), activations(36, 640)
    alone, many = module(x[:1]), module(x[: FEW + 1])
    for rows in range(1, 37):  # few are summed in another order than many
        assert torch.equal(module(x[:rows])[:1], alone if rows <= FEW else many[:1])
    for row in range(FEW):
        assert torch.equal(module(x[row : row + 1])[0], module(x[:FEW])[row])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(spec: LinearSpec, threads: int) -> None:
    module = build((4200, 256), spec)
    x = activations(260 if threads == 3 else 5, 256)[: matmul.ROWS]
    before, usual = module(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(module(x), before)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zeros_and_extremes_come_through(spec: LinearSpec) -> None:
    module = build((5, 256), spec)
    x = torch.zeros(4, 256)
    x[1, 3], x[2] = 3e38 / 1e6, 1e-42  # large; subnormal, which counts as nothing
    product = module(x)
    assert torch.equal(product[0], torch.zeros(5))
    assert torch.equal(product[2], torch.zeros(5))
    assert product.isfinite().all()
    assert_close(product[1:2], x[1:2], module.dequantize(), 1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(spec: LinearSpec, value: float) -> None:
    module, x = build((5, 256), spec), activations(3, 256)
    x[1, 100] = value
    product = module(x)
    assert product[1].isnan().all()
    assert product[[0, 2]].isfinite().all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_weights_are_read_where_they_lie(spec: LinearSpec) -> None:
    chosen, shape = format_class(spec.format), (33, 256)
    tensors = chosen.quantize(matrix(shape), spec)
    shifted = {}
    for name, tensor in tensors.items():  # one element further: as a mapped file may have them
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        shifted[name] = room[1:].view(tensor.shape).copy_(tensor)
    module = chosen.from_tensors(shifted, shape, spec)
    held = {tensor.data_ptr() for tensor in module.buffers() if tensor.numel()}
    assert spec.format == "int8" or held == {tensor.data_ptr() for tensor in shifted.values()}
    x = activations(3, 256)
    assert torch.equal(module(x), chosen.from_tensors(tensors, shape, spec)(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_more_rows_than_are_taken_at_a_time(spec: LinearSpec) -> None:
    module, rows = build((33, 256), spec), matmul.ROWS + 9
    x = activations(rows, 256)
    product = module(x)
    assert_close(product, rounded(x, spec), module.dequantize(), SUMS * 4)
    assert torch.equal(product[-9:], module(x[-9:]))


def test_batches_and_no_rows_at_all_keep_their_shape() -> None:
    for spec in SPECS:
        module = build((33, 128), spec)
        assert module(activations(6, 128).view(2, 3, 128)).shape == (2, 3, 33)
        assert module(torch.empty(1, 0, 128)).shape == (1, 0, 33)


def processor_has(wanted: str) -> bool:
    if wanted.endswith("v3"):
        return torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    if wanted.endswith("cascadelake"):
        return any("avx512_vnni" in line for line in library._processor())
    return True


# Cascade Lake: AVX-512 with VNNI, without VBMI.
@pytest.mark.parametrize("wanted", ["-march=x86-64", "-march=x86-64-v3", "-march=cascadelake"])
def test_every_choice_of_instructions_gives_the_same(tmp_path: Path, wanted: str) -> None:
    built, compiler = tmp_path / "built.so", library._compiler()
    flags = tuple(flag for flag in library.FLAGS[0] if flag != "-march=native")
    complaint = library._build(compiler, (*flags, wanted), built)
    if complaint:
        pytest.skip(f"{compiler.name} has no {wanted}: {complaint}")
    if not processor_has(wanted):
        pytest.skip(f"this processor does not run what is compiled for {wanted}")
    other = ctypes.CDLL(str(built))
    assert other.m1_self_test() == 1
    for spec in SPECS:
        for rows in (FEW - 1, FEW + 12):
            module, x = build((33, 384), spec), activations(rows, 384)
            expected = module(x)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(matmul, "library", lambda: other)
                found = module(x)
            assert_close(found, rounded(x, spec), module.dequantize(), SUMS * 4)
            assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["int3", "int4", "int5", "int6"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_what_was_in_the_memory_before_does_not_matter(name: str, rows: int) -> None:
    spec = LinearSpec(name, 32)
    module, x = build((33, 96), spec), activations(rows, 96)  # a vector reaches beyond the row
    other = build((33, 128), spec)  # has one group more, in memory of the same size
    for _ in range(5):
        other(torch.full((rows, 128), torch.nan))  # leaves scales that are no number behind
        assert_close(module(x), rounded(x, spec), module.dequantize(), SUMS * 4)
