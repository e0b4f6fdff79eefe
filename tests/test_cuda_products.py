"""Products of the CUDA kernels against the dequantized matrix: in the interpreter, or on a card."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m1local.cuda import matrix as stored
from m1local.cuda import support
from m1local.cuda.card import RowShape
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import QuantizedLinear
from m1local.formats.groups import GroupLinear
from m1local.model import RMSNorm
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda import one_row, products  # isort: skip
from m1local.cuda.activation import Activation  # isort: skip

FORMATS = {
    "int4-32": LinearSpec("int4", 32),
    "int4-64": LinearSpec("int4", 64),
    "int4-128": LinearSpec("int4", 128),
    "int3-64": LinearSpec("int3", 64),
    "int5-32": LinearSpec("int5", 32),
    "int6-64": LinearSpec("int6", 64),
    "int8": LinearSpec("int8"),
    "bnb-nf4": LinearSpec("bnb-nf4"),
    "bnb-nf4-dq": LinearSpec("bnb-nf4-dq"),
    "bnb-fp4": LinearSpec("bnb-fp4"),
}


def quantized(name: str, shape: tuple[int, int]) -> QuantizedLinear:
    """A random matrix (N, K) whose rows differ in size."""
    spec = FORMATS[name]
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(shape, generator=generator) * (1 + torch.arange(shape[0])[:, None] % 5)
    chosen = format_class(spec.format)
    tensors = chosen.shared_tensors(shape, spec) | chosen.quantize(rows, spec)
    on_card = {suffix: tensor.to(CARD) for suffix, tensor in tensors.items()}
    return chosen.table(on_card, shape, spec)  # as stored, whatever this CPU would do with it


def activations(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn((rows, columns), generator=generator).to(CARD, dtype)


def expected(x: Tensor, module: QuantizedLinear) -> Tensor:
    return x.double() @ module.dequantize().double().T


def close(found: Tensor, wanted: Tensor, relative: float) -> None:
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < relative, f"off by {error:.2e}"


def tolerance(name: str) -> float:
    """bitsandbytes' way back, the oracle, ends in bfloat16; ours in float32."""
    return 3e-3 if name.startswith("bnb") else 1e-6


ONE_ROW = 4e-5  # x is whole numbers of 16 bits, and so are levels


def exact(x: Tensor, module: QuantizedLinear) -> Tensor:
    """The product with levels as they are, which bitsandbytes rounds to bfloat16."""
    matrix = module.cuda_matrix()
    if matrix is None or not matrix.levels_name:
        return expected(x, module)
    pairs = matrix.codes.contiguous().view(torch.uint8).view(matrix.rows, -1)
    codes = torch.stack((pairs >> 4, pairs & 15), 2).view(matrix.rows, -1).long()
    scales = matrix.scales.flatten().double()
    if matrix.kind == stored.NESTED:
        outer, place = matrix.outer.double(), torch.arange(len(scales), device=scales.device)
        scales = outer[matrix.scales.flatten().long()] * outer[257 + place // 256] + outer[256]
    weights = matrix.levels.double()[codes].view(-1, 32 * matrix.per_group) * scales[:, None]
    return x.double() @ weights.view(matrix.rows, -1).T


@pytest.mark.parametrize("name", FORMATS)
def test_one_row_equals_the_dequantized_product(name: str) -> None:
    module = quantized(name, (13, 1408))  # no whole tile of rows, no whole step of columns
    matrix = module.cuda_matrix()
    assert matrix is not None
    x = activations(1, 1408)
    parts = one_row.vector_product(Activation.of(x), matrix)
    assert parts.shape[1] == 13
    close(parts.sum(0, keepdim=True), exact(x, module), ONE_ROW)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [13, 64])  # of the activations behind it, no blocks and two
