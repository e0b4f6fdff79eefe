"""The KV cache: what the model remembers of the tokens it has seen.

What it is: per layer one buffer of convolved (and rotated) keys and values, and the last few keys
and values from *before* the short convolution, which the next token needs. The token at position p
lies in slot p % slots. A global layer has a slot for every position, so it never wraps; a sliding
layer has just enough for its window and one chunk, and wraps: a ring.
What it is not: aware of text, or of who shares a prefix with whom (m1local/context.py is).

Keys are stored after RoPE, so the order inside a ring does not matter; what a query may see follows
from the position each slot holds. Rolling back needs two things: that no key in the window of the
new end was overwritten, and the raw key and value of the new last position, kept for the last
`RAW_TOKENS` positions and for every boundary that was remembered.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from m1local.config import HeadLayout, M1Config
from m1local.errors import ContextLengthError
from m1local.kv_store import FLOAT, KVStore, kind_fits

DEFAULT_MAX_CHUNK = 512
MOST_BOUNDARIES = 128  # some 64 turns; each costs a key and a value per layer
REWIND_TOKENS = 2048  # an answer of the usual length can be taken back where windows moved on
RAW_TOKENS = 16  # so 15 positions can be taken back without a remembered boundary


class RawState(NamedTuple):
    """Key and value of one position before the short convolution: (B, Hkv, 1, D) each."""

    k: Tensor
    v: Tensor


class Visible(NamedTuple):
    """What the queries of a chunk may look at: the first slots, and the position each holds."""

    k: KVStore
    v: KVStore
    positions: Tensor  # (S,) int64


class LayerCache:
    """Keys and values of one layer. Positions are handed in; `KVCache` owns where we are."""

    def __init__(
        self,
        layout: HeadLayout,
        slots: int,
        *,
        batch_size: int,
        dtype: torch.dtype,
        device: str,
        kv_type: str = FLOAT,
    ) -> None:
        """Allocate (B, Hkv, slots, D) for keys and for values, and the raw tail."""
        self.kv_type = kv_type
        self.layout = layout
        self.window = layout.window
        self.slots = slots
        self.written = 0  # one past the highest position ever stored: says what was overwritten
        self.raw_start = 0  # the raw tail holds the positions from here to the sequence's end
        shape = (batch_size, layout.num_kv_heads, slots, layout.head_dim)
        self.k = KVStore(shape, kv_type, dtype=dtype, device=device)
        self.v = KVStore(shape, kv_type, dtype=dtype, device=device)
        tail = (batch_size, layout.num_kv_heads, RAW_TOKENS, layout.head_dim)
        self.raw_k = torch.zeros(tail, dtype=dtype, device=device)
        self.raw_v = torch.zeros(tail, dtype=dtype, device=device)
        self.boundaries: dict[int, RawState] = {}

    def another(self) -> "LayerCache":
        """An empty layer of the same size."""
        return LayerCache(
            self.layout,
            self.slots,
            batch_size=self.raw_k.shape[0],
            dtype=self.raw_k.dtype,
            device=str(self.raw_k.device),
            kv_type=self.kv_type,
        )

    def raw_before(self, position: int) -> RawState:
        """Raw key and value of the token before `position`; zeros at the start of a sequence."""
        if position in self.boundaries:
            return self.boundaries[position]
        slot = (position - 1) % RAW_TOKENS
        raw = RawState(self.raw_k[:, :, slot : slot + 1], self.raw_v[:, :, slot : slot + 1])
        return raw if position > 0 else RawState(*map(torch.zeros_like, raw))

    def exchange_raw(self, position: int, k: Tensor, v: Tensor) -> RawState:
        """Keep the raw tail of a chunk (B, Hkv, T, D); return the token before `position`."""
        before = RawState(*(tensor.clone() for tensor in self.raw_before(position)))
        end = position + k.shape[2]
        self.note(end)  # first, so that an aborted pass is noticed
        kept = min(k.shape[2], RAW_TOKENS)
        slots = slots_of(end - kept, end, RAW_TOKENS, k.device)
        self.raw_k[:, :, slots] = k[:, :, -kept:]
        self.raw_v[:, :, slots] = v[:, :, -kept:]
        return before

    def note(self, end: int) -> None:
        """Keys, values and raw tail of the tokens before `end` are written, or may be soon."""
        self.written = max(self.written, end)
        self.raw_start = max(self.raw_start, end - RAW_TOKENS)

    def restore_raw(self, position: int) -> None:
        """Put the raw key and value before `position` where kernels look: in their slot."""
        if position == 0 or position in self.boundaries:
            raw, slot = self.raw_before(position), (position - 1) % RAW_TOKENS
            self.raw_k[:, :, slot : slot + 1], self.raw_v[:, :, slot : slot + 1] = raw

    def append(self, position: int, k: Tensor, v: Tensor) -> Visible:
        """Store one chunk, k and v (B, Hkv, T, D), from `position` on.

        Returns everything that its queries may look at.
        """
        end = position + k.shape[2]
        slots = slots_of(position, end, self.slots, k.device)
        self.k.write(slots, k)
        self.v.write(slots, v)
        return Visible(self.k, self.v, self.slot_positions(end))

    def slot_positions(self, end: int) -> Tensor:
        """The position each used slot holds when the sequence is `end` tokens long: (S,) int64."""
        if end <= self.slots:
            return torch.arange(end, device=self.raw_k.device)
        slots = torch.arange(self.slots, device=self.raw_k.device)
        return end - 1 - (end - 1 - slots) % self.slots

    def holds_raw(self, position: int) -> bool:
        """Whether the raw key and value of the token before `position` are known."""
        remembered = position == 0 or position in self.boundaries
        return remembered or self.raw_start < position <= self.written

    def can_end_at(self, position: int) -> bool:
        """Whether the sequence may be cut to `position` tokens and go on from there exactly."""
        oldest_needed = 0 if self.window is None else max(0, position - self.window + 1)
        overwritten = oldest_needed < self.written - self.slots
        return position == 0 or (self.holds_raw(position) and not overwritten)

    def remember(self, position: int) -> None:
        """Keep the raw state at `position`, so that a later rollback may end there."""
        raw = self.raw_before(position)
        self.boundaries[position] = RawState(raw.k.clone(), raw.v.clone())
        while len(self.boundaries) > MOST_BOUNDARIES:
            del self.boundaries[min(self.boundaries)]

    def forget_after(self, position: int) -> None:
        """Drop what belongs to tokens that are no longer part of the sequence."""
        self.raw_start = min(self.raw_start, position)
        self.boundaries = {at: raw for at, raw in self.boundaries.items() if at <= position}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, remembered boundaries included."""
        tensors = [*self.k.tensors, *self.v.tensors, self.raw_k, self.raw_v]
        tensors += [tensor for raw in self.boundaries.values() for tensor in raw]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def slots_of(start: int, end: int, count: int, device: torch.device) -> slice | Tensor:
    """Slots p % count of the positions from `start` to `end`: a slice where they follow each other.

    Returns (T,) int64 otherwise.
    """
    first = start % count
    if first + end - start <= count:
        return slice(first, first + end - start)
    return torch.arange(start, end, device=device) % count


