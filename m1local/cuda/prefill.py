"""Attention of a chunk of a prompt over a global or ring cache, in Triton.

What it is: tiles of queries, each with the keys it may see and an online softmax, so that neither
the scores nor a mask are ever in memory; torch's own attention would keep both, since its fast ways
take no mask together with grouped heads. What it is not: for one row; attention.py splits the keys.
Source: arXiv 2307.08691.
"""

import triton
import triton.language as tl
from torch import Tensor

from m1local.cache import LayerCache
from m1local.cuda.card import card
from m1local.cuda.kept import head_of, load_kept, pointers

LEAST_DOT = 16  # rows that the tensor cores take
EVERYTHING = 2**30  # a window that no position leaves


# Of a kind for each divisor of a prompt's place and length there would be nothing to gain.
@triton.jit(do_not_specialize=["start", "length"])
def chunk_kernel(
    q, k, k_scales, v, v_scales, out, start, length, heads, width, slots, window, scale,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """QUERIES queries from `start` + program 0 * QUERIES on, of query head `program 1`."""
    first = tl.program_id(0) * QUERIES
    head = tl.program_id(1)
    query = first + tl.arange(0, QUERIES)
    position = start + query
    inside = tl.arange(0, WIDTH)
    here = (query < length)[:, None] & (inside < width)[None, :]
    at = (head * length + query)[:, None] * width + inside[None, :]
    asked = tl.load(q + at, mask=here, other=0.0)
    most = tl.full((QUERIES,), -1e30, tl.float32)  # finite: a row may see nothing of a tile
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    k, k_scales = head_of(k, k_scales, head // GROUP, slots, width, BYTES)
    v, v_scales = head_of(v, v_scales, head // GROUP, slots, width, BYTES)
    end = tl.minimum(start + first + QUERIES, start + length)
    begin = tl.maximum(start + first - window + 1, 0)
    for key in range(begin, end, KEYS):
        place = key + tl.arange(0, KEYS)
        key_here = place < end
        slot = place % slots
        keys = load_kept(k, k_scales, slot, key_here, width, q, KEYS, WIDTH, BYTES)
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale
        distance = position[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < window) & key_here[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(most - higher)
        total = total * shrunk + tl.sum(weights, 1)
        values = load_kept(v, v_scales, slot, key_here, width, q, KEYS, WIDTH, BYTES)
        mixed = mixed * shrunk[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        most = higher
    mixed = mixed / tl.maximum(total, 1e-30)[:, None]
    at = (query * heads + head)[:, None] * width + inside[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=here)


def attend_chunk(q: Tensor, layer: LayerCache, start: int) -> Tensor:
    """Attention of q (1, H, T, D) at `start` and after it over `layer`: (1, T, H * D).

    The keys and values of the chunk must be in the cache already.
    """
    layout, length, in_bytes = layer.layout, q.shape[2], layer.k.scales is not None
    tiles = card(q.device).tiles.over(in_bytes=in_bytes)
    queries = tiles.queries_of(layout.head_dim)
    asked = q.contiguous()
    out = q.new_empty(1, length, layout.num_heads * layout.head_dim)
    grid = (triton.cdiv(length, queries), layout.num_heads)
    chunk_kernel[grid](
        asked, *pointers(layer.k), *pointers(layer.v), out, start, length,
        layout.num_heads, layout.head_dim,
        layer.slots, layout.window or EVERYTHING, layout.head_dim**-0.5,
        GROUP=layout.num_heads // layout.num_kv_heads, QUERIES=queries,
        WIDTH=max(LEAST_DOT, triton.next_power_of_2(layout.head_dim)), KEYS=tiles.keys,
        BYTES=in_bytes, num_warps=tiles.query_warps,
    )  # fmt: skip
    return out
