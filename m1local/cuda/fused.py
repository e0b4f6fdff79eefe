"""What lies between two products of a decode step, in Triton: one kernel each.

What it is: residual sum and RMSNorm, and SiLU times up. Each sums the parts of the product before
it while it reads them, and writes activations as products read them
(activation.py). What it is not: for several rows; prefill goes through m1local/model.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from m1local.cuda.activation import Activation, store_row
from m1local.cuda.card import WARPS
from m1local.cuda.matrix import WORD
from m1local.cuda.overlap import begun_early, settled

NORM_WARPS = 16
BLOCK = 1024


@triton.jit
def sum_parts(partial, at, parts, stride, here):
    """Sum over the parts of a product at the places `at`, in float32."""
    total = tl.zeros(at.shape, tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * stride + at, mask=here, other=0.0).to(tl.float32)
    return total


@triton.jit
def norm_kernel(
    x, partial, weight, natural, halves, scales, parts, columns, eps,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x (C,) += the product; then its norm, times weight."""
    settled(OVERLAP)
    at = tl.arange(0, BLOCK)
    here = at < columns
    value = tl.load(x + at, mask=here, other=0.0) + sum_parts(partial, at, parts, columns, here)
    tl.store(x + at, value, mask=here)
    mean = tl.sum(value * value, 0) / columns
    scaled = value * (1 / tl.sqrt_rn(mean + eps))
    scaled *= tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    store_row(natural, halves, scales, 0, columns, scaled, columns, BLOCK, WHOLE)


@triton.jit
def silu_up_kernel(
    gate, gate_parts, up, up_parts, natural, halves, scales,
    columns, BLOCK: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up."""
    settled(OVERLAP)
    first = tl.program_id(0) * BLOCK
    at = first + tl.arange(0, BLOCK)
    here = at < columns
    opened = sum_parts(gate, at, gate_parts, columns, here)
    value = opened * tl.sigmoid(opened) * sum_parts(up, at, up_parts, columns, here)
    store_row(natural, halves, scales, first, columns, value, columns, BLOCK, WHOLE)


def add_and_norm(
    x: Tensor, product: Tensor | None, weight: Tensor, eps: float, out: Activation
) -> None:
    """x (C,) float32 += product (parts, C); `out` becomes its RMSNorm."""
    columns = x.shape[0]
    parts = 0 if product is None else product.shape[0]
    norm_kernel[(1,)](
        x, x if product is None else product, weight, *out.tensors, parts, columns, eps,
        BLOCK=max(WORD, triton.next_power_of_2(columns)), WHOLE=out.whole,
        num_warps=NORM_WARPS, **begun_early(x.device),
    )  # fmt: skip


def silu_up(gate: Tensor, up: Tensor, out: Activation) -> None:
    """`out` becomes silu(gate) * up, each (parts, I)."""
    columns = gate.shape[1]
    silu_up_kernel[(triton.cdiv(columns, BLOCK),)](
        gate, gate.shape[0], up, up.shape[0], *out.tensors, columns,
        BLOCK=BLOCK, WHOLE=out.whole, num_warps=WARPS, **begun_early(gate.device),
    )  # fmt: skip
