"""Where keys or values of one layer lie: as they are, or in bytes.

What it is: a buffer with a slot for each position that is kept, written by slots and read as
tensors. Of the kind `q8_0` are bytes, each 32 of a head with a scale in bfloat16 (8.5 bits a value;
the name is llama.cpp's, whose scales are of another type). What it is not: aware of positions,
which m1local/cache.py owns.
"""

import torch
from torch import Tensor

SCALED = 32  # values of a head that share a scale
FLOAT, BYTES = "f16", "q8_0"  # f16 is whatever type the model computes in
KV_BYTES = {FLOAT: 2, BYTES: 1 + 2 / SCALED}  # of a value; f16 takes 4 where float32 is computed


def kind_fits(kind: str, head_dim: int) -> bool:
    """Whether heads of this width can be kept as `kind`."""
    return kind == FLOAT or head_dim % SCALED == 0


class KVStore:
    """Slots for the heads of one layer's keys, or values."""

    def __init__(
        self, shape: tuple[int, int, int, int], kind: str, *, dtype: torch.dtype, device: str
    ) -> None:
        """Allocate `shape` (B, Hkv, slots, D), of `dtype` where they are kept as they are."""
        self.dtype = dtype
        self.scales: Tensor | None = None  # (B, Hkv, slots, D / 32) bfloat16
        if kind == BYTES:
            scales = (*shape[:3], shape[3] // SCALED)
            self.scales = torch.zeros(scales, dtype=torch.bfloat16, device=device)
        kept = torch.int8 if kind == BYTES else dtype
        self.values = torch.zeros(shape, dtype=kept, device=device)  # (B, Hkv, slots, D)

    def write(self, slots: slice | Tensor, x: Tensor) -> None:
        """Put x (B, Hkv, T, D) into T slots."""
        if self.scales is None:
            self.values[:, :, slots] = x
            return
        codes, scales = to_bytes(x)
        self.values[:, :, slots] = codes
        self.scales[:, :, slots] = scales

    def read(self, used: int) -> Tensor:
        """The first `used` slots (B, Hkv, used, D); a view where they are kept as they are."""
        values = self.values[:, :, :used]
        if self.scales is None:
            return values
        return from_bytes(values, self.scales[:, :, :used]).to(self.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.values] if self.scales is None else [self.values, self.scales]


def to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> int8 codes (..., D) and scales (..., D / 32) in bfloat16; x ≈ code * scale."""
    grouped = x.float().reshape(*x.shape[:-1], -1, SCALED)
    # Rounded before the codes are chosen, so that the codes make up for it.
    scales = (grouped.abs().amax(-1) / 127).to(torch.bfloat16)
    wide = scales.float()[..., None]
    inverse = torch.where(wide >= torch.finfo(torch.float32).tiny, 1 / wide, 0)
    codes = (grouped * inverse).round_().clamp_(-127, 127)
    return codes.flatten(-2).to(torch.int8), scales


def from_bytes(codes: Tensor, scales: Tensor) -> Tensor:
    """The values, in float32, of what `to_bytes` made."""
    grouped = codes.float().reshape(*codes.shape[:-1], -1, SCALED)
    values: Tensor = (grouped * scales.float()[..., None]).flatten(-2)
    return values
