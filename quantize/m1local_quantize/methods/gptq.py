"""gptq: each column's rounding error is made up for by the columns not yet rounded.

What it is: Frantar et al., "GPTQ" (arXiv 2210.17323), in its usual form: a damped Hessian of the
layer's inputs, columns in the order of falling activation, error feedback through the Cholesky
factor of the inverse, in blocks. Scale and zero of every group are `refit`'s, fixed beforehand, so
that the order of columns does not change what is stored. What it is not: data-free; it needs inputs
(m1local_quantize/calibration.py), and is only as good as these.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m1local.formats import LinearSpec
from m1local.formats.base import inverse_of
from m1local.formats.groups import group_class, group_size_of, rounded
from m1local_quantize.methods import refit

if TYPE_CHECKING:
    from m1local_quantize.methods import QuantizeRows

DAMPING = 0.01  # of the mean of the diagonal; ten times as much where the factorization fails
# More where inputs are few, or the errors on other texts would grow: so much where they are as many
# as the columns. Found on m1-tiny, where 638 tokens for 384 columns want 0.1 to 1.
SCARCITY = 0.3
TILE = 1024  # rows that are inverted, or moved, at once
BLOCK = 128  # columns whose feedback to the rest is one matrix product
ROWS_PER_SLICE = 2048  # rows are independent; more at once means fewer small operations


def prepare(hessian: Tensor, inputs: int | None = None) -> "QuantizeRows":
    """From X^T X (K, K) of a matrix' inputs to the function that quantizes its rows (n, K).

    `inputs` is how many there were; without it they are taken to be plenty.
    """
    damping = DAMPING
    if inputs is not None:
        damping = max(DAMPING, SCARCITY * hessian.shape[0] / inputs)
    order = torch.argsort(hessian.diagonal(), descending=True)
    hessian = hessian[order]  # the one given is let go, if nobody else holds it
    hessian = hessian[:, order]
    factor = inverse_factor(hessian, damping)
    del hessian

    def quantize(rows: Tensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        return quantize_ordered(rows, spec, order, factor)

    return quantize


def inverse_factor(hessian: Tensor, share: float = DAMPING) -> Tensor:
    """The upper Cholesky factor (K, K) of the inverse of `hessian`, which is lost.

    Where H = R R^T and R is upper triangular, that is R^-1; and R is the usual lower factor L of
    H with rows and columns in reverse, reversed. Of matrices of this size one is held beside
    `hessian`: 1.2 GB for the 14B's largest.
    """
    diagonal = hessian.diagonal()
    damping = share * float(diagonal.mean()) or 1.0
    # A column whose input is always zero: its weight is free, and must not stop the factorization.
    diagonal[diagonal == 0] = 1.0
    reverse_(hessian)
    while True:
        diagonal.add_(damping)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            break
        damping *= 10
    hessian.copy_(lower)
    del lower
    invert_lower_(hessian)
    reverse_(hessian)
    return hessian


def reverse_(matrix: Tensor) -> None:
    """Turn the order of rows and columns of a matrix (K, K) round, in place."""
    size = matrix.shape[0]
    for start in range(0, (size + 1) // 2, TILE):
        stop = min(start + TILE, (size + 1) // 2)
        top, bottom = matrix[start:stop], matrix[size - stop : size - start]
        turned = top.flip((0, 1))
        top.copy_(bottom.flip((0, 1)))
        bottom.copy_(turned)


def invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix (K, K) in place: rows of tiles, each by those above it."""
    for start in range(0, lower.shape[0], TILE):
        rows = lower[start : start + TILE]
        corner = rows[:, start : start + TILE]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner)), upper=False)
        rows[:, :start] = -inverse @ (rows[:, :start] @ lower[:start, :start])
        corner.copy_(inverse)


def quantize_ordered(
    rows: Tensor, spec: LinearSpec, order: Tensor, factor: Tensor
) -> dict[str, Tensor]:
    """Quantize rows (n, K) to groups, column by column in `order`."""
    size, chosen = group_size_of(spec), group_class(spec)
    wide = rows.float()
    scales, zeros = (
        rounded(part) for part in refit.fit(wide.reshape(wide.shape[0], -1, size), chosen)
    )
    groups = order // size
    # (n, K) in the order of work; what is stored of each column's group.
    scale, zero = scales.float()[:, groups], zeros.float()[:, groups]
    inverse = inverse_of(scale)
    work = wide[:, order]
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for column in range(start, stop):
            w = work[:, column]
            code = ((w - zero[:, column]) * inverse[:, column]).round_()
            code.clamp_(-chosen.middle, chosen.highest - chosen.middle)
            codes[:, column] = code
            restored = code * scale[:, column] + zero[:, column]
            error = (w - restored) / factor[column, column]
            work[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    stored = torch.empty_like(codes, dtype=torch.uint8)
    stored[:, order] = (codes + chosen.middle).to(torch.uint8)
    return {**chosen.pack(stored), "scales": scales, "zeros": zeros}
