"""What a chunk of a prompt takes while it is read, beside weights and cache.

What it is: the bytes of the fullest moment of m1local/model.py's forward pass, from the shapes
alone: in attention, while heads are turned, or in the MLP; on the CPU, on a card by kernels, and on
a card by torch's own operators. What it is not: the plan (memory.py).
Checked by tests/test_memory.py and tests/test_cuda_memory.py, which count every operator's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m1local.cache import LayerCache
from m1local.config import M1Config
from m1local.cuda.card import restored_weights
from m1local.formats.base import FLOAT32_BYTES, ROWS_PER_SLICE, SLICE_COPIES
from m1local.grouped import SCORES
from m1local.kv_store import FLOAT
from m1local.native import matmul

MASK_BYTES = 8 + 1 + 1 + 1  # a query and a key: distance, visible, within the window, both
KEPT_COPIES = 3  # keys, the same scaled, and values, in float32


@dataclass(frozen=True, slots=True)
class Workspace:
    """What must be known of a model, its caches, and where it computes.

    `kernels`: whether those of m1local/cuda serve on a card; `restored`: bytes for parts of a
    matrix where they do not, 0 of a model that is not quantized.
    """

    config: M1Config
    caches: Sequence[LayerCache]
    chunk: int  # tokens
    dtype: torch.dtype
    device: torch.device
    kernels: bool
    restored: int

    @property
    def nbytes(self) -> int:
        """Of the fullest moment, and of the logits."""
        residual_and_normed = 2 * self.config.hidden_size * self.dtype.itemsize
        fullest = max(self._attention(), self._turning(), self._mlp())
        head = self.config.vocab_size * (self.dtype.itemsize + 2 * FLOAT32_BYTES)
        return self.chunk * residual_and_normed + fullest + head

    @property
    def slices(self) -> int:
        """Bytes of the weights that are restored at a time for the many rows of a chunk."""
        if not self.restored:
            return 0
        if self.on_card:
            by_kernels = restored_weights(self.device) * self.dtype.itemsize
            return by_kernels if self.kernels else self.restored
        if self.chunk <= matmul.ROWS and matmul.usable():
            return 0
        widest = max(self.config.hidden_size, self.config.intermediate_size)
        return ROWS_PER_SLICE * widest * SLICE_COPIES * FLOAT32_BYTES

    @property
    def on_card(self) -> bool:
        """Whether `device` is one."""
        return self.device.type == "cuda"

    def _attention(self) -> int:
        row = (2 * self._packed + self.config.hidden_size) * self.dtype.itemsize
        return self.chunk * row + (0 if self.kernels and self.on_card else self._seen())

    def _seen(self) -> int:
        """Keys and values that torch's operators restore, masks, and scores where they are kept."""
        kept = max(
            each.slots * each.layout.num_kv_heads * each.layout.head_dim for each in self.caches
        )
        in_bytes = self.caches[0].kv_type != FLOAT
        if self.on_card:  # grouped.py asks few queries at a time
            restored = 2 * self.dtype.itemsize if in_bytes else 0
            return kept * (KEPT_COPIES * FLOAT32_BYTES + restored) + SCORES * FLOAT32_BYTES
        slots = max(each.slots for each in self.caches)
        mask = self.chunk * slots * (MASK_BYTES + self.dtype.itemsize)
        return mask + (kept * 2 * (self.dtype.itemsize + FLOAT32_BYTES) if in_bytes else 0)

    def _turning(self) -> int:
        if self.kernels and self.on_card:  # cuda/rows.py takes heads alone, fewer than `_attention`
            return 0
        turned = 3 * self.config.hidden_size * FLOAT32_BYTES
        return self.chunk * (self._packed * self.dtype.itemsize + turned)

    def _mlp(self) -> int:
        """Gate, up and their product; by torch on a card silu too, while nothing is restored."""
        width, inner = self.config.hidden_size, self.config.intermediate_size
        row = self.chunk * self.dtype.itemsize
        if not self.on_card:
            return row * 3 * inner + self.slices
        silu = 0 if self.kernels else row * inner
        return row * (2 * width + 3 * inner) + max(silu, self.slices)

    @property
    def _packed(self) -> int:
        """Values of q, k and v of one token, in the layer that has the most."""
        layouts = [each.layout for each in self.caches]
        return self.config.hidden_size + max(2 * at.num_kv_heads * at.head_dim for at in layouts)
