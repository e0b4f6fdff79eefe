"""Proves that every storage format stores what it says and multiplies by what it stores.

The textbook formulas are written here a second time, in plain torch; `dequantize` is then the
oracle of `forward`. For the formats of bitsandbytes the package itself is the oracle.
"""

import random
from collections.abc import Callable, Mapping
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from m1local.errors import CheckpointError
from m1local.formats import LinearSpec, format_class, int4pack
from m1local.formats.base import (
    ROWS_PER_SLICE,
    QuantizedEmbedding,
    QuantizedLinear,
)
from m1local.formats.groups import GroupLinear, group_class, unpack_plane
from m1local.formats.int8 import Int8Linear
from m1local.native import matmul

INT8, NF4, BNB_INT8 = LinearSpec("int8"), LinearSpec("bnb-nf4"), LinearSpec("bnb-int8")
INT4 = [LinearSpec("int4", group_size) for group_size in (32, 64, 128)]
GROUPS = [*INT4, LinearSpec("int3", 64), LinearSpec("int5", 32), LinearSpec("int6", 128)]
NF4_DQ, FP4 = LinearSpec("bnb-nf4-dq"), LinearSpec("bnb-fp4")
SPECS = [INT8, *GROUPS, NF4, NF4_DQ, FP4, BNB_INT8]
# Whole blocks of torch's packed operator; none; a single row; more than one slice of rows.
SHAPES = [(192, 256), (70, 256), (1, 128), (ROWS_PER_SLICE + 44, 128)]

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.format)
every_group = pytest.mark.parametrize(
    "spec", GROUPS, ids=lambda spec: f"{spec.format}-{spec.group_size}"
)
both_int8 = pytest.mark.parametrize("spec", [INT8, BNB_INT8], ids=lambda spec: spec.format)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
needs_int4_operator = pytest.mark.skipif(
    int4pack.layout() is None, reason="this torch has no packed int4 operator for this processor"
)


