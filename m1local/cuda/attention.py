"""Attention of one row over a global or ring cache, in Triton, split over the keys.

What it is: a kernel in which each program looks at a part of the keys of one kv head, for all query
heads that read it, and a second one that joins the parts (the softmax of a part is known up to its
greatest score). Each program turns its queries itself (heads.py), which costs less than a kernel
before it, and the one whose part ends with the newest key stores it. The visible positions of a
ring lie one after another around it, so keys that a window has left behind are not read. What it is
not: for several rows of queries.
Source: the online softmax of arXiv 1805.02867, split as in arXiv 2311.01282.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1local.cache import LayerCache
from m1local.cuda.activation import Activation, store_row
from m1local.cuda.ahead import ask_ahead, following
from m1local.cuda.card import card
from m1local.cuda.heads import place_newest, turned_rows
from m1local.cuda.kept import head_of, load_kept, pointers
from m1local.cuda.matrix import WORD, Matrix
from m1local.cuda.overlap import begun_early, settled

LEAST_DOT = 16  # rows that the tensor cores take
JOIN_WARPS = 8  # 64 parts of 256 values lie in registers
EVERYTHING = 2**30  # a window that no position leaves


@triton.jit
def attend_kernel(
    packed, packed_parts, k, v, raw, taps, turn, position_at, partial, greatest, sums,
    then, heads, width, slots, window, scale,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    BYTES: tl.constexpr, WARPS: tl.constexpr, SMALL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Part `program 1` of the keys of kv head `program 0`, for its GROUP query heads.

    The part with the newest key puts it, and its value, into the cache first.
    """
    settled(OVERLAP)
    kv_head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kv_heads = tl.num_programs(0)
    position = tl.load(position_at).to(tl.int32)
    end = position + 1
    seen = tl.minimum(end, window)
    each = tl.cdiv(tl.cdiv(seen, parts), KEYS) * KEYS
    begin = end - seen + part * each
    stop = tl.minimum(begin + each, end)

    row = tl.arange(0, GROUP_ROWS)
    inside = tl.arange(0, WIDTH)
    head = kv_head * GROUP + row
    here = (row < GROUP)[:, None] & (inside < width)[None, :]
    most = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    out = part * heads + head
    if begin < stop:
        product = packed, packed_parts, (heads + 2 * kv_heads) * width
        keys = head_of(k[0], k[1], kv_head, slots, width, BYTES)
        values = head_of(v[0], v[1], kv_head, slots, width, BYTES)
        if stop == end:
            place_newest(
                product, turn, raw, taps, keys, values, kv_head, heads, kv_heads,
                position, position % slots, width, WIDTH, BYTES,
            )  # fmt: skip
            tl.debug_barrier()  # all threads will read what some have stored
        query = turned_rows(product, turn, head, here, width, WIDTH).to(raw[0].dtype.element_ty)
        most, total, mixed = _looked(
            query, keys, values, raw[0], begin, stop, slots, width, scale,
            GROUP_ROWS, WIDTH, KEYS, BYTES,
        )  # fmt: skip
        # Nobody reads what a part without keys has mixed.
        tl.store(partial + out[:, None] * width + inside[None, :], mixed, mask=here)
    if not SMALL:
        ask_ahead(then, WARPS)
    tl.store(greatest + out, most, mask=row < GROUP)
    tl.store(sums + out, total, mask=row < GROUP)