def test_gate_and_up_are_one_kernel(name: str, rows: int) -> None:
    gate, up = quantized(name, (rows, 1408)), quantized(name, (rows + 1, 1408))
    first, second = gate.cuda_matrix(), up.cuda_matrix()
    assert first is not None
    assert second is not None
    x, out = activations(1, 1408) * 0.1, Activation(rows, dtype=torch.float32, device=CARD)
    one_row.gated_product(Activation.of(x), first, second, out)
    wanted = functional.silu(exact(x, gate)) * exact(x, up)[:, :rows]
    close(out.natural, wanted, 2 * ONE_ROW)
    again = Activation.of(out.natural)
    assert torch.equal(out.halves, again.halves)
    assert torch.equal(out.scales, again.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_added_and_normed_by_whoever_reads_it(name: str) -> None:
    module, behind = quantized(name, (128, 1408)), quantized(name, (21, 128))
    matrix, next_matrix = module.cuda_matrix(), behind.cuda_matrix()
    assert matrix is not None
    assert next_matrix is not None
    x, stream = activations(1, 1408), activations(1, 128, torch.float32)[0] * 30
    norm = RMSNorm(128, 500.0).to(CARD)  # so large that leaving it out would show
    norm.weight.data = 0.05 + 0.02 * activations(2, 128, torch.float32)[0]
    wanted = stream + exact(x, module)[0]
    out = Activation(128, dtype=torch.float32, device=CARD, eps=norm.eps)
    one_row.added_product(Activation.of(x), matrix, stream, norm.weight, out)
    close(stream, wanted, ONE_ROW)
    close(out.natural, (wanted * norm.weight)[None], ONE_ROW)
    normed = norm(wanted.float())[None]
    found = one_row.vector_product(out, next_matrix).sum(0, keepdim=True)
    close(found, exact(normed, behind), 2 * ONE_ROW)
    gated = Activation(21, dtype=torch.float32, device=CARD)
    one_row.gated_product(out, next_matrix, next_matrix, gated)
    product = exact(normed, behind)
    close(gated.natural, functional.silu(product) * product, 4 * ONE_ROW)


@pytest.mark.parametrize("name", ["int4-64", "int8", "int6-64", "bnb-nf4"])
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 8), (8, 1)])
def test_programs_of_any_shape_multiply_alike(name: str, shape: tuple[int, int]) -> None:
    module = quantized(name, (96, 704))  # no whole program of four groups, nor of eight
    matrix, tried = module.cuda_matrix(), RowShape(*shape)
    assert matrix is not None
    x = Activation.of(activations(1, 704) * 0.1)
    wanted = exact(activations(1, 704) * 0.1, module)
    parts = one_row.vector_product(x, matrix, tried)
    close(parts.sum(0, keepdim=True), wanted, ONE_ROW)
    gated = Activation(96, dtype=torch.float32, device=CARD)
    one_row.gated_product(x, matrix, matrix, gated, tried)
    close(gated.natural, functional.silu(wanted) * wanted, 2 * ONE_ROW)
    stream, weight = torch.zeros(96, device=CARD), activations(3, 96, torch.float32)[0]
    added = Activation(96, dtype=torch.float32, device=CARD, eps=1e-6)
    one_row.added_product(x, matrix, stream, weight, added, tried)
    close(stream, wanted[0], ONE_ROW)
    close(added.natural, (wanted * weight), ONE_ROW)
    torch.testing.assert_close(added.squares, stream.view(-1, 16).square().sum(1))
    for made in (gated, added):
        again = Activation.of(made.natural)
        assert torch.equal(made.halves, again.halves)
        assert torch.equal(made.scales, again.scales)


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name.startswith("int") and "-" in name]
)
def test_scales_and_zeros_in_tiles_give_the_same(name: str) -> None:
    shape = (40, 1152 if name.endswith("32") else 1536)  # rows of two programs and a half
    module = quantized(name, shape)
    assert isinstance(module, GroupLinear)
    whole, scales = module.dequantize(), module.scales.clone()
    module.tile()
    assert module.tiled
    assert not torch.equal(module.scales, scales)
    assert torch.equal(stored.untiled(module.scales), scales)
    assert torch.equal(module.dequantize(), whole)
    assert torch.equal(module.slice_rows(3, 21, torch.float32), whole[3:21])
    matrix = module.cuda_matrix()
    assert matrix is not None
    x = activations(1, shape[1]) * 0.1
    wanted = exact(x, module)
    close(one_row.vector_product(Activation.of(x), matrix).sum(0, keepdim=True), wanted, ONE_ROW)
    out = Activation(40, dtype=torch.float32, device=CARD)
    one_row.gated_product(Activation.of(x), matrix, matrix, out)
    close(out.natural, functional.silu(wanted) * wanted, 2 * ONE_ROW)
    several = activations(5, shape[1])
    parts = products.tile_product(stored.planar(several), matrix)
    close(parts.sum(0), expected(several, module), 5e-3)
    rows = products.restored(matrix, 3, 33, torch.float32)
    close(rows, whole[3:33].double(), tolerance(name))
    plain = quantized(name, shape).cuda_matrix()
    assert plain is not None
    assert not one_row.alike(matrix, plain)


@pytest.mark.parametrize(("missing", "is_tiled"), [(None, True), ("there is no Triton", False)])
def test_what_kernels_read_is_put_into_tiles_on_its_way(
    missing: str | None, is_tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "missing", lambda device: missing)
    shape, spec = (16, 256), FORMATS["int6-64"]
    chosen = format_class(spec.format)
    tensors = {
        name: kept.to("meta") for name, kept in chosen.quantize(torch.ones(shape), spec).items()
    }
    module = chosen.from_tensors(tensors, shape, spec)
    assert isinstance(module, GroupLinear)
    assert module.tiled == is_tiled
    table = chosen.table(tensors, shape, spec)  # whose rows are gathered
    assert isinstance(table, GroupLinear)
    assert not table.tiled


