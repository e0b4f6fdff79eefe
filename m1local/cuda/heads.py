"""From the product of W_pack to heads: turned queries, and the new key and value in the cache.

What it is: what attention.py does before it looks at keys: it sums the parts of the product, takes
q, k and v out of it, convolves k and v with what was before them, turns q and k, and stores. What
it is not: a kernel, or for several rows; prefill goes through m1local/model.py.
"""

import triton
import triton.language as tl

from m1local.cache import RAW_TOKENS
from m1local.cuda.fused import sum_parts
from m1local.cuda.kept import store_kept

_RAW = tl.constexpr(RAW_TOKENS)


@triton.jit
def turned_rows(product, turn, head, here, width, WIDTH: tl.constexpr):
    """Heads `head` (ROWS,) of the product, turned: (ROWS, WIDTH) float32; 0 where not `here`.

    `product` is (packed, parts, stride), `turn` the cosine and sine (1, D / 2) of the position.
    """
    packed, parts, stride = product
    inside, partner = _pairs(width, WIDTH)
    first = packed + head[:, None] * width
    value, other = _both(first, inside[None, :], partner[None, :], parts, stride, here)
    turn_cos, turn_sin = _turn(turn, width, WIDTH)
    return value * turn_cos[None, :] + other * turn_sin[None, :]


@triton.jit
def place_newest(
    product, turn, raw, taps, k, v, kv_head, heads, kv_heads,
    position, slot, width, WIDTH: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The key and value of one kv head into their slot; and as they were, among the raw ones.

    `k` and `v` are values and scales of the cache from this head's on (kept.py, `head_of`).
    """
    packed, parts, stride = product
    inside, partner = _pairs(width, WIDTH)
    here = inside < width
    at = (heads + kv_head) * width
    value, other = _both(packed + at, inside, partner, parts, stride, here)
    # Of a pair each is stored twice, as the same.
    value = _raw_and_mixed(value, raw[0], taps[0], kv_head, inside, here, position, width)
    other = _raw_and_mixed(other, raw[0], taps[0], kv_head, partner, here, position, width)
    turn_cos, turn_sin = _turn(turn, width, WIDTH)
    store_kept(k[0], k[1], slot, value * turn_cos + other * turn_sin, width, WIDTH, BYTES)
    at += kv_heads * width
    value = sum_parts(packed, at + inside, parts, stride, here)
    value = _raw_and_mixed(value, raw[1], taps[1], kv_head, inside, here, position, width)
    store_kept(v[0], v[1], slot, value, width, WIDTH, BYTES)


@triton.jit
def _both(packed, inside, partner, parts, stride, here):
    """Columns and their partners, each summed over the parts of the product, in float32."""
    value = tl.zeros(here.shape, tl.float32)
    other = value
    for part in range(parts):
        value += tl.load(packed + part * stride + inside, mask=here, other=0.0).to(tl.float32)
        other += tl.load(packed + part * stride + partner, mask=here, other=0.0).to(tl.float32)
    return value, other


@triton.jit
def _pairs(width, WIDTH: tl.constexpr):
    """The columns of a head, and what each is turned with."""
    inside, half = tl.arange(0, WIDTH), width // 2
    return inside, tl.where(inside < half, inside + half, inside - half)


@triton.jit
def _turn(turn, width, WIDTH: tl.constexpr):
    """What a column is multiplied by, and what its partner is."""
    inside, half = tl.arange(0, WIDTH), width // 2
    low, here = inside < half, inside < width
    angle = tl.where(low, inside, inside - half)
    turn_sin = tl.load(turn[1] + angle, mask=here, other=0.0)
    return tl.load(turn[0] + angle, mask=here, other=0.0), tl.where(low, -turn_sin, turn_sin)


@triton.jit
def _raw_and_mixed(fresh, raw, taps, head, inside, here, position, width):
    """Remember a head's values before the convolution; return them after it, in float32."""
    kept = raw + head * (_RAW * width) + inside
    value = fresh.to(raw.dtype.element_ty)
    before = tl.load(kept + (position + _RAW - 1) % _RAW * width, mask=here, other=0.0)
    before = before.to(tl.float32) * (position > 0)
    tl.store(kept + position % _RAW * width, value, mask=here)
    first = tl.load(taps + 2 * head).to(tl.float32)
    second = tl.load(taps + 2 * head + 1).to(tl.float32)
    return first * before + second * value.to(tl.float32)
