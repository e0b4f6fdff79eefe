"""What lies between two products of a decode step, in Triton: one kernel each.

What it is: residual sum and RMSNorm; the split of q, k and v with the short convolution, RoPE and
the writing of the cache; SiLU times up. Each sums the parts of the product before it while it reads
them, and writes activations in all the orders in which products read them (activation.py). What it
is not: for several rows; prefill goes through m1local/model.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from m1local.cache import RAW_TOKENS, LayerCache
from m1local.cuda.activation import Activation, store_row
from m1local.cuda.card import WARPS
from m1local.cuda.kept import pointers, store_kept
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
    x, partial, weight, natural, planes, halves, scales, parts, columns, eps,
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
    store_row(natural, planes, halves, scales, 0, columns, scaled, columns, BLOCK, WHOLE)


@triton.jit
def silu_up_kernel(
    gate, gate_parts, up, up_parts, natural, planes, halves, scales,
    columns, BLOCK: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up."""
    settled(OVERLAP)
    first = tl.program_id(0) * BLOCK
    at = first + tl.arange(0, BLOCK)
    here = at < columns
    opened = sum_parts(gate, at, gate_parts, columns, here)
    value = opened * tl.sigmoid(opened) * sum_parts(up, at, up_parts, columns, here)
    store_row(natural, planes, halves, scales, first, columns, value, columns, BLOCK, WHOLE)


@triton.jit
def _raw_and_mixed(fresh, raw, taps, head, inside, here, position, width, RAW: tl.constexpr):
    """Remember a head's values before the convolution; return them after it, in float32."""
    kept = raw + head * (RAW * width) + inside
    value = fresh.to(raw.dtype.element_ty)
    before = tl.load(kept + (position + RAW - 1) % RAW * width, mask=here, other=0.0)
    before = before.to(tl.float32) * (position > 0)
    tl.store(kept + position % RAW * width, value, mask=here)
    first = tl.load(taps + 2 * head).to(tl.float32)
    second = tl.load(taps + 2 * head + 1).to(tl.float32)
    return first * before + second * value.to(tl.float32)


@triton.jit
def place_kernel(
    packed, parts, q_out, k_cache, k_scales, v_cache, v_scales, raw_k, raw_v, taps_k, taps_v,
    cos, sin, position_at, heads, kv_heads, width, slots,
    RAW: tl.constexpr, WIDTH: tl.constexpr, BYTES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v: (H + 2 * Hkv) programs; the new key and value go into their slot."""
    settled(OVERLAP)
    head = tl.program_id(0)
    position = tl.load(position_at).to(tl.int32)
    stride = (heads + 2 * kv_heads) * width
    half = width // 2
    inside = tl.arange(0, WIDTH)
    here = inside < width
    low = inside < half
    partner = tl.where(low, inside + half, inside - half)  # what it is turned with
    value = sum_parts(packed, head * width + inside, parts, stride, here)
    other = sum_parts(packed, head * width + partner, parts, stride, here)
    angle = tl.where(low, inside, inside - half)
    turn_cos = tl.load(cos + angle, mask=here, other=0.0)
    turn_sin = tl.load(sin + angle, mask=here, other=0.0)
    turn_sin = tl.where(low, -turn_sin, turn_sin)
    if head < heads:
        turned = value * turn_cos + other * turn_sin
        kind = q_out.dtype.element_ty
        tl.store(q_out + head * width + inside, turned.to(kind), mask=here)
    else:
        kv_head = head - heads
        raw, taps, target, scales = raw_k, taps_k, k_cache, k_scales
        if kv_head >= kv_heads:
            kv_head -= kv_heads
            raw, taps, target, scales = raw_v, taps_v, v_cache, v_scales
            turn_cos, turn_sin = turn_cos * 0.0 + 1.0, turn_sin * 0.0
        # Of a pair each is stored twice, as the same.
        value = _raw_and_mixed(value, raw, taps, kv_head, inside, here, position, width, RAW)
        other = _raw_and_mixed(other, raw, taps, kv_head, partner, here, position, width, RAW)
        turned = tl.where(here, value * turn_cos + other * turn_sin, 0.0)
        slot = kv_head * slots + position % slots
        store_kept(target, scales, slot, turned, width, WIDTH, BYTES)


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


def place(
    packed: Tensor,
    q: Tensor,
    layer: LayerCache,
    taps: tuple[Tensor, Tensor],
    turn: tuple[Tensor, Tensor],
    position: Tensor,
) -> None:
    """Split the product (parts, C + 2 * Hkv * D): q (H * D) turned, key and value into the cache.

    `taps` of k and v, (1, 1, Hkv, 1, 2); `turn` the cosine and sine (1, D / 2) of `position` (1,).
    """
    heads, kv_heads = layer.layout.num_heads, layer.layout.num_kv_heads
    width = layer.layout.head_dim
    place_kernel[(heads + 2 * kv_heads,)](
        packed, packed.shape[0], q, *pointers(layer.k), *pointers(layer.v),
        layer.raw_k, layer.raw_v, *taps, *turn,
        position, heads, kv_heads, width, layer.slots,
        RAW=RAW_TOKENS, WIDTH=triton.next_power_of_2(width),
        BYTES=layer.k.scales is not None, num_warps=1, **begun_early(q.device),
    )  # fmt: skip
