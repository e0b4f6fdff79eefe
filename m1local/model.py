"""Baichuan-M1: the whole forward pass, read top to bottom.

What is unusual about it, in the order in which it appears below:
- Keys and values (never queries) pass a short convolution over time with two taps per kv head,
  *before* RoPE: k[t] = w0 * k_raw[t-1] + w1 * k_raw[t]. So the last raw key and value of a chunk
  are state that the next chunk needs, and belong to the cache.
- Layers alternate between global attention with few wide heads and sliding-window attention with
  many narrow ones; `M1Config.heads` says which is which.
- NormHead: the rows of lm_head are divided by their L2 norm. The loader does that once, so that
  here it is an ordinary matrix.
What it is not: aware of quantization. Linears and the embedding are swapped from outside
(m1local/formats). Parameter names are the checkpoint's tensor names.
Source: the published modeling code and arXiv 2502.12671; checked by tests/golden and
tests/reference.py.

Shapes: B batch, T new tokens, S visible slots, H query heads, Hkv key/value heads, D head width,
C hidden size, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from m1local import grouped, neighbours
from m1local.cache import KVCache, LayerCache, RawState, Visible
from m1local.config import HeadLayout, M1Config
from m1local.cuda import support
from m1local.native import attention
from m1local.native import quantize as native
from m1local.native.neighbours import HeadTurn
from m1local.rope import Rotation, rotate, rotation
from m1local.sums import halved_sum


class Chunk(NamedTuple):
    """Where the T new tokens stand: the first position, all of them (T,), and their rotations."""

    start: int
    positions: Tensor
    rotations: Mapping[int, Rotation]  # by head width: the two kinds of layer differ

    def to(self, device: torch.device) -> "Chunk":
        """The same on `device`; itself where it lies there already."""
        if self.positions.device == device:
            return self
        turns = {
            width: Rotation(turn.cos.to(device), turn.sin.to(device))
            for width, turn in self.rotations.items()
        }
        return Chunk(self.start, self.positions.to(device), turns)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, then scale by `weight` (C,)."""

    def __init__(self, size: int, eps: float) -> None:
        """Norm over the last dimension of width `size`."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C) in x's dtype."""
        if (compiled := neighbours.norm(x, self.weight, self.eps)) is not None:
            return compiled
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


def short_convolution(x: Tensor, before: Tensor, taps: Tensor) -> Tensor:
    """Mix every token with the one before it: taps[0] * x[t-1] + taps[1] * x[t].

    Shapes: x (B, Hkv, T, D); before (B, Hkv, 1, D), the token before the chunk; taps
    (1, 1, Hkv, 1, 2), raw weights without softmax.
    """
    previous = torch.cat((before, x[:, :, :-1]), dim=2)
    first, second = taps[0].unbind(-1)  # (1, Hkv, 1) each
    return first[..., None] * previous + second[..., None] * x


def follow(x: Tensor, weight: Tensor) -> Tensor:
    """x where `weight` lies, and in its type there; itself where it is there already."""
    return x if x.device == weight.device else x.to(weight.device, weight.dtype)


def attend_kept(q: Tensor, cache: LayerCache, seen: Visible, chunk: Chunk) -> Tensor | None:
    """Attention of q (1, H, T, D) by a kernel that reads the cache as it lies -> (1, T, H * D).

    None where there is none for this device or so many tokens; then torch computes it (grouped.py).
    """
    if q.device.type == "cpu":
        window = cache.layout.window
        return attention.attend(q, seen.k, seen.v, chunk.positions, seen.positions, window)
    if q.shape[0] != 1 or not support.usable(q.device):
        return None
    from m1local.cuda.prefill import attend_chunk  # Triton, which is only there with a card

    return attend_chunk(q, cache, chunk.start)


