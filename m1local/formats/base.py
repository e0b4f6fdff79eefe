"""What every storage format of a matrix must offer.

What it is: the contract, and what formats share: multiplying by a matrix that is never whole in
memory. What it is not: an abstraction over devices; each format decides in `forward` which
operators serve it.

Words: a matrix W is (N, K), N output rows and K input columns. `tensors` are what the checkpoint
stores of one matrix, keyed by what follows the module's name ("weight", "scales", …).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from m1local.cuda import support
from m1local.cuda.matrix import Matrix
from m1local.formats import LinearSpec
from m1local.formats.slices import ROWS_QUANTIZED, in_order, joined, slices_of
from m1local.native import matmul
from m1local.native import quantize as native

ROWS_PER_SLICE = 256  # of W: slices that stay in the cache are five times faster than the whole
CARD_SLICE = 8 << 20  # weights of a slice on a card, where each operator takes a launch
SLICE_COPIES = 3  # of a slice while it is dequantized, in float32
FLOAT32_BYTES = 4
SLICES = "slices dequantized to float"
TRITON = "Triton, as stored; with many rows, restored slices and cuBLAS"
WEIGHTS_PER_PART = 1 << 20  # quantized and handed on at a time, about


class Stored(NamedTuple):
    """Shape and dtype of one tensor in the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def inverse_of(scales: Tensor) -> Tensor:
    """What values are multiplied by for their codes: 1 / scale, or 0 where that would overflow."""
    return torch.where(scales >= torch.finfo(torch.float32).tiny, 1 / scales, 0)