class KVCache:
    """The cache of a whole model: one `LayerCache` per layer and the position of the next token."""

    def __init__(self, layers: Sequence[LayerCache], *, capacity: int, max_chunk: int) -> None:
        """Hold `layers` for up to `capacity` tokens, fed at most `max_chunk` at a time."""
        self.layers = layers
        self.capacity = capacity
        self.max_chunk = max_chunk
        self.position = 0

    @classmethod
    def allocate(
        cls,
        config: M1Config,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        max_chunk: int = DEFAULT_MAX_CHUNK,
        rewind_tokens: int = 0,
        batch_size: int = 1,
        kv_type: str = FLOAT,
    ) -> Self:
        """Allocate a cache for `max_length` tokens, kept as `kv_type` says (kv_store.py).

        Sliding layers keep `rewind_tokens` more than their window, so that the sequence can be cut
        back so far, as by a retry, even where the window has moved on. Raises ContextLengthError
        when `max_length` is more than the model was made for.
        """
        if not 0 < max_length <= config.max_position_embeddings:
            raise ContextLengthError(
                f"A context of {max_length} tokens is not possible: this model takes 1 to "
                f"{config.max_position_embeddings}. Choose --ctx-size in that range."
            )
        max_chunk = min(max_chunk, max_length)
        layers = []
        for layer in range(config.num_hidden_layers):
            layout = config.heads(layer)
            if not kind_fits(kv_type, layout.head_dim):
                raise ContextLengthError(
                    f"Keys of {layout.head_dim} values cannot be kept as {kv_type}; leave "
                    "--kv-type out."
                )
            slots = max_length
            if layout.window is not None:
                # A query sees window - 1 older keys; the chunk being stored must not evict them.
                slots = min(max_length, layout.window - 1 + max_chunk + rewind_tokens)
            layers.append(
                LayerCache(
                    layout,
                    slots,
                    batch_size=batch_size,
                    dtype=dtype,
                    device=device,
                    kv_type=kv_type,
                )
            )
        return cls(layers, capacity=max_length, max_chunk=max_chunk)

    def another(self) -> "KVCache":
        """An empty cache of the same size."""
        layers = [layer.another() for layer in self.layers]
        return KVCache(layers, capacity=self.capacity, max_chunk=self.max_chunk)

    def check_room(self, new_tokens: int) -> None:
        """Raise when `new_tokens` more do not fit, before anything is written."""
        if new_tokens > self.max_chunk:
            raise ValueError(f"a chunk of {new_tokens} tokens exceeds max_chunk {self.max_chunk}")
        if self.position + new_tokens > self.capacity:
            raise ContextLengthError(
                f"The context is full: {self.position} + {new_tokens} tokens exceed "
                f"{self.capacity}. Start afresh with /clear, or choose a larger --ctx-size."
            )

    def advance(self, new_tokens: int) -> None:
        """Move on by the tokens that every layer has now stored; once per forward pass."""
        self.position += new_tokens

    def remember(self, position: int) -> None:
        """Make `position`, one of the last few, a boundary that `rollback` can return to."""
        if position > self.position or not all(layer.holds_raw(position) for layer in self.layers):
            raise ValueError(f"{position} is not among the last positions of {self.position}")
        for layer in self.layers:
            layer.remember(position)

    def nearest_boundary(self, position: int) -> int:
        """The greatest position up to `position` that `rollback` can go to; 0 always can."""
        recent = range(max(0, position - RAW_TOKENS), position + 1)
        candidates = {0, *recent, *self.layers[0].boundaries}
        possible = (at for at in candidates if at <= position and self.can_rollback(at))
        return max(possible, default=0)

    def can_rollback(self, position: int) -> bool:
        """Whether the sequence may be cut to its first `position` tokens."""
        return 0 <= position <= self.position and all(
            layer.can_end_at(position) for layer in self.layers
        )

    def rollback(self, position: int) -> None:
        """Cut the sequence to its first `position` tokens; raises ValueError if it cannot."""
        if not self.can_rollback(position):
            raise ValueError(f"cannot roll back from {self.position} to {position}")
        self.position = position
        for layer in self.layers:
            layer.forget_after(position)
            if position == 0:
                layer.written = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)
