"""int8: one signed byte per weight, one float32 scale per row. Symmetric: w = q * scale.

What it is: the format of embedding and lm_head in every recipe, and of whole models at 8 bits.
On the CPU rows of activations go through the compiled library (m1local/native/matmul.py); without
it a few through torch's `_weight_int8pack_mm`, which is fast only with bfloat16 activations, and
more through slices of the dequantized matrix. On a card Triton's kernels read it (m1local/cuda).
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from m1local.cuda.matrix import Matrix, fits, int8_matrix
from m1local.formats import LinearSpec
from m1local.formats.base import CARD_SLICE, SLICES, QuantizedLinear, Stored, inverse_of
from m1local.formats.slices import slices_of
from m1local.native import matmul
from m1local.native import quantize as native

FEW_ROWS = 8  # up to here the low-bit operator wins (measured with AVX2 and AVX512)
ALIGNMENT_BYTES = 16  # with AVX512 the operator crashes on less; safetensors promises only 8
WHOLE_VECTOR = 16  # columns the operator loads at a time; it has no tail, so others crash it


class Int8Linear(QuantizedLinear):
    """`x @ W.T` with W as int8 rows."""

    format = "int8"
    gathers = True
    weight: Tensor  # (N, K) int8
    scales: Tensor  # (N,) float32

    @classmethod
    def kernel(cls, device: torch.device) -> str:
        """The compiled library's or torch's on the CPU, Triton's on a card."""
        if device.type != "cpu":
            return cls.card_kernel(device)
        if matmul.usable():
            return f"compiled ({matmul.instructions()})"
        return f"torch's int8 operator, to {FEW_ROWS} rows; above, {SLICES}"

    @classmethod
    def restored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Codes in bfloat16 (`multiply_codes`), or as other formats."""
        if dtype != torch.bfloat16:
            return super().restored_bytes(shape, dtype)
        return min(shape[0] * shape[1], CARD_SLICE) * dtype.itemsize

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """weight (N, K) int8 and scales (N,) float32."""
        return {
            "weight": Stored((out_features, in_features), torch.int8),
            "scales": Stored((out_features,), torch.float32),
        }

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Scale each row (n, K) so that its largest magnitude becomes 127."""
        compiled = native.quantize_rows(rows)
        if compiled is not None:
            return dict(zip(("weight", "scales"), compiled, strict=True))
        wide = rows.float()
        # Of 0 and -0 either may be found; adding 0 makes both 0.
        scales = (torch.maximum(wide.amax(dim=1), -wide.amin(dim=1)) + 0.0) / 127
        codes = (
            torch.mul(wide, inverse_of(scales)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        )
        return {"weight": codes, "scales": scales}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec
    ) -> Self:
        """Use the stored tensors as they are, mapped files included."""
        module = cls(*shape, spec)
        weight = tensors["weight"]
        if weight.device.type == "cpu" and weight.data_ptr() % ALIGNMENT_BYTES:
            weight = weight.clone()
        module.register_buffer("weight", weight)
        module.register_buffer("scales", tensors["scales"])
        return module

    def multiply_codes(self, x: Tensor) -> Tensor:
        """`x @ W.T` by bfloat16, which has every code and range for their sums; then the scales.

        For a card without our kernels: of each weight five bytes are moved instead of some twenty.
        """
        output = x.new_empty((*x.shape[:-1], self.out_features))
        for start, stop in slices_of(self.out_features, self.rows_per_slice(x.device)):
            product = x @ self.weight[start:stop].to(x.dtype).T
            output[..., start:stop] = product.float() * self.scales[start:stop]
        return output

    def slice_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Dequantized rows (n, K)."""
        scales = self.scales[start:stop, None]
        return (self.weight[start:stop].float() * scales).to(dtype)

    def gather_rows(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of an embedding: (...) ids -> (..., K)."""
        return (self.weight[token_ids].float() * self.scales[token_ids][..., None]).to(dtype)

    def compiled_matrix(self) -> matmul.Matrix | None:
        """The stored rows."""
        return matmul.int8_matrix(self.weight, self.scales)

    def cuda_matrix(self) -> Matrix | None:
        """The stored tensors, where a row is whole blocks of columns."""
        shape = (self.out_features, self.in_features)
        return int8_matrix(self.weight, self.scales, shape) if fits(shape) else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        if (compiled := self.multiply_compiled(x)) is not None:
            return compiled
        if (found := self.multiply_on_card(x)) is not None:
            return found
        many = x.numel() > FEW_ROWS * self.in_features
        if x.device.type != "cpu" and x.dtype == torch.bfloat16:
            return self.multiply_codes(x)
        if x.device.type != "cpu" or many or self.in_features % WHOLE_VECTOR:
            return self.multiply_sliced(x)
        # The operator wants scales in bfloat16; applying ours afterwards keeps them exact.
        ones = torch.ones(self.out_features, dtype=torch.bfloat16)
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16)
        product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, ones)
        scaled: Tensor = (product.float() * self.scales).to(x.dtype)
        return scaled.view(*x.shape[:-1], self.out_features)