class M1Attention(nn.Module):
    """Grouped-query attention with a short convolution over keys and values."""

    def __init__(self, config: M1Config, layout: HeadLayout) -> None:
        """Attention of one layer whose heads are laid out as `layout`."""
        super().__init__()
        self.layout = layout
        kv_size = layout.num_kv_heads * layout.head_dim
        self.split_sizes = [config.hidden_size, kv_size, kv_size]
        self.W_pack = nn.Linear(config.hidden_size, sum(self.split_sizes), bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        taps = (1, 1, layout.num_kv_heads, 1, config.conv_window)
        self.conv_k = nn.Parameter(torch.zeros(taps))
        self.conv_v = nn.Parameter(torch.zeros(taps))

    def forward(self, x: Tensor, chunk: Chunk, cache: LayerCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        packed = self.W_pack(x)
        raw_k, raw_v = (self._heads(part) for part in packed.split(self.split_sizes, dim=-1)[1:])
        if cache is None:
            before = RawState(torch.zeros_like(raw_k[:, :, :1]), torch.zeros_like(raw_v[:, :, :1]))
        else:
            before = cache.exchange_raw(chunk.start, raw_k, raw_v)

        turn, taps = chunk.rotations[self.layout.head_dim], (self.conv_k, self.conv_v)
        turned = neighbours.turn_heads(
            packed, HeadTurn(taps, before, turn, self.layout.num_kv_heads)
        )
        if turned is None:
            q = rotate(self._heads(packed.split(self.split_sizes, dim=-1)[0]), turn)
            k = rotate(short_convolution(raw_k, before.k, self.conv_k), turn)
            v = short_convolution(raw_v, before.v, self.conv_v)
        else:
            q, k, v = turned

        mixed, key_positions = None, chunk.positions
        if cache is not None:
            seen = cache.append(chunk.start, k, v)
            mixed = attend_kept(q, cache, seen, chunk)
            if mixed is None:
                key_positions = seen.positions
                k, v = seen.k.read(len(key_positions)), seen.v.read(len(key_positions))
        if mixed is None:
            window = self.layout.window
            heads = grouped.attend(q, k, v, chunk.positions, key_positions, window)
            mixed = heads.transpose(1, 2).flatten(2)
        output: Tensor = self.o_proj(mixed)
        return output

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.reshape(*x.shape[:2], -1, self.layout.head_dim).transpose(1, 2)


class M1MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: M1Config) -> None:
        """Three matrices without bias."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        gated = neighbours.gate(gate, up)
        output: Tensor = self.down_proj(functional.silu(gate) * up if gated is None else gated)
        return output


class M1Layer(nn.Module):
    """Attention, then MLP, each on the normed residual stream."""

    def __init__(self, config: M1Config, layer: int) -> None:
        """Layer number `layer`, whose head layout decides the kind of attention."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = M1Attention(config, config.heads(layer))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = M1MLP(config)

    def forward(self, x: Tensor, chunk: Chunk, cache: LayerCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), chunk, cache)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class M1Backbone(nn.Module):
    """Embedding, layers and final norm: what the checkpoint stores under `model.`."""

    def __init__(self, config: M1Config) -> None:
        """Build the layers that `config` describes."""
        super().__init__()
        self.config = config
        # Its own initial values take torch two seconds of imports, and nobody needs them.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(
            M1Layer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, C) normed hidden states; appends them to `cache`."""
        length = token_ids.shape[1]
        chunk = self.chunk(cache.position if cache is not None else 0, length, token_ids.device)
        x: Tensor = self.embed_tokens(token_ids)
        for layer, block in enumerate(self.layers):
            weight = block.get_parameter("input_layernorm.weight")
            x, chunk = follow(x, weight), chunk.to(weight.device)  # layers may lie on two devices
            x = block(x, chunk, cache.layers[layer] if cache is not None else None)
        if cache is not None:
            cache.advance(length)
        normed: Tensor = self.norm(follow(x, self.norm.weight))
        return normed

    def chunk(self, start: int, length: int, device: torch.device) -> Chunk:
        """Places and rotations of `length` tokens from position `start` on."""
        positions = torch.arange(start, start + length, device=device)
        head_dims = {self.config.heads(layer).head_dim for layer in range(len(self.layers))}
        rotations = {
            width: rotation(positions, width, self.config.rope_theta) for width in head_dims
        }
        return Chunk(start, positions, rotations)


class M1Model(nn.Module):
    """Baichuan-M1 with its language-model head."""

    def __init__(self, config: M1Config) -> None:
        """Build the modules; weights come from a checkpoint or from training."""
        super().__init__()
        self.config = config
        self.model = M1Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, token_ids: Tensor, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Next-token logits in float32: (B, T) -> (B, T, V), or (B, 1, V) with `last_only`.

        The rows of lm_head must have unit length (`normalize_head`). With a cache the T tokens
        continue what it holds; raises ContextLengthError when they do not fit.
        """
        if cache is not None:
            cache.check_room(token_ids.shape[1])
        hidden_states = self.model(token_ids, cache)
        if last_only:
            hidden_states = hidden_states[:, -1:]
        logits: Tensor = self.lm_head(hidden_states).float()
        return logits


def normalize_head(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """NormHead: divide each row of lm_head (V, C) by its L2 norm, in float32.

    The result is of `dtype`, or of the weight's own.
    Doing it twice is harmless; forgetting it costs 16.7 logits on the golden model. A zero row
    stays zero.
    """
    normalized = native.unit_rows(weight)
    if normalized is None:
        wide = weight.float()
        norms = halved_sum(wide.square()).sqrt_().clamp_min(torch.finfo(torch.float32).tiny)
        normalized = wide / norms
    return normalized.to(dtype or weight.dtype)
