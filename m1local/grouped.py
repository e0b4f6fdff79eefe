"""Grouped-query attention by torch's own operators, in bounded memory.

What it is: what computes attention where none of our kernels does (m1local/native/attention.py,
m1local/cuda): which key a query may see, and torch's operator. On a card torch's thrifty kernels
take no mask together with grouped heads, and its plain way would copy the keys for every query head
and keep all scores in float32: gigabytes with a long context. So the query heads of a group become
rows of one head, and few enough queries are asked at a time. What it is not: aware of a cache.

Shapes as in model.py.
"""

from torch import Tensor
from torch.nn import functional

SCORES = 1 << 22  # of all heads that are kept at a time on a card


def visibility(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which key each query may see: (T,) and (S,) positions -> (T, S) bool.

    `window` counts the token itself: window 1 sees nothing but the query's own key.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
) -> Tensor:
    """Attention of q (B, H, T, D) over k and v (B, Hkv, S, D) -> (B, H, T, D)."""
    if q.device.type == "cpu":  # whose way keeps no scores
        mask = visibility(query_positions, key_positions, window)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return attend_in_parts(q, k, v, query_positions, key_positions, window)


def attend_in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
) -> Tensor:
    """The same, a few queries at a time; the H / Hkv heads of a group follow each other as rows."""
    batch, heads, tokens, width = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    out = q.new_empty((batch, heads, tokens, width))
    taken = queries_at_a_time(heads, len(key_positions))
    for start in range(0, tokens, taken):
        part = q[:, :, start : start + taken]
        mask = visibility(query_positions[start : start + taken], key_positions, window)
        rows = part.reshape(batch, kv_heads, group * len(mask), width)
        found = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(group, 1))
        # No view: a kernel may lay its result out by tokens.
        out[:, :, start : start + taken] = found.reshape(part.shape)
    return out


def queries_at_a_time(heads: int, keys: int) -> int:
    """How many queries of so many heads over so many keys have no more than SCORES scores."""
    return max(1, SCORES // (heads * keys))
