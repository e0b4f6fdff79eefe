"""A few tokens through a whole model on the CPU, in one call of the compiled library (step.c).

What it is: the pointers of a model's weights and of its cache, gathered once, and buffers for what
lies between; the bits are those of the model's own forward pass, its oracle in
tests/test_native_step.py, without the time that Python and torch take around sixty products. What
it is not: for prompts, for layers on a card, or for weights in formats the library does not read.
"""

import ctypes

import torch
from torch import Tensor

from m1local.cache import RAW_TOKENS, KVCache, LayerCache
from m1local.formats.base import QuantizedLinear
from m1local.model import M1Layer, M1Model, RMSNorm
from m1local.native.attention import KINDS
from m1local.native.library import address, library
from m1local.native.matmul import Matrix

ROWS = 4  # tokens at a time: the products sum so many as they sum one
MEANWHILE_BYTES = 4 << 20  # for attention by many threads; where that is too little, it allocates
TYPES = (torch.bfloat16, torch.float32)


class _Layer(ctypes.Structure):
    """`Layer` of common.h."""

    _fields_ = (
        *((name, Matrix) for name in ("packed", "out", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "post_norm", "taps_k", "taps_v")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "raw_k", "raw_v")),
        *((name, ctypes.c_void_p) for name in ("k_scales", "v_scales", "cos", "sin")),
        ("key_positions", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "width", "slots", "window")),
    )


class _Step(ctypes.Structure):
    """`Step` of common.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("norm", "x", "normed", "packed", "q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("product", "gate", "up", "positions", "room")),
        *((name, ctypes.c_int64) for name in ("room_bytes", "layer_count", "hidden", "raw_slots")),
        *((name, ctypes.c_int32) for name in ("is_wide", "kind")),
        ("eps", ctypes.c_float),
    )


class _NotServedError(Exception):
    """The library cannot read this model."""


class CompiledStep:
    """Reads up to `ROWS` tokens at a time into one cache, which it keeps the books of."""

    most = ROWS

    def __init__(self, model: M1Model, cache: KVCache) -> None:
        """Gather the pointers; raises _NotServedError where the library cannot read them."""
        compiled, weight = library(), model.model.norm.weight
        if compiled is None or weight.dtype not in TYPES or weight.device.type != "cpu":
            raise _NotServedError
        self._compiled, self.model, self.cache = compiled, model, cache
        self._dtype = weight.dtype
        self._held: list[Tensor] = []  # as long as their addresses are used
        self._turns: dict[int, Tensor] = {}  # (2, ROWS, D/2) cosines and sines by width
        self._positions: dict[int, Tensor] = {}
        blocks = [block for block in model.model.layers if isinstance(block, M1Layer)]
        layers = [self._layer(*pair) for pair in zip(blocks, cache.layers, strict=True)]
        self._layers = (_Layer * len(layers))(*layers)
        self._x = self._room(model.config.hidden_size)
        self._step = self._gather()

    @classmethod
    def of(cls, model: M1Model, cache: KVCache) -> "CompiledStep | None":
        """One for this model and cache; None where the library cannot read them."""
        try:
            return cls(model, cache)
        except _NotServedError:
            return None

    def read(self, token_ids: list[int], *, last_only: bool) -> Tensor | None:
        """Append 1 to `ROWS` tokens; returns logits (1 or T, V) in float32.

        None where there was no memory; then nothing counts as read. Raises ContextLengthError
        where they do not fit.
        """
        rows, position = len(token_ids), self.cache.position
        self.cache.check_room(rows)
        backbone = self.model.model
        self._x[:rows] = backbone.embed_tokens(torch.tensor(token_ids))
        chunk = backbone.chunk(position, rows, self._x.device)
        for width, (cos, sin) in self._turns.items():
            cos[:rows], sin[:rows] = chunk.rotations[width]
        for layer in self.cache.layers:
            layer.restore_raw(position)
            layer.note(position + rows)
        first = rows - 1 if last_only else 0
        logits = torch.empty(rows - first, self.model.config.vocab_size, dtype=self._dtype)
        done = self._compiled.m1_step(
            ctypes.byref(self._step), ctypes.c_int64(position), ctypes.c_int64(rows),
            ctypes.c_int64(first), address(logits), torch.get_num_threads(),
        )  # fmt: skip
        if not done:
            return None
        self.cache.advance(rows)
        return logits.float()

    def _layer(self, block: M1Layer, kept: LayerCache) -> _Layer:
        attention, mlp, layout = block.self_attn, block.mlp, kept.layout
        if kept.raw_k.dtype != self._dtype or kept.k.values.dtype not in KINDS:
            raise _NotServedError
        if kept.raw_k.shape[0] != 1 or kept.raw_k.device.type != "cpu":
            raise _NotServedError
        turns = torch.zeros(2, ROWS, layout.head_dim // 2)
        cos, sin = self._turns.setdefault(layout.head_dim, turns)
        slots = torch.zeros(kept.slots, dtype=torch.int64)
        positions = self._positions.setdefault(kept.slots, slots)
        linears = attention.W_pack, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        return _Layer(
            *map(self._matrix, linears),
            self._norm(block.input_layernorm), self._norm(block.post_attention_layernorm),
            self._weight(attention.conv_k), self._weight(attention.conv_v),
            address(kept.k.values), address(kept.v.values),
            address(kept.raw_k), address(kept.raw_v),
            address(kept.k.scales), address(kept.v.scales), address(cos), address(sin),
            address(positions), layout.num_heads, layout.num_kv_heads, layout.head_dim,
            kept.slots, layout.window or 0,
        )  # fmt: skip

    def _gather(self) -> _Step:
        config, kept = self.model.config, self.cache.layers[0]
        hidden, inner = config.hidden_size, config.intermediate_size
        kv = max(one.layout.num_kv_heads * one.layout.head_dim for one in self.cache.layers)
        widths = [hidden, hidden + 2 * kv, hidden, kv, kv, hidden, inner, inner]
        rooms = [self._room(width) for width in widths]
        positions = torch.zeros(ROWS, dtype=torch.int64)
        meanwhile = torch.empty(MEANWHILE_BYTES + 16 * ROWS * inner, dtype=torch.uint8)
        self._held += [*rooms, positions, meanwhile]
        return _Step(
            self._layers, self._matrix(self.model.lm_head), self._norm(self.model.model.norm),
            address(self._x), *map(address, rooms), address(positions),
            address(meanwhile), meanwhile.nbytes, len(self._layers), hidden, RAW_TOKENS,
            self._dtype == torch.float32, KINDS[kept.k.values.dtype], config.rms_norm_eps,
        )  # fmt: skip

    def _room(self, width: int) -> Tensor:
        return torch.zeros(ROWS, width, dtype=self._dtype)

    def _matrix(self, module: torch.nn.Module) -> Matrix:
        found = module.compiled_matrix() if isinstance(module, QuantizedLinear) else None
        if found is None:
            raise _NotServedError
        return found

    def _norm(self, norm: RMSNorm) -> ctypes.c_void_p:
        return self._weight(norm.weight)

    def _weight(self, weight: Tensor) -> ctypes.c_void_p:
        """A weight as the library reads it, held as long as this is."""
        if weight.dtype != self._dtype:
            raise _NotServedError
        self._held.append(weight.detach().contiguous())
        return address(self._held[-1])