@pytest.fixture(autouse=True)
def _products_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves where nothing is compiled; tests/test_native_matmul.py has the rest."""
    monkeypatch.setattr(matmul, "library", lambda: None)


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A bfloat16 matrix (N, K) as a checkpoint holds it, its rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(shape[0], 1).uniform_(-3, 1, generator=generator)
    return (torch.randn(shape, generator=generator) * sizes).to(torch.bfloat16)


def activations(*shape: int) -> Tensor:
    """Random float32 activations (…, K)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def store(weight: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
    """What the checkpoint would hold of `weight`."""
    rows, columns = weight.shape
    chosen = format_class(spec.format)
    return chosen.quantize_matrix(lambda start, stop: weight[start:stop], (rows, columns), spec)


def build(weight: Tensor, spec: LinearSpec) -> QuantizedLinear:
    """The module of `weight`, rounded to nearest."""
    rows, columns = weight.shape
    return format_class(spec.format).from_tensors(store(weight, spec), (rows, columns), spec)


def assert_bit_equal(
    actual: Tensor | Mapping[str, Tensor], expected: Tensor | Mapping[str, Tensor]
) -> None:
    """The same names where there are any, dtypes and bits."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_spec
@every_shape
def test_stored_describes_exactly_what_is_written(spec: LinearSpec, shape: tuple[int, int]) -> None:
    tensors = store(matrix(shape), spec)
    described = format_class(spec.format).stored(*shape, spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == described
    assert all(tensor.nbytes == described[name].nbytes for name, tensor in tensors.items())


@every_spec
def test_a_matrix_quantized_in_slices_equals_one_quantized_whole(spec: LinearSpec) -> None:
    weight = matrix((2 * ROWS_PER_SLICE + 20, 128))
    sliced = store(weight, spec)
    for name, tensor in format_class(spec.format).quantize(weight, spec).items():
        assert_bit_equal(sliced[name], tensor)


@every_spec
@every_shape
def test_slices_of_rows_equal_the_dequantized_whole(
    spec: LinearSpec, shape: tuple[int, int]
) -> None:
    module = build(matrix(shape), spec)
    whole = module.dequantize()
    draw = random.Random(0)
    for _ in range(10):
        start = draw.randrange(shape[0])
        stop = draw.randint(start + 1, shape[0])
        assert_bit_equal(module.slice_rows(start, stop, torch.float32), whole[start:stop])


@both_int8
def test_int8_takes_the_nearest_of_255_levels_up_to_the_rows_greatest(spec: LinearSpec) -> None:
    weight = matrix((70, 96)).half().float()  # bitsandbytes rounds from float16
    steps = torch.stack([row.abs().max() for row in weight])[:, None] / 127
    levels = torch.arange(-127, 128) * steps  # (N, 255)
    least_error = (weight[:, :, None] - levels[:, None, :]).abs().amin(dim=2)
    error = (weight - build(weight, spec).dequantize()).abs()
    # A tie may go either way: then both levels are as near, but for float32 rounding.
    assert (error <= least_error + 1e-4 * steps).all()


@every_group
def test_a_group_takes_the_nearest_of_even_levels_between_its_least_and_greatest(
    spec: LinearSpec,
) -> None:
    assert spec.group_size is not None
    bits = int(spec.format.removeprefix("int"))
    middle = {3: 4, 4: 8, 5: 8, 6: 24}[bits]
    weight = matrix((70, 256)).float()
    tensors = store(weight, spec)
    groups = weight.view(70, -1, spec.group_size)
    least, greatest = groups.min(dim=2).values, groups.max(dim=2).values
    scales = ((greatest - least) / (2**bits - 1)).bfloat16()
    zeros = (least + middle * scales.float()).bfloat16()
    assert_bit_equal(tensors["scales"], scales)
    assert_bit_equal(tensors["zeros"], zeros)
    codes = torch.arange(2**bits) - middle
    levels = codes * scales.float()[..., None] + zeros.float()[..., None]
    distances = (groups[..., None] - levels[:, :, None, :]).abs()  # (N, groups, group, codes)
    error = (weight - build(weight, spec).dequantize()).abs().view_as(groups)
    # A tie may go either way: then both levels are as near, but for float32 rounding.
    assert (error <= distances.amin(dim=3) + 1e-6 * groups.abs().amax(dim=2, keepdim=True)).all()


@pytest.mark.parametrize(("bits", "widths"), [(3, (2, 1)), (4, (4,)), (5, (4, 1)), (6, (4, 2))])
def test_codes_lie_in_planes_the_first_column_in_the_lowest_bits(
    bits: int, widths: tuple[int, ...]
) -> None:
    codes = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    chosen = group_class(LinearSpec(f"int{bits}", 64))
    planes = chosen.pack(codes.to(torch.uint8))
    assert len(planes) == len(widths)
    below = 0
    for name, width in zip(("weight", "weight_high"), widths, strict=False):
        for row in range(5):
            stream = sum(
                (int(code) >> below & (1 << width) - 1) << width * column
                for column, code in enumerate(codes[row])
            )
            expected = stream.to_bytes(64 * width // 8, "little")
            assert bytes(planes[name][row].tolist()) == expected
        below += width
    assert_bit_equal(chosen.unpack(planes), codes.to(torch.uint8))


@every_spec
def test_a_zero_row_stays_zero(spec: LinearSpec) -> None:
    weight = matrix((64, 128))
    weight[[0, 63]] = 0
    module = build(weight, spec)
    assert_bit_equal(module.dequantize()[[0, 63]], torch.zeros(2, 128))
    assert module(torch.ones(1, 128))[0, [0, 63]].tolist() == [0, 0]


@every_group
def test_a_constant_group_is_exact(spec: LinearSpec) -> None:
    weight = matrix((64, 256))
    weight[5, 128:] = 0.7109375  # a bfloat16
    assert_bit_equal(build(weight, spec).dequantize()[5, 128:], weight[5, 128:].float())


def assert_products(module: QuantizedLinear, x: Tensor, *, tolerance: float) -> None:
    """`module(x)` is `x @ dequantize().T`, within `tolerance` of its own and its usual size."""
    product = module(x)
    assert product.dtype == x.dtype
    exact_x, weight = x.double(), module.dequantize().double()
    expected = exact_x @ weight.T
    usual_size = (exact_x.square() @ weight.square().T).sqrt()  # of a sum of random signs
    worst = ((product.double() - expected).abs() / (usual_size + expected.abs())).max()
    assert worst <= tolerance


# bfloat16 is off by 2^-8 at most: in activations and weights, where it averages out to 0.2 % of the
# usual size, and once or twice in the result. float32 is off by 2^-24 some hundred times. int8
# activations come in steps of 1/127 of the greatest of their row: 0.7 % of the usual size.
BFLOAT16, FLOAT32, INT8_ACTIVATIONS = 1e-2, 1e-5, 4e-2


@every_spec
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
def test_forward_multiplies_by_the_dequantized_matrix(
    spec: LinearSpec, shape: tuple[int, int], dtype: torch.dtype, rows: int
) -> None:
    module = build(matrix(shape), spec)
    x = activations(rows, shape[1]).to(dtype)
    few = rows <= 8 and not (isinstance(module, GroupLinear) and not module.packed)
    exact = spec in (INT8, *GROUPS) and dtype == torch.float32 and not few
    # Five and six bits are two halves, each rounded, of which one may be larger than the sum.
    halves = spec.format in ("int5", "int6") and few
    # With AVX512-BF16 bitsandbytes rounds its block sizes to bfloat16 as well.
    coarse = 0.5 if spec.format.startswith("bnb") else 0
    rounded = INT8_ACTIVATIONS if spec == BNB_INT8 else BFLOAT16 * (1 + halves + coarse)
    assert_products(module, x, tolerance=FLOAT32 if exact else rounded)


@both_int8
@pytest.mark.parametrize("columns", [33, 40])
def test_rows_of_int8_may_have_any_length(spec: LinearSpec, columns: int) -> None:
    # torch's operator loads whole vectors of 8 or 16: past the end of such rows, or off alignment.
    module = build(matrix((37, columns)), spec)
    assert_products(module, activations(3, columns), tolerance=INT8_ACTIVATIONS)


@every_spec
@pytest.mark.parametrize("rows", [1, 9])
def test_tiny_and_huge_rows_keep_their_precision(spec: LinearSpec, rows: int) -> None:
    # bitsandbytes quantizes to int8 from float16; double quantization has one scale for all rows.
    size = {BNB_INT8: 1e3, NF4_DQ: 1}.get(spec, 1e30)
    weight = activations(192, 128)
    weight[0::3] *= size
    weight[1::3] /= size
    weight = weight.bfloat16()
    module = build(weight, spec)
    error = (module.dequantize() - weight.float()).abs().amax(dim=1)
    # A 4-bit step is a fifth of the greatest of a row at most, an 8-bit one 1/127.
    assert (error <= 0.2 * weight.float().abs().amax(dim=1)).all()
    tolerance = INT8_ACTIVATIONS if spec == BNB_INT8 else BFLOAT16
    assert_products(module, activations(rows, 128), tolerance=tolerance)


@pytest.mark.parametrize("offset", [0, 8])
def test_a_mapped_int8_weight_is_copied_only_where_the_operator_would_crash(offset: int) -> None:
    stored = store(matrix((8, 32)), INT8)
    file = torch.zeros(8 * 32 + 8, dtype=torch.int8)  # safetensors aligns to 8 bytes only
    mapped = file[offset : offset + 8 * 32].view(8, 32).copy_(stored["weight"])
    module = Int8Linear.from_tensors(stored | {"weight": mapped}, (8, 32), INT8)
    assert module.weight.data_ptr() % 16 == 0  # as the AVX512 operator's aligned loads need it
    assert (module.weight is mapped) == (offset == 0)
    assert_bit_equal(module.weight, stored["weight"])


@every_spec
def test_a_batch_of_sequences_keeps_its_shape(spec: LinearSpec) -> None:
    module = build(matrix((64, 128)), spec)
    x = activations(2, 3, 128)
    product = module(x)
    assert product.shape == (2, 3, 64)
    torch.testing.assert_close(product.flatten(0, 1), module(x.flatten(0, 1)))


@every_spec
def test_a_module_dequantizes_the_same_before_and_after_use(spec: LinearSpec) -> None:
    module = build(matrix((64, 128)), spec)
    before = module.dequantize()
    module(torch.ones(1, 128))
    # With AVX512-BF16 bitsandbytes rounds its scales to bfloat16 on the first use.
    rounding = 2**-7 if spec in (NF4, NF4_DQ, FP4) else 0
    torch.testing.assert_close(module.dequantize(), before, rtol=rounding, atol=0)


@pytest.mark.parametrize("spec", [INT8, *GROUPS], ids=lambda spec: spec.format)
@pytest.mark.parametrize("rows", [70, 128])
def test_an_embedding_reads_the_rows_it_is_asked_for(spec: LinearSpec, rows: int) -> None:
    weight = matrix((rows, 128))
    chosen = format_class(spec.format)
    table = chosen.table(store(weight, spec), (rows, 128), spec)
    assert_bit_equal(table.dequantize(), build(weight, spec).dequantize())
    token_ids = torch.tensor([[3, 69, 3], [0, 1, 2]])
    embedded = QuantizedEmbedding(table, torch.bfloat16)(token_ids)
    assert_bit_equal(embedded, table.dequantize()[token_ids].bfloat16())


@needs_int4_operator
@pytest.mark.parametrize("rows", [64, 192, int4pack.ROWS_PER_PACK + 64])
def test_packed_codes_read_back_as_they_were_at_any_row(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    nibbles = torch.randint(0, 256, (rows, 48), generator=generator, dtype=torch.uint8)
    packed, codes = int4pack.pack(nibbles), unpack_plane(nibbles, 4)
    assert packed.nbytes == nibbles.nbytes
    assert_bit_equal(int4pack.unpack(packed, 0, rows), codes)
    draw = random.Random(rows)
    for _ in range(60):  # most of them begin and end inside a block
        start = draw.randrange(rows)
        stop = draw.randint(start + 1, min(rows, start + 100))
        assert_bit_equal(int4pack.unpack(packed, start, stop), codes[start:stop])


@every_group
def test_without_the_operator_groups_stay_as_stored_and_say_the_same(
    spec: LinearSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = store(matrix((192, 256)), spec)
    usual = group_class(spec).from_tensors(tensors, (192, 256), spec)
    assert usual.packed == (int4pack.layout() is not None)
    expected = usual.dequantize()
    monkeypatch.setattr(int4pack, "layout", lambda: None)
    module = group_class(spec).from_tensors(tensors, (192, 256), spec)
    assert module.codes is tensors["weight"]
    assert_bit_equal(module.dequantize(), expected)
    assert_products(module, activations(1, 256), tolerance=FLOAT32)


PACK = int4pack._pack_codes
BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "fails": Mock(side_effect=RuntimeError),
    "mixes rows": lambda codes: codes[:, ::2].byte(),
    "mixes columns": lambda codes: PACK(codes.flip(1)),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_an_operator_that_fails_or_packs_in_an_unknown_way_is_not_used(
    broken: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4pack, "_pack_codes", broken)
    assert int4pack.layout.__wrapped__() is None


@pytest.mark.parametrize(
    ("spec", "columns", "complaint"),
    [
        (LinearSpec("int4"), 128, "group size is None"),
        (LinearSpec("int4", 16), 128, "int4 takes 32, 64 or 128"),
        (LinearSpec("int5", 48), 192, "int5 takes 32, 64 or 128"),
        (LinearSpec("int4", 128), 192, "groups of 128 do not divide its 192 columns"),
        (NF4, 96, "blocks of 64 do not divide its 96 columns"),
        (LinearSpec("int4", 64), 192, None),
        (INT8, 33, None),
        (BNB_INT8, 33, None),
    ],
)
def test_a_matrix_that_a_format_cannot_hold_is_refused_by_name(
    spec: LinearSpec, columns: int, complaint: str | None
) -> None:
    found = format_class(spec.format).check(70, columns, spec)
    assert found == complaint if complaint is None else complaint in (found or "")


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        CheckpointError,
        match="int8, int3, int4, int5, int6, bnb-nf4, bnb-nf4-dq, bnb-fp4, bnb-int8",
    ):
        format_class("int2")


@torch.inference_mode()
def test_codes_of_eight_bits_are_multiplied_and_scaled_afterwards() -> None:
    spec, weight = LinearSpec("int8"), torch.randn(300, 96)
    module = Int8Linear.from_tensors(Int8Linear.quantize(weight, spec), (300, 96), spec)
    x = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    wanted = x.float() @ module.dequantize().T
    found = module.multiply_codes(x)
    assert found.dtype == torch.bfloat16
    worst = 1e-2 * float(wanted.abs().max())
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=worst)