@triton.jit
def _looked(
    query, k, v, like, begin, stop, slots, width, scale,
    GROUP_ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """What the queries see from `begin` to `stop`: greatest score, sum and mixed values of each."""
    most = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    mixed = tl.zeros((GROUP_ROWS, WIDTH), tl.float32)
    for key in range(begin, stop, KEYS):
        place = key + tl.arange(0, KEYS)
        here = place < stop
        slot = place % slots
        keys = load_kept(k[0], k[1], slot, here, width, like, KEYS, WIDTH, BYTES)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(here[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(most - higher)
        total = total * shrunk + tl.sum(weights, 1)
        values = load_kept(v[0], v[1], slot, here, width, like, KEYS, WIDTH, BYTES)
        mixed = mixed * shrunk[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        most = higher
    return most, total, mixed


@triton.jit
def join_kernel(
    partial, greatest, sums, natural, halves, scales, heads, width, parts,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query head."""
    settled(OVERLAP)
    head = tl.program_id(0)
    part = tl.arange(0, PARTS)
    inside = tl.arange(0, WIDTH)
    part_here = part < parts
    most = tl.load(greatest + part * heads + head, mask=part_here, other=float("-inf"))
    share = tl.exp(most - tl.max(most, 0))  # 0 for a part without keys
    total = tl.sum(share * tl.load(sums + part * heads + head, mask=part_here, other=0.0), 0)
    here = (most > float("-inf"))[:, None] & (inside < width)[None, :]  # the parts with keys
    at = (part * heads + head)[:, None] * width + inside[None, :]
    mixed = tl.sum(share[:, None] * tl.load(partial + at, mask=here, other=0.0), 0) / total
    first = head * width
    store_row(natural, halves, scales, first, first + width, mixed, heads * width, WIDTH, WHOLE)


class AttentionBuffers:
    """What the parts of one layer's attention leave for the join; layers may share it."""

    def __init__(self, heads: int, width: int, parts: int, device: torch.device) -> None:
        """Allocate for `parts` parts of `heads` heads of `width`."""
        self.partial = torch.zeros((parts, heads, width), device=device)
        self.greatest = torch.zeros((parts, heads), device=device)
        self.sums = torch.zeros((parts, heads), device=device)


def buffers(layer: LayerCache) -> AttentionBuffers:
    """Buffers for the attention of `layer` on its device."""
    layout, device = layer.layout, layer.raw_k.device
    parts = card(device).key_parts(layout.num_kv_heads)
    return AttentionBuffers(layout.num_heads, layout.head_dim, parts, device)


def attend(
    packed: Tensor,
    layer: LayerCache,
    taps: tuple[Tensor, Tensor],
    turn: tuple[Tensor, Tensor],
    position: Tensor,
    kept: AttentionBuffers,
    out: Activation,
    *,
    then: tuple[Matrix, ...] = (),
) -> None:
    """`out` (H * D) becomes the attention of a token at `position` (1,) over `layer` and itself.

    `packed` (parts, C + 2 * Hkv * D) is the product that holds its q, k and v; `taps` those of k
    and v, (1, 1, Hkv, 1, 2); `turn` the cosine and sine (1, D / 2) of the position; `then` is what
    is read next (ahead.py).
    """
    layout = layer.layout
    group, width = layout.num_heads // layout.num_kv_heads, layout.head_dim
    padded = max(LEAST_DOT, triton.next_power_of_2(width))
    parts, in_bytes = kept.sums.shape[0], layer.k.scales is not None
    tiles = card(packed.device).tiles.over(in_bytes=in_bytes)
    attend_kernel[(layout.num_kv_heads, parts)](
        packed, packed.shape[0], pointers(layer.k), pointers(layer.v),
        (layer.raw_k, layer.raw_v), taps, tuple(turn), position,
        kept.partial, kept.greatest, kept.sums,
        following(then, packed),
        layout.num_heads, width, layer.slots, layout.window or EVERYTHING, width**-0.5,
        GROUP=group, GROUP_ROWS=max(LEAST_DOT, triton.next_power_of_2(group)),
        WIDTH=padded, KEYS=tiles.keys, BYTES=in_bytes, WARPS=tiles.key_warps,
        num_warps=tiles.key_warps,
        SMALL=card(packed.device).has_small_pieces, **begun_early(packed.device),
    )  # fmt: skip
    whole = out.whole and width % WORD == 0  # no word lies in two heads
    join_kernel[(layout.num_heads,)](
        kept.partial, kept.greatest, kept.sums, *out.tensors, layout.num_heads, width, parts,
        PARTS=triton.next_power_of_2(parts), WIDTH=padded, WHOLE=whole,
        num_warps=JOIN_WARPS, **begun_early(packed.device),
    )  # fmt: skip
    if out.whole and not whole:
        out.fill(out.natural)
