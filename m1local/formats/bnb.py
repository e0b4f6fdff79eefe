"""bnb-nf4, bnb-nf4-dq, bnb-fp4, bnb-int8: bitsandbytes' formats, stored as it stores them.

What it is: the one file that imports bitsandbytes. Tensor names and bytes are those of its own
`Linear4bit` and `Linear8bitLt`, so a plain one loads each matrix bit for bit. They do the
multiplying, except for 4 bits on a card, which Triton's kernels read. What it is not: fast on the
CPU; bitsandbytes dequantizes whole matrices there.
Source: bitsandbytes 0.50, nn/modules.py and functional.py.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from m1local.cuda.matrix import Matrix, fits, levels_matrix, nested_matrix
from m1local.errors import DependencyError
from m1local.formats import LinearSpec
from m1local.formats.base import QuantizedLinear, Stored
from m1local.formats.slices import ROWS_QUANTIZED

IMPORTING = threading.Lock()
BLOCK = 64  # weights that share one absmax; along a row, since rows are multiples of it
ROWS_REARRANGED = 32  # bitsandbytes' AVX512-BF16 operator asserts whole blocks of so many rows
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
NESTED_BLOCK = 256  # block sizes that share one float32, with double quantization
NESTED_STATE_BYTES = 256  # some 170 and blanks; it is JSON


def bitsandbytes() -> ModuleType:
    """Import bitsandbytes without letting it fetch kernels from the hub or complain about it.

    On CPUs with AVX512-BF16 it looks for the package `kernels`, downloads through it where it is
    installed, and warns where it is not.
    """
    with IMPORTING:  # slices are quantized by several threads
        return _import()


@cache
def _import() -> ModuleType:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    try:
        module: ModuleType = import_module("bitsandbytes")
    except ImportError as error:
        raise DependencyError(
            "This checkpoint needs bitsandbytes: `pip install bitsandbytes`."
        ) from error
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return module


def _kernel() -> str:
    try:
        return f"bitsandbytes {bitsandbytes().__version__}"
    except DependencyError as error:
        return f"none: {error}"


class Bnb4bitLinear(QuantizedLinear):
    """`x @ W.T` by bitsandbytes' Linear4bit: 16 levels in blocks of 64 with a float32 each."""

    quant_type: ClassVar[str]
    inner: Any
    as_stored: tuple[Tensor, Mapping[str, Tensor]]  # weight and statistics; mapped, so no copy

    @classmethod
    def kernel(cls, device: torch.device) -> str:
        """The library's own; on a card Triton's, which read the same bytes."""
        return _kernel() if device.type == "cpu" else cls.card_kernel(device, _kernel())

    @classmethod
    def restored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """All of W: the library dequantizes it for more than some ten rows."""
        return shape[0] * shape[1] * dtype.itemsize

    @classmethod
    def check(cls, out_features: int, in_features: int, spec: LinearSpec) -> str | None:
        """Blocks must not cross rows, so that row slices quantize independently."""
        if in_features % BLOCK:
            return f"blocks of {BLOCK} do not divide its {in_features} columns"
        return None

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """The tensors of a saved Linear4bit."""
        size = out_features * in_features
        shared = cls.shared_tensors((out_features, in_features), spec)
        return {
            "weight": Stored((size // 2, 1), torch.uint8),
            "weight.absmax": Stored((size // BLOCK,), torch.float32),
        } | {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in shared.items()}

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """bitsandbytes' quantize_4bit on rows (n, K), in bfloat16 as Linear4bit would see them."""
        weight, state = bitsandbytes().functional.quantize_4bit(
            rows.to(torch.bfloat16).contiguous(), blocksize=BLOCK, quant_type=cls.quant_type
        )
        return {"weight": weight, "weight.absmax": state.absmax}

    @classmethod
    def shared_tensors(cls, shape: tuple[int, int], spec: LinearSpec) -> dict[str, Tensor]:
        """The 16 levels, and the packed description of the matrix."""
        tensors: dict[str, Tensor] = cls.state(shape, torch.empty(0)).as_dict(packed=True)
        return {f"weight.{name}": tensors[name] for name in tensors if name != "absmax"}

    @classmethod
    def state(cls, shape: tuple[int, int], absmax: Tensor, **nested: object) -> Any:
        """bitsandbytes' own description of a matrix."""
        functional = bitsandbytes().functional
        return functional.QuantState(
            absmax=absmax,
            shape=torch.Size(shape),
            code=functional.get_4bit_type(cls.quant_type, device="cpu", blocksize=BLOCK),
            blocksize=BLOCK,
            quant_type=cls.quant_type,
            dtype=torch.bfloat16,
            **nested,
        )

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec
    ) -> Self:
        """Wrap a Linear4bit around the stored tensors."""
        nn = bitsandbytes().nn
        module = cls(*shape, spec)
        inner = nn.Linear4bit(
            shape[1], shape[0], bias=False, quant_type=cls.quant_type, device="meta"
        )
        if shape[0] % ROWS_REARRANGED:
            inner.support_avx512bf16_for_cpu = False
        statistics = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        inner.weight = nn.Params4bit.from_prequantized(
            tensors["weight"], dict(statistics), device=tensors["weight"].device, module=inner
        )
        module.inner = inner.eval()
        module.as_stored = tensors["weight"], statistics
        return module

    def slice_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Dequantized rows (n, K)."""
        # From what was stored: with AVX512-BF16 the inner module rearranges its own for good, and
        # bitsandbytes' way back (0.50) forgets how the block sizes lay.
        functional, (weight, statistics) = bitsandbytes().functional, self.as_stored
        state = functional.QuantState.from_dict(dict(statistics), device=weight.device)
        whole: Tensor = functional.dequantize_4bit(weight, state)
        return whole[start:stop].to(dtype)

    def cuda_matrix(self) -> Matrix | None:
        """The stored tensors; the offset of nested scales is read out of their description."""
        shape, (codes, kept) = (self.out_features, self.in_features), self.as_stored
        if not fits(shape):
            return None
        scales, levels = kept["weight.absmax"], kept["weight.quant_map"]
        if "weight.nested_absmax" not in kept:
            return levels_matrix(codes, scales, levels, shape, BLOCK, self.quant_type)
        return nested_matrix(
            codes,
            scales,
            levels,
            shape,
            BLOCK,
            scale_levels=kept["weight.nested_quant_map"],
            scale_scales=kept["weight.nested_absmax"],
            offset=json.loads(bytes(kept[NF4_STATE].tolist()))["nested_offset"],
            name=self.quant_type,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        on_card = self.multiply_on_card(x)
        output: Tensor = self.inner(x) if on_card is None else on_card
        return output


class BnbNf4Linear(Bnb4bitLinear):
    """NormalFloat 4: levels at the quantiles of a normal distribution."""

    format = "bnb-nf4"
    quant_type = "nf4"
    shared = frozenset({"weight.quant_map", "weight.quant_state.bitsandbytes__nf4"})


class BnbFp4Linear(Bnb4bitLinear):
    """A floating-point number of four bits."""

    format = "bnb-fp4"
    quant_type = "fp4"
    shared = frozenset({"weight.quant_map", "weight.quant_state.bitsandbytes__fp4"})


class BnbNf4DqLinear(Bnb4bitLinear):
    """NormalFloat 4 whose block sizes are quantized to 8 bits in turn: 4.13 bits per weight."""

    format = "bnb-nf4-dq"
    quant_type = "nf4"

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """The tensors of a saved Linear4bit with compress_statistics."""
        blocks = out_features * in_features // BLOCK
        plain = BnbNf4Linear.stored(out_features, in_features, spec)
        return plain | {
            "weight.absmax": Stored((blocks,), torch.uint8),
            "weight.nested_absmax": Stored((-(-blocks // NESTED_BLOCK),), torch.float32),
            "weight.nested_quant_map": Stored((256,), torch.float32),
            NF4_STATE: Stored((NESTED_STATE_BYTES,), torch.uint8),
        }

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """A whole matrix; slices of it would have means of their own."""
        shape = (rows.shape[0], rows.shape[1])
        return cls.quantize_matrix(lambda start, stop: rows[start:stop], shape, spec)

    @classmethod
    def quantize_parts(
        cls,
        rows: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        spec: LinearSpec,
        quantize: Callable[[Tensor, LinearSpec], Mapping[str, Tensor]] | None = None,
        rows_per_slice: int = ROWS_QUANTIZED,
    ) -> Iterator[tuple[str, Tensor]]:
        """As NormalFloat 4, then what `quantize_4bit(compress_statistics=True)` does to it.

        All block sizes of a matrix share one mean.
        """
        sizes = []
        for name, part in BnbNf4Linear.quantize_parts(rows, shape, spec, None, rows_per_slice):
            if name == "weight":
                yield name, part
            elif name == "weight.absmax":
                sizes.append(part)
        absmax = torch.cat(sizes)
        mean = absmax.mean()
        codes, nested = bitsandbytes().functional.quantize_blockwise(
            absmax - mean, blocksize=NESTED_BLOCK
        )
        tensors = cls.state(shape, codes, offset=mean, state2=nested).as_dict(packed=True)
        described: Tensor = tensors.pop(NF4_STATE.removeprefix("weight."))
        # Its length depends on the digits of the mean; a file is laid out before that is known.
        padded = torch.full((NESTED_STATE_BYTES,), ord(" "), dtype=torch.uint8)
        padded[: described.numel()] = described
        found = {f"weight.{name}": tensor for name, tensor in tensors.items()}
        found[NF4_STATE] = padded
        yield from ((name, found[name]) for name in cls.stored(*shape, spec) if name != "weight")


class BnbInt8Linear(QuantizedLinear):
    """`x @ W.T` by bitsandbytes' Linear8bitLt without outlier decomposition.

    Activations are rounded to int8 per row as well, which int8 of this project does not do.
    """

    format = "bnb-int8"
    shared: ClassVar[frozenset[str]] = frozenset({"weight_format"})
    inner: Any

    @classmethod
    def kernel(cls, device: torch.device) -> str:
        """The library's own."""
        return _kernel()

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """The tensors of a saved Linear8bitLt."""
        return {
            "weight": Stored((out_features, in_features), torch.int8),
            "SCB": Stored((out_features,), torch.float32),
            "weight_format": Stored((), torch.uint8),
        }

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """bitsandbytes' int8_vectorwise_quant on rows (n, K), in float16 as Linear8bitLt does."""
        codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(rows.to(torch.float16))
        return {"weight": codes, "SCB": scales}

    @classmethod
    def shared_tensors(cls, shape: tuple[int, int], spec: LinearSpec) -> dict[str, Tensor]:
        """The row-major marker."""
        return {"weight_format": torch.tensor(0, dtype=torch.uint8)}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec
    ) -> Self:
        """Wrap a Linear8bitLt around the stored tensors."""
        nn = bitsandbytes().nn
        module = cls(*shape, spec)
        inner = nn.Linear8bitLt(
            shape[1], shape[0], bias=False, has_fp16_weights=False, device="meta"
        )
        weight = tensors["weight"]
        inner.weight = nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=tensors["SCB"]
        )
        module.inner = inner.eval()
        return module

    def slice_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Dequantized rows (n, K)."""
        weight, state = self.inner.weight, self.inner.state
        scales: Tensor = (weight.SCB if weight.SCB is not None else state.SCB)[start:stop, None]
        codes: Tensor = weight.data[start:stop]
        return (codes.float() * scales / 127).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        output: Tensor = self.inner(x)
        return output