class QuantizedLinear(nn.Module):
    """A matrix in one storage format, multiplied as `x @ W.T`; takes the place of nn.Linear."""

    format: ClassVar[str]
    # Stored tensors that are the same for any slice of rows; all others grow with the rows.
    shared: ClassVar[frozenset[str]] = frozenset()
    gathers: ClassVar[bool] = False  # whether an embedding can be stored so

    def __init__(self, out_features: int, in_features: int, spec: LinearSpec) -> None:
        """Hold a matrix of (N, K) = (out_features, in_features)."""
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.spec = spec
        self._matrix: Matrix | None = None

    @classmethod
    def check(cls, out_features: int, in_features: int, spec: LinearSpec) -> str | None:
        """Why a matrix of this shape cannot be stored by `spec`; None when it can."""
        return None

    @classmethod
    def kernel(cls, device: torch.device) -> str:
        """What multiplies by this format on `device`, and why, in words for `m1 doctor`."""
        return SLICES

    @classmethod
    def card_kernel(cls, device: torch.device, otherwise: str = SLICES) -> str:
        """What multiplies on a card by a format that the Triton kernels know, and why."""
        reason = support.missing(device)
        return TRITON if reason is None else f"{otherwise} ({reason})"

    @classmethod
    def restored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """What a product in `dtype` takes for parts of W on a card without our kernels."""
        return min(shape[0] * shape[1], CARD_SLICE) * SLICE_COPIES * FLOAT32_BYTES

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """The tensors of one matrix in the checkpoint."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Round rows (n, K) to nearest; row slices of a matrix may be quantized one by one."""
        raise NotImplementedError

    @classmethod
    def quantize_parts(
        cls,
        rows: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        spec: LinearSpec,
        quantize: Callable[[Tensor, LinearSpec], Mapping[str, Tensor]] | None = None,
        rows_per_slice: int = ROWS_QUANTIZED,
    ) -> Iterator[tuple[str, Tensor]]:
        """Quantize a whole (N, K) matrix slice by slice; `rows(start, stop)` hands out a slice.

        What is stored comes by name and in parts, in its order: those of the first tensor, which
        is the largest, as they are done; then those of the others. `quantize` takes the place of
        the format's own rounding.
        """
        chosen = quantize or cls.quantize
        growing, *others = cls.stored(*shape, spec)
        kept: dict[str, list[Tensor]] = {name: [] for name in others if name not in cls.shared}

        def work(start: int, stop: int) -> dict[str, Tensor]:
            part = rows(start, stop)
            if native.serves(part):  # and needs no copies in 32 bits
                return dict(chosen(part, spec))
            return joined(chosen(part[a:b], spec) for a, b in slices_of(len(part), rows_per_slice))

        threads = None if rows_per_slice <= ROWS_QUANTIZED else 1
        rows_per_part = max(rows_per_slice, WEIGHTS_PER_PART // shape[1])
        for part in in_order(work, slices_of(shape[0], rows_per_part), threads):
            yield growing, part[growing]
            for name, found in kept.items():
                found.append(part[name])
        shared = cls.shared_tensors(shape, spec)
        yield from ((name, part) for name in others for part in kept.get(name) or [shared[name]])

    @classmethod
    def quantize_matrix(
        cls,
        rows: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        spec: LinearSpec,
        quantize: Callable[[Tensor, LinearSpec], Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """As `quantize_parts`, all in memory."""
        parts = cls.quantize_parts(rows, shape, spec, quantize)
        return joined([{name: part} for name, part in parts])

    @classmethod
    def shared_tensors(cls, shape: tuple[int, int], spec: LinearSpec) -> dict[str, Tensor]:
        """The tensors named in `shared`, for a matrix of `shape` (N, K)."""
        return {}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec
    ) -> Self:
        """Build the module of a matrix of `shape` (N, K) from what the checkpoint stores."""
        raise NotImplementedError

    @classmethod
    def table(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec) -> Self:
        """As `from_tensors`, for an embedding, whose rows are read one by one."""
        return cls.from_tensors(tensors, shape, spec)

    def slice_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start` to `stop` of the matrix that forward multiplies by: (n, K)."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The whole matrix in float32: (N, K). The oracle of `forward`."""
        return self.slice_rows(0, self.out_features, torch.float32)

    def gather_rows(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Single rows, as an embedding needs them: (...) ids -> (..., K)."""
        raise NotImplementedError

    def compiled_matrix(self) -> matmul.Matrix | None:
        """The stored tensors as the compiled library reads them; None where it does not."""
        return None

    def multiply_compiled(self, x: Tensor) -> Tensor | None:
        """(..., K) -> (..., N) by the compiled library; None where it does not serve."""
        matrix = self.compiled_matrix() if x.device.type == "cpu" else None
        if matrix is None:
            return None
        found = matmul.multiply(x.reshape(-1, self.in_features), matrix)
        return None if found is None else found.view(*x.shape[:-1], self.out_features)

    def cuda_matrix(self) -> Matrix | None:
        """What the kernels of m1local/cuda read; None where they do not know the format."""
        return None

    def on_card(self) -> Matrix | None:
        """`cuda_matrix`, made once, where the kernels of m1local/cuda are to multiply."""
        if self._matrix is None:
            self._matrix = self.cuda_matrix()
        matrix = self._matrix
        return matrix if matrix and support.usable(matrix.codes.device) else None

    def multiply_on_card(self, x: Tensor) -> Tensor | None:
        """(..., K) -> (..., N) by the kernels of m1local/cuda; None where they do not serve."""
        if x.device.type == "cpu" and not support.usable(x.device):  # at once, on the CPU
            return None
        matrix = self.on_card()
        if matrix is None:
            return None
        from m1local.cuda import products  # Triton, which is only there with a card

        flat = x.reshape(-1, self.in_features)
        return products.product(flat, matrix).view(*x.shape[:-1], self.out_features)

    def multiply_sliced(self, x: Tensor) -> Tensor:
        """`x @ W.T` slice by slice of W, so that W is never whole in memory."""
        output = x.new_empty((*x.shape[:-1], self.out_features))
        for start, stop in slices_of(self.out_features, self.rows_per_slice(x.device)):
            output[..., start:stop] = x @ self.slice_rows(start, stop, x.dtype).T
        return output

    def rows_per_slice(self, device: torch.device) -> int:
        """How many rows of W are dequantized at a time on `device`."""
        return ROWS_PER_SLICE if device.type == "cpu" else max(1, CARD_SLICE // self.in_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features} -> {self.out_features}, {self.spec.format}"


class QuantizedEmbedding(nn.Module):
    """A token embedding (V, C) in a format whose rows can be read one by one."""

    def __init__(self, table: QuantizedLinear, dtype: torch.dtype) -> None:
        """Look rows of `table` up, as `dtype`."""
        super().__init__()
        self.table = table
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        rows: Tensor = self.table.gather_rows(token_ids, self.dtype)
        return rows