def test_what_is_no_whole_tile_stays_as_stored() -> None:
    for shape in ((20, 512), (16, 192)):  # rows, groups
        module = quantized("int4-64", shape)
        assert isinstance(module, GroupLinear)
        scales = module.scales.clone()
        module.tile()
        assert not module.tiled
        assert torch.equal(module.scales, scales)


def test_a_tile_is_eight_rows_of_four_groups() -> None:
    rows, groups = 16, 12
    numbers = torch.arange(rows * groups).view(rows, groups)
    lying = stored.tiled(numbers).flatten().tolist()
    for row in range(rows):
        for group in range(groups):
            tile = row // 8 * (groups // 4) + group // 4
            assert lying[32 * tile + row % 8 * 4 + group % 4] == row * groups + group


def test_matrices_of_two_kinds_are_not_alike() -> None:
    kept = [quantized(name, (20, 192)).cuda_matrix() for name in ("int4-32", "int4-64", "int8")]
    one, coarser, wider = kept
    other = quantized("int4-32", (24, 192)).cuda_matrix()
    levels = [quantized(name, (20, 192)).cuda_matrix() for name in ("bnb-nf4", "bnb-fp4")]
    assert levels[0] is not None
    assert levels[1] is not None
    assert not one_row.alike(levels[0], levels[1])
    assert one is not None
    assert other is not None
    assert one_row.alike(one, one)
    assert not any(found and one_row.alike(one, found) for found in (coarser, wider, other))


@pytest.mark.parametrize("name", FORMATS)
def test_several_rows_equal_the_dequantized_product(name: str) -> None:
    module = quantized(name, (67, 384))
    matrix = module.cuda_matrix()
    assert matrix is not None
    x = activations(5, 384)
    parts = products.tile_product(stored.planar(x), matrix)
    close(parts.sum(0), expected(x, module), 5e-3)  # weights are rounded to bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_restored(name: str) -> None:
    module = quantized(name, (13, 384))
    matrix = module.cuda_matrix()
    assert matrix is not None
    rows = products.restored(matrix, 3, 12, torch.float32)
    close(rows, module.dequantize()[3:12].double(), tolerance(name))


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 70])
def test_any_number_of_rows_is_multiplied(rows: int) -> None:
    module = quantized("int4-64", (20, 192))
    matrix = module.cuda_matrix()
    assert matrix is not None
    x = activations(rows, 192)
    found = products.product(x, matrix)
    assert found.dtype == torch.bfloat16
    close(found, expected(x, module), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_of_activations(dtype: torch.dtype) -> None:
    module = quantized("int4-64", (9, 192))
    matrix = module.cuda_matrix()
    assert matrix is not None
    for rows in (1, 3):
        x = activations(rows, 192, dtype)
        close(products.product(x, matrix), expected(x, module), 2e-3)


def test_no_row_is_no_product() -> None:
    matrix = quantized("int8", (8, 64)).cuda_matrix()
    assert matrix is not None
    assert products.product(activations(0, 64), matrix).shape == (0, 8)


@pytest.mark.parametrize(("name", "shape"), [("int8", (8, 72)), ("int8", (8, 20))])
def test_shapes_that_the_kernels_do_not_take(name: str, shape: tuple[int, int]) -> None:
    assert quantized(name, shape).cuda_matrix() is None


@pytest.mark.parametrize(
    ("rows", "most"), [(17408, 8192), (17408, 1), (5, 0), (5120, 9000), (129, 128)]
)
def test_slices_of_a_matrix_are_about_the_same(rows: int, most: int) -> None:
    slices = products._slices(rows, most)
    assert [start for start, _ in slices] == [0, *(stop for _, stop in slices[:-1])]
    assert slices[-1][1] == rows
    sizes = [stop - start for start, stop in slices]
    assert max(sizes) < most + 2 * products.EVEN_ROWS
    assert len(sizes) <= -(-rows // max(1, most))
    assert sizes[0] - sizes[-1] <= products.EVEN_ROWS * len(sizes)


def test_the_order_of_planes() -> None:
    assert stored.planar(torch.arange(16.0)[None]).tolist()[0][:4] == [0, 8, 1, 9]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_takes_its_kernel_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantized(name, (20, 384))
    monkeypatch.setattr(support, "missing", lambda device: None)
    module.multiply_sliced = None  # type: ignore[assignment]  # what must not be called
    x = activations(3, 384)[None]
    found = module.multiply_on_card(x)
    assert found is not None
    assert found.shape == (1, 3, 20)
    close(found[0], expected(x[0], module), 1e-2)


def test_the_cpu_never_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantized("int8", (20, 192)).cpu()
    monkeypatch.setitem(sys.modules, "m1local.cuda.products", None)
    assert module(torch.randn(1, 192)).shape == (1, 20)
