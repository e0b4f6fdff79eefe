"""One row of activations as products read it: as it is, and in whole numbers.

What it is: the row itself, for what torch multiplies; and as whole numbers of 16 bits, each word of
eight columns with a scale of its own, for the kernels. A number's two halves lie apart, as bytes,
which tensor cores multiply by those of codes (tensor_core.py). Two bytes lose next to nothing,
2^-16 of a word's greatest; bfloat16 loses 2^-9 of each. What it is not: for several rows, which
tensor cores multiply in bfloat16.
"""

from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.card import WARPS
from m1local.cuda.matrix import BLOCK, MOST_WHOLE, WORD
from m1local.cuda.overlap import begun_early, settled
from m1local.cuda.tensor_core import WARP_ROWS

MOST = MOST_WHOLE
ROUNDED = 1024  # columns of a program
SQUARED = 2 * WARP_ROWS  # columns whose squares are summed, as one_row.py adds rows

_WORD, _MOST = tl.constexpr(WORD), tl.constexpr(MOST)
_HALVES = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds, ties to even


@triton.jit
def store_row(
    natural, halves, scales, first, end, value, columns,
    N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the columns from `first` to `end`, `value` (N,) float32: whole words, if WHOLE."""
    at = first + tl.arange(0, N)
    narrow = value.to(natural.dtype.element_ty)
    tl.store(natural + at, narrow, mask=at < end)
    if WHOLE:
        value = tl.where(at < end, value, 0.0)
        words, column = tl.reshape(value, (N // _WORD, _WORD)), tl.arange(0, _WORD)[None, :]
        word = first // _WORD + tl.arange(0, N // _WORD)
        here = word * _WORD < end
        scale, whole = _rounded(words)
        tl.store(scales + word, scale, mask=here)
        tl.store(scales + columns // _WORD + word, scale * tl.sum(whole, 1), mask=here)
        word, here = word[:, None], here[:, None]
        _store_halves(halves + word * _WORD + column, whole, columns, here)
        # Even columns before odd ones, as they come out of a word of eight nibbles.
        place = word * _WORD + column % 2 * 4 + column // 2
        _store_halves(halves + 2 * columns + place, whole, columns, here)


@triton.jit
def _rounded(words):
    """Each word's scale, and its columns as whole numbers; see `Activation`."""
    greatest = tl.max(tl.abs(words), 1)
    usable = greatest > 1e-30
    inverse = tl.where(usable, tl.div_rn(_MOST * 1.0, tl.where(usable, greatest, 1.0)), 0.0)
    whole = ((words * inverse[:, None] + _HALVES) - _HALVES).to(tl.int32)
    # What is not a number stays none.
    return greatest / _MOST + 0.0 * tl.sum(words, 1), whole


@triton.jit
def _store_halves(halves, whole, columns, here):
    upper = (whole + 128) >> 8
    tl.store(halves, upper.to(tl.int8), mask=here)
    tl.store(halves + columns, (whole - upper * 256).to(tl.int8), mask=here)


@triton.jit
def round_kernel(
    x, natural, halves, scales, columns,
    N: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x (K,) as products read it."""
    settled(OVERLAP)
    first = tl.program_id(0) * N
    at = first + tl.arange(0, N)
    value = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
    store_row(natural, halves, scales, first, columns, value, columns, N, WHOLE)


class Activation:
    """One row of activations (1, K).

    `natural` (1, K) is of the type of activations. `halves` (2, 2, K) int8: the numbers' upper and
    lower halves, in the order of columns, and again with the even columns of each word first; x =
    scale * (256 * upper + lower). `scales` (2, K / 8) float32: each word's scale, and the sum of
    its columns. The last two are empty where the columns are no blocks of 32, which no kernel
    takes. `squares` (K / 16), of a row that is still to be divided by its root mean square with
    `eps`, are the sums of sixteen columns each (one_row.py, `added_product`), else empty.
    """

    def __init__(
        self,
        columns: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        eps: float | None = None,
    ) -> None:
        """Allocate all, with `squares` if there is an `eps`."""
        self.natural = torch.zeros((1, columns), dtype=dtype, device=device)
        self.whole = columns % BLOCK == 0
        kept = columns if self.whole else 0
        self.halves = torch.zeros((2, 2, kept), dtype=torch.int8, device=device)
        self.scales = torch.zeros((2, kept // WORD), device=device)
        self.eps = eps or 0.0
        self.squares = torch.zeros(0 if eps is None else kept // SQUARED, device=device)

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """x (1, K)."""
        made = cls(x.shape[1], dtype=x.dtype, device=x.device)
        made.fill(x)
        return made

    def fill(self, x: Tensor) -> None:
        """Become x (1, K); it may be `natural` itself."""
        columns = x.shape[1]
        round_kernel[(triton.cdiv(columns, ROUNDED),)](
            x, *self.tensors, columns,
            N=ROUNDED, WHOLE=self.whole, num_warps=WARPS, **begun_early(x.device),
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order in which every kernel takes them."""
        return self.natural, self.halves, self.scales
