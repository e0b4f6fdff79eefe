"""int3 to int6: few bits per weight in groups along a row, w = (q - middle) * scale + zero.

What it is: the affine formats of this project; with groups of 64 they take half a bit more than
their name says. The zero is a float, the group's value at the middle code, so bfloat16 keeps it
precise where |w| is small. On the CPU they are multiplied as stored, by the compiled library
(m1local/native/matmul.py). Without it the codes are rearranged once, at load, for torch's packed
4-bit operator (m1local/formats/int4pack.py): three bits in the place of four, five and six as a low
and a high half, each of four, that are multiplied one after the other. On a card Triton's kernels
read all of them (m1local/cuda), codes as stored, scales and zeros in tiles; where there is no
Triton, torch's operator multiplies int4, and other widths are dequantized in slices. What it is
not: as small in memory as on the disk where the codes are rearranged.

Stored: codes in planes of 1, 2 or 4 bits, the even columns in the low bits of a byte: weight
(N, K * width / 8) uint8 with the lowest bits, weight_high with the others; scales and zeros
(N, K/group) bfloat16.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from m1local.cuda import int4pack as cuda_int4pack
from m1local.cuda import support
from m1local.cuda.matrix import (
    Matrix,
    can_be_tiled,
    fits,
    int4_matrix,
    planes_matrix,
    tiled,
    untiled,
)
from m1local.formats import LinearSpec, format_class, int4pack
from m1local.formats.base import SLICES, QuantizedLinear, Stored, inverse_of
from m1local.native import matmul
from m1local.native import quantize as native

GROUP_SIZES = (32, 64, 128)
FEW_ROWS = 8  # up to here the packed operator beats slices of the dequantized matrix
PLANES = {"weight": 0, "weight_high": 1}  # tensors that hold codes
NIBBLE, NIBBLE_MIDDLE = 16, 8  # of torch's operator


def group_size_of(spec: LinearSpec) -> int:
    """The group size of a `spec` with groups; it always has one."""
    if spec.group_size not in GROUP_SIZES:
        raise ValueError(f"{spec.format} needs a group size of {GROUP_SIZES}: {spec.group_size}")
    return spec.group_size


def group_class(spec: LinearSpec) -> "type[GroupLinear]":
    """The class of a `spec` with groups."""
    found = format_class(spec.format)
    if not issubclass(found, GroupLinear):
        raise ValueError(f"{spec.format} has no groups")
    return found


class GroupLinear(QuantizedLinear):
    """`x @ W.T` with W in groups of a few bits."""

    gathers = True
    planes: ClassVar[tuple[int, ...]]  # bits of each plane, the lowest first
    # The code that means exactly `zero`: halves of four bits need it 8 above a multiple of 16.
    middle: ClassVar[int]
    highest: ClassVar[int]
    codes: Tensor  # (N, K/2) uint8 in torch's packed order, or the plane as stored
    high: Tensor | None  # the same for the upper half, where there is one
    scales: Tensor  # (N, K/group) bfloat16, in tiles where tiled; empty where packed
    zeros: Tensor  # the same
    scales_zeros: Tensor  # (K/group, N, 2) bfloat16, as torch's operator wants them; or empty
    packed: bool
    tiled = False

    @classmethod
    def check(cls, out_features: int, in_features: int, spec: LinearSpec) -> str | None:
        """Groups must divide the row."""
        if spec.group_size not in GROUP_SIZES:
            return f"the group size is {spec.group_size}; {cls.format} takes 32, 64 or 128"
        if in_features % spec.group_size:
            return f"groups of {spec.group_size} do not divide its {in_features} columns"
        return None

    @classmethod
    def kernel(cls, device: torch.device) -> str:
        """The compiled library's; else torch's where its layout could be learned (int4pack.py)."""
        if device.type != "cpu":
            packs = cls.planes == (4,) and cuda_int4pack.serves(device, (8, 128))
            return cls.card_kernel(device, cuda_int4pack.NAME if packs else SLICES)
        if cls._is_compiled():
            return f"compiled ({matmul.instructions()})"
        if int4pack.layout() is None:
            return f"{SLICES} (this torch has no packed 4-bit operator for this processor)"
        passes = "" if cls.highest < NIBBLE else ", twice"
        return f"torch's packed 4-bit operator{passes}, to {FEW_ROWS} rows; above, {SLICES}"

    @classmethod
    def stored(cls, out_features: int, in_features: int, spec: LinearSpec) -> dict[str, Stored]:
        """The planes of codes, scales and zeros."""
        groups = in_features // group_size_of(spec)
        codes = {
            name: Stored((out_features, in_features * width // 8), torch.uint8)
            for name, width in zip(PLANES, cls.planes, strict=False)
        }
        statistics = Stored((out_features, groups), torch.bfloat16)
        return codes | {"scales": statistics, "zeros": statistics}

    @classmethod
    def quantize(cls, rows: Tensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Spread the codes evenly from each group's least to its greatest value."""
        compiled = cls.quantize_compiled(rows, spec)
        if compiled is not None:
            return compiled
        grouped = rows.float().reshape(rows.shape[0], -1, group_size_of(spec))
        return cls.encode(grouped, *cls.spread(*range_of(grouped)))

    @classmethod
    def quantize_compiled(
        cls, rows: Tensor, spec: LinearSpec, choice: native.Refit | native.Hqq | None = None
    ) -> dict[str, Tensor] | None:
        """The same bytes by the compiled library; None where it does not serve."""
        found = native.quantize_groups(rows, group_size_of(spec), cls.planes, cls.middle, choice)
        if found is None:
            return None
        packed, scales, zeros = found
        return dict(zip(PLANES, packed, strict=False)) | {"scales": scales, "zeros": zeros}

    @classmethod
    def spread(cls, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros, as stored, of codes evenly from `low` to `high`."""
        # Rounded before the codes are chosen, so that the codes make up for it.
        scales = rounded((high - low).clamp_max(torch.finfo(torch.float32).max) / cls.highest)
        return scales, rounded(low + cls.middle * scales.float())

    @classmethod
    def encode(cls, grouped: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """Choose the nearest codes of `grouped` (n, groups, group) for given scales and zeros."""
        inverse = inverse_of(scales.float())[..., None]
        codes = torch.sub(grouped, zeros.float()[..., None]).mul_(inverse).round_()
        codes = codes.add_(cls.middle).clamp_(0, cls.highest).flatten(1).to(torch.uint8)
        return {**cls.pack(codes), "scales": scales, "zeros": zeros}

    @classmethod
    def pack(cls, codes: Tensor) -> dict[str, Tensor]:
        """Codes (n, K) as they are stored: by the name of each plane."""
        if len(cls.planes) == 1:
            return {"weight": pack_plane(codes, cls.planes[0])}
        packed, below = {}, 0
        for name, width in zip(PLANES, cls.planes, strict=False):
            packed[name] = pack_plane(codes >> below & (1 << width) - 1, width)
            below += width
        return packed

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Tensor:
        """Codes (n, K) from stored planes."""
        codes, below = None, 0
        for name, width in zip(PLANES, cls.planes, strict=False):
            plane = unpack_plane(tensors[name], width)
            codes = plane if codes is None else codes | plane << below
            below += width
        assert codes is not None, f"{cls.format} has no planes"
        return codes

    @classmethod
    def _is_compiled(cls) -> bool:
        return matmul.usable()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec
    ) -> Self:
        """Keep the codes as stored where the compiled library, or nothing, reads them.

        Else rearrange them for torch's CPU operator; there is only ever one copy.
        """
        device = tensors["weight"].device
        if cls.packs_on_card(device, shape):
            rearranged = cuda_int4pack.pack(tensors["weight"])
            return cls(*shape, spec)._hold(rearranged, None, scales_zeros=_joined(tensors))
        if device.type != "cpu":
            return cls.table(tensors, shape, spec)._for_kernels()
        if cls._is_compiled() or not int4pack.serves(*shape):
            return cls.table(tensors, shape, spec)
        scales_zeros = _joined(tensors)
        module = cls(*shape, spec)
        if len(cls.planes) == 1:
            return module._hold(int4pack.pack(tensors["weight"]), None, scales_zeros=scales_zeros)
        codes = cls.unpack(tensors)
        if cls.highest < NIBBLE:
            nibbles = pack_plane(codes + (NIBBLE_MIDDLE - cls.middle), 4)
            return module._hold(int4pack.pack(nibbles), None, scales_zeros=scales_zeros)
        low, above = pack_plane(codes & NIBBLE - 1, 4), codes // NIBBLE
        high = pack_plane(above + (NIBBLE_MIDDLE - cls.middle // NIBBLE), 4)
        packed = int4pack.pack(low), int4pack.pack(high)
        return module._hold(*packed, scales_zeros=scales_zeros)

    @classmethod
    def packs_on_card(cls, device: torch.device, shape: tuple[int, int]) -> bool:
        """Whether torch's operator is to multiply on a card, for want of Triton."""
        wanted = cls.planes == (4,) and not support.usable(device)
        return wanted and cuda_int4pack.serves(device, shape)

    @classmethod
    def table(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: LinearSpec) -> Self:
        """Keep the codes as stored."""
        module = cls(*shape, spec)
        return module._hold(
            tensors["weight"],
            tensors.get("weight_high"),
            scales=tensors["scales"],
            zeros=tensors["zeros"],
        )

    def _hold(self, codes: Tensor, high: Tensor | None, **statistics: Tensor) -> Self:
        self.packed = "scales_zeros" in statistics
        self.register_buffer("codes", codes)
        self.register_buffer("high", high)
        for name in ("scales", "zeros", "scales_zeros"):
            self.register_buffer(name, statistics.get(name, codes.new_empty(0)))
        return self

    def tile(self) -> None:
        """Put scales and zeros into the order that Triton's kernels read, in their place."""
        if not self.tiled and can_be_tiled((self.scales.shape[0], self.scales.shape[1])):
            for statistics in (self.scales, self.zeros):
                statistics.copy_(tiled(statistics))
            self.tiled = True

    def _for_kernels(self) -> Self:
        if support.usable(self.codes.device) and fits((self.out_features, self.in_features)):
            self.tile()
        return self

    def _statistics(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros of rows: (n, groups, 1) float32."""
        if self.packed:
            scales, zeros = self.scales_zeros[:, start:stop].float().permute(2, 1, 0)[..., None]
            return scales, zeros
        scales, zeros = self.scales, self.zeros
        if self.tiled:
            scales, zeros = untiled(scales), untiled(zeros)
        return scales[start:stop].float()[..., None], zeros[start:stop].float()[..., None]

    def slice_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Dequantized rows (n, K)."""
        return self._restore(self._centred(start, stop), *self._statistics(start, stop), dtype)

    def gather_rows(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of an embedding: (...) ids -> (..., K)."""
        if self.packed or self.tiled:
            raise ValueError("rows are gathered from a table()")
        flat = token_ids.flatten()
        planes = {"weight": self.codes[flat]}
        if self.high is not None:
            planes["weight_high"] = self.high[flat]
        scales, zeros = (part[flat].float()[..., None] for part in (self.scales, self.zeros))
        rows = self._restore(self.unpack(planes).float() - self.middle, scales, zeros, dtype)
        return rows.view(*token_ids.shape, self.in_features)

    def compiled_matrix(self) -> matmul.Matrix | None:
        """The stored planes."""
        if self.packed or self.tiled:
            return None
        planes = [self.codes] if self.high is None else [self.codes, self.high]
        size = group_size_of(self.spec)
        return matmul.groups_matrix(planes, self.scales, self.zeros, size, self.middle)

    def cuda_matrix(self) -> Matrix | None:
        """The stored tensors, where a row is whole blocks of columns."""
        shape, size = (self.out_features, self.in_features), group_size_of(self.spec)
        if self.packed or not fits(shape):
            return None
        if self.high is not None:
            stored = self.codes, self.high, self.scales, self.zeros
            found = planes_matrix(*stored, shape, size, (self.planes[0], self.planes[1]))
        else:
            found = int4_matrix(self.codes, self.scales, self.zeros, shape, size)
        return replace(found, is_tiled=self.tiled)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        if (compiled := self.multiply_compiled(x)) is not None:
            return compiled
        flat, size = x.reshape(-1, self.in_features), group_size_of(self.spec)
        if (found := self.multiply_on_card(x)) is not None:
            return found
        on_card = self.packed and x.device.type == "cuda"
        if on_card and cuda_int4pack.multiplies(x.device, len(flat)):
            multiplied = cuda_int4pack.multiply(flat, self.codes, size, self.scales_zeros)
            return multiplied.view(*x.shape[:-1], self.out_features)
        if not self.packed or len(flat) > FEW_ROWS:
            return self.multiply_sliced(x)
        product = int4pack.multiply(flat, self.codes, size, self.scales_zeros).to(x.dtype)
        if self.high is not None:
            coarse = self.scales_zeros * self.scales_zeros.new_tensor([NIBBLE, 0])
            product += int4pack.multiply(flat, self.high, size, coarse).to(x.dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def _centred(self, start: int, stop: int) -> Tensor:
        """Codes (n, K) of rows, less the middle one, in float32."""
        if not self.packed:
            planes = {"weight": self.codes[start:stop]}
            if self.high is not None:
                planes["weight_high"] = self.high[start:stop]
            return self.unpack(planes).float() - self.middle
        if self.codes.device.type == "cuda":
            codes = cuda_int4pack.unpack(self.codes, self.in_features, start, stop)
            return codes.float() - NIBBLE_MIDDLE
        centred = int4pack.unpack(self.codes, start, stop).float() - NIBBLE_MIDDLE
        if self.high is not None:
            above = int4pack.unpack(self.high, start, stop).float() - NIBBLE_MIDDLE
            centred += NIBBLE * above
        return centred

    def _restore(
        self, centred: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype
    ) -> Tensor:
        grouped = centred.view(centred.shape[0], -1, group_size_of(self.spec))
        rows: Tensor = (grouped * scales + zeros).flatten(1)
        return rows.to(dtype)


class Int3Linear(GroupLinear):
    """Eight levels."""

    format, planes, middle, highest = "int3", (2, 1), 4, 7


class Int4Linear(GroupLinear):
    """Sixteen levels."""

    format, planes, middle, highest = "int4", (4,), 8, 15


class Int5Linear(GroupLinear):
    """Thirty-two levels."""

    format, planes, middle, highest = "int5", (4, 1), 8, 31


class Int6Linear(GroupLinear):
    """Sixty-four levels."""

    format, planes, middle, highest = "int6", (4, 2), 24, 63


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales and zeros as torch's operators want them: (K/group, N, 2)."""
    return torch.stack((tensors["scales"].T, tensors["zeros"].T), dim=-1).contiguous()


def range_of(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each group (n, groups) of (n, groups, group); never -0."""
    # Eight times as fast as aminmax. Of 0 and -0 either may be found; adding 0 makes both 0.
    return grouped.amin(dim=2) + 0.0, grouped.amax(dim=2) + 0.0


def rounded(statistics: Tensor) -> Tensor:
    """The nearest bfloat16; the greatest one of what lies beyond."""
    most = torch.finfo(torch.bfloat16).max
    return statistics.clamp(-most, most).to(torch.bfloat16)


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """(n, K) codes of `width` bits -> (n, K * width / 8) bytes, the first in the lowest bits."""
    per_byte = 8 // width
    if per_byte == 2 and sys.byteorder == "little":  # two at a time: three times as fast
        pairs = codes.contiguous().view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8)
    packed = codes[:, 0::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[:, place::per_byte] << place * width
    return packed


def unpack_plane(packed: Tensor, width: int) -> Tensor:
    """(n, bytes) -> (n, bytes * 8 / width) codes of `width` bits."""
    shifts = range(0, 8, width)
    mask = (1 << width) - 1
    return torch.stack([packed >> shift & mask for shift in shifts], dim=-1).flatten(1)
