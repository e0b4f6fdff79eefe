"""int4: four bits per weight in groups along a row. Affine: w = (q - 8) * scale + zero.

What it is: the 4-bit format of this project; with groups of 64 it takes 4.5 bits per weight. The
zero is a float, the group's value at q = 8, so bfloat16 keeps it precise where |w| is small.
On the CPU the codes are rearranged once, at load, for torch's packed operator
(m1local/formats/int4pack.py); elsewhere they stay as stored and W is dequantized in slices.

Stored: weight (N, K/2) uint8, the even column in the low nibble; scales and zeros (N, K/group)
bfloat16.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from m1local.formats import LinearSpec, int4pack
from m1local.formats.base import QuantizedLinear, Stored

GROUP_SIZES = (32, 64, 128)
MIDDLE = 8  # the code that means exactly `zero`
HIGHEST = 15
FEW_ROWS = 8  # up to here the packed operator beats slices of the dequantized matrix


def group_size_of(spec: LinearSpec) -> int:
    """The group size of an int4 `spec`; it always has one."""
    if spec.group_size not in GROUP_SIZES:
        raise ValueError(f"int4 needs a group size of {GROUP_SIZES}, not {spec.group_size}")
    return spec.group_size


class Int4Linear(QuantizedLinear):
    """`x @ W.T` with W in 4-bit groups."""

    format = "int4"
    codes: Tensor  # (N, K/2) uint8, as stored or in torch's packed order
    scales_zeros: Tensor  # (K/group, N, 2) bfloat16, as torch's operator wants them
    packed: bool

    @classmethod
    def check(cls, out_features: int, in_features: int, spec: LinearSpec) -> str | None:
        """Groups must divide the row."""
        if spec.group_size not in GROUP_SIZES:
            return f"the group size is {spec.group_size}; int4 takes 32, 64 or 128"
        if in_features % spec.group_size:
            return f"groups of {spec.group_size} do not divide its {in_features} columns"
        return None

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """weight, scales and zeros."""
        groups = in_features // group_size_of(spec)
        return {
            "weight": Stored((out_features, in_features // 2), torch.uint8),
            "scales": Stored((out_features, groups), torch.bfloat16),
            "zeros": Stored((out_features, groups), torch.bfloat16),
        }

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Spread the 16 codes evenly from each group's least to its greatest value."""
        grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)  # eight times as fast as aminmax
        # Rounded before the codes are chosen, so that the codes make up for it.
        scales = ((high - low) / HIGHEST).to(torch.bfloat16)
        zeros = (low + MIDDLE * scales.float()).to(torch.bfloat16)
        return cls.encode(grouped, scales, zeros)

    @staticmethod
    def encode(grouped: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """Choose the nearest codes of `grouped` (n, groups, group) for given scales and zeros."""
        inverse = torch.where(scales > 0, 1 / scales.float(), 0)[..., None]
        codes = ((grouped - zeros.float()[..., None]) * inverse).round_().add_(MIDDLE)
        codes = codes.clamp_(0, HIGHEST).to(torch.uint8).flatten(1)
        return {"weight": pack_nibbles(codes), "scales": scales, "zeros": zeros}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec
    ) -> Self:
        """Rearrange the codes for torch's CPU operator where it serves; keep one copy only."""
        module = cls(*shape, spec)
        codes = tensors["weight"]
        module.packed = codes.device.type == "cpu" and int4pack.serves(*shape)
        scales_zeros = torch.stack((tensors["scales"].T, tensors["zeros"].T), dim=-1)
        module.register_buffer("codes", int4pack.pack(codes) if module.packed else codes)
        module.register_buffer("scales_zeros", scales_zeros.contiguous())
        return module

    def slice_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Dequantized rows (n, K)."""
        if self.packed:
            codes = int4pack.unpack(self.codes, start, stop)
        else:
            codes = unpack_nibbles(self.codes[start:stop])
        grouped = codes.view(codes.shape[0], -1, group_size_of(self.spec))
        scales, zeros = self.scales_zeros[:, start:stop].float().permute(2, 1, 0)[..., None]
        rows: Tensor = ((grouped.float() - MIDDLE) * scales + zeros).flatten(1)
        return rows.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        if not self.packed or x.numel() > FEW_ROWS * self.in_features:
            return self.multiply_sliced(x)
        flat = x.reshape(-1, self.in_features)
        product = int4pack.multiply(flat, self.codes, group_size_of(self.spec), self.scales_zeros)
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(n, K) codes -> (n, K/2) bytes, the low nibble first."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(n, K/2) bytes -> (n, K) codes, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
