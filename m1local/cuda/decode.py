"""One token through a model on the card: static buffers, a captured graph, and bookkeeping.

What it is: the decode step as a row of kernels, whose input is a token and a position that lie on
the card; the same launches are captured once as a CUDA graph where that is possible (replay.py).
`Decoder` keeps the cache's books as the model's own
forward pass does, so both may take turns. What it is not: prefill, or a sampler (drawing.py).

The step for a token that was drawn on the card may be begun before the host knows the token
(`launch_ahead`); if the host then wants another one, or none, what was written lies behind the
sequence's end, where nothing looks.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from m1local.cache import KVCache, LayerCache
from m1local.cuda import attention, fused
from m1local.cuda.activation import Activation
from m1local.cuda.embedding import EmbeddingRows
from m1local.cuda.host_embedding import HostEmbedding
from m1local.cuda.matrix import Matrix
from m1local.cuda.one_row import added_product, alike, gated_product, vector_product
from m1local.cuda.replay import Replay
from m1local.formats.base import QuantizedLinear
from m1local.model import M1MLP, M1Attention, M1Layer, M1Model, RMSNorm
from m1local.rope import Rotation, frequencies, turned

NOWHERE = (-1, None)  # a position and token that match nothing


def stored(module: nn.Module) -> Matrix | None:
    """A module's weights as the kernels read them; None where torch is to multiply."""
    return module.on_card() if isinstance(module, QuantizedLinear) else None


def multiply(module: nn.Module, x: Activation, then: Sequence[nn.Module] = ()) -> Tensor:
    """x (1, K) @ W.T as parts (parts, N), whose sum is the product; `then` is multiplied next."""
    if matrix := stored(module):
        return vector_product(x, matrix, then=read_next(then))
    whole: Tensor = module(x.natural)
    return whole


def gated(mlp: M1MLP, x: Activation, out: Activation) -> None:
    """`out` becomes silu(gate(x)) * up(x), by one kernel where both are stored alike."""
    gate, up, then = mlp.gate_proj, mlp.up_proj, (mlp.down_proj,)
    one, other = stored(gate), stored(up)
    if one is None or other is None or not alike(one, other):
        fused.silu_up(multiply(gate, x), multiply(up, x, then), out)
    else:
        gated_product(x, one, other, out, then=read_next(then))


def read_next(modules: Sequence[nn.Module]) -> tuple[Matrix, ...]:
    """What kernels read of `modules`."""
    return tuple(matrix for module in modules if (matrix := stored(module)))


def rows_of(module: nn.Module) -> EmbeddingRows:
    """What reads the rows of an embedding, wherever its table lies."""
    kept = module.rows if isinstance(module, HostEmbedding) else None
    return kept or EmbeddingRows(module)


class DecodeStep:
    """The launches of one token; the layers before `first` are computed elsewhere."""

    def __init__(self, model: M1Model, cache: KVCache, first: int = 0) -> None:
        """Allocate every buffer on the device of the model's last layers."""
        self.model, self.cache, self.first = model, cache, first
        config, norm = model.config, model.model.norm
        self.device, dtype = norm.weight.device, cache.layers[-1].raw_k.dtype
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.x = torch.zeros(config.hidden_size, device=self.device)
        self.logits = torch.zeros(config.vocab_size, device=self.device)
        new = partial(Activation, dtype=dtype, device=self.device)
        self.normed, self.mixed = new(config.hidden_size), new(config.hidden_size)
        self.inner = new(config.intermediate_size)
        # Normed but for the factor of the whole row, where kernels read it.
        self.grown = new(config.hidden_size, eps=norm.eps) if self._is_stored() else None
        layouts = {layer.layout: layer for layer in cache.layers[first:]}
        self.kept = {layout: attention.buffers(layer) for layout, layer in layouts.items()}
        self.frequencies = {
            layout.head_dim: frequencies(layout.head_dim, config.rope_theta, self.device)
            for layout in layouts
        }
        self.rows = rows_of(model.model.embed_tokens) if first == 0 else None

    def __call__(self) -> None:
        """Read `token` at `position`: the cache grows, `logits` are the next token's."""
        backbone = self.model.model
        if self.rows is not None:
            self.rows.write(self.token, self.x[None])
        turns = {width: turned(self.position, by) for width, by in self.frequencies.items()}
        norms = [layer.input_layernorm for layer in self._layers()] + [backbone.norm]
        fused.add_and_norm(self.x, None, norms[0].weight, norms[0].eps, self.normed)
        normed = self.normed
        then = [*(layer.self_attn.W_pack for layer in self._layers()), self.model.lm_head][1:]
        layers = zip(self._layers(), self.cache.layers[self.first :], norms[1:], then, strict=True)
        for block, layer, following, packed in layers:
            heads, mlp, norm = block.self_attn, block.mlp, block.post_attention_layernorm
            self._attend(heads, layer, normed, turns[layer.layout.head_dim])
            normed = self._add(heads.o_proj, self.mixed, norm, (mlp.gate_proj, mlp.up_proj))
            gated(mlp, normed, self.inner)
            normed = self._add(mlp.down_proj, self.inner, following, (packed,))
        parts = multiply(self.model.lm_head, normed)
        torch.sum(parts, 0, dtype=torch.float32, out=self.logits)
        self.position.add_(1)

    def _layers(self) -> list[M1Layer]:
        blocks = list(self.model.model.layers)[self.first :]
        return [block for block in blocks if isinstance(block, M1Layer)]

    def _attend(
        self, module: M1Attention, layer: LayerCache, normed: Activation, turn: Rotation
    ) -> None:
        """`mixed` becomes what the token's heads see; its key and value go into the cache."""
        packed = multiply(module.W_pack, normed)
        taps, kept = (module.conv_k, module.conv_v), self.kept[layer.layout]
        then = read_next((module.o_proj,))
        attention.attend(packed, layer, taps, turn, self.position, kept, self.mixed, then=then)

    def _add(
        self, module: nn.Module, x: Activation, norm: RMSNorm, then: Sequence[nn.Module]
    ) -> Activation:
        """Add the product with x to the residual stream; returns the stream, normed."""
        matrix = stored(module)
        if matrix is None or self.grown is None:
            product = multiply(module, x, then)
            fused.add_and_norm(self.x, product, norm.weight, norm.eps, self.normed)
            return self.normed
        added_product(x, matrix, self.x, norm.weight, self.grown, then=read_next(then))
        return self.grown

    def _is_stored(self) -> bool:
        """Whether kernels read every matrix."""
        modules = [self.model.lm_head]
        for block in self._layers():
            mlp, heads = block.mlp, block.self_attn
            modules += [heads.W_pack, heads.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return all(stored(module) is not None for module in modules)


class Decoder:
    """Feeds single tokens through a decode step, for one cache."""

    def __init__(self, model: M1Model, cache: KVCache, first: int = 0) -> None:
        """Prepare for `cache`; the graph is captured with the first token."""
        self.step = DecodeStep(model, cache, first)
        self.cache = cache
        self._replay: Replay | None = None
        self._position = -1  # what lies on the card
        self._ahead: tuple[int, int | None] | None = None  # position and token begun already

    @property
    def reason(self) -> str:
        """Why no graph is used; "" where one is, or none was tried yet."""
        return self._replay.reason if self._replay else ""

    def feed(self, token_id: int) -> Tensor:
        """Append one token; returns the next one's logits (V,), valid until the next call."""
        self.cache.check_room(1)
        position = self.cache.position
        if self._ahead != (position, token_id):
            self.step.token.fill_(token_id)
            self._enter(token_id)
            self._launch(position)
        self._ahead = None
        self._note(position + 1)
        self.cache.advance(1)
        return self.step.logits

    def launch_ahead(self) -> bool:
        """Begin the step of the token that lies on the card; False where there is no room."""
        position = self.cache.position
        if position >= self.cache.capacity or self.step.first > 0:
            return False
        self._launch(position)
        self._note(position + 1)  # it may be written before anyone feeds it
        self._ahead = position, None  # nobody has said yet which token it was
        return True

    def was_drawn(self, token_id: int) -> None:
        """Say which token `launch_ahead` began with."""
        if self._ahead is not None:
            self._ahead = self._ahead[0], token_id

    def forget_ahead(self) -> None:
        """Do not use what was begun: the cache changes otherwise before it is asked for."""
        if self._ahead is not None:
            self._ahead = NOWHERE

    def _launch(self, position: int) -> None:
        for layer in self.cache.layers[self.step.first :]:
            layer.restore_raw(position)
        if self._replay is None:
            x = self.step.x.clone()
            # The same place each time: a step further could overwrite the sequence's beginning.
            ready = partial(self.step.position.fill_, position)
            self._replay = Replay(self.step, self.step.device, ready)
            self.step.x.copy_(x)
            self._position = -1
        if self._position != position or self._ahead is not None:  # begun for nothing
            self.step.position.fill_(position)
        self._replay()
        self._position = position + 1

    def _enter(self, token_id: int) -> None:
        """The layers that are computed elsewhere, before those of the step."""
        if self.step.first == 0:
            return
        backbone, cache = self.step.model.model, self.cache
        ids = torch.tensor([[token_id]], device=cache.layers[0].raw_k.device)
        chunk = backbone.chunk(cache.position, 1, ids.device)
        x: Tensor = backbone.embed_tokens(ids)
        for index in range(self.step.first):
            x = backbone.layers[index](x, chunk, cache.layers[index])
        self.step.x.copy_(x[0, 0])

    def _note(self, end: int) -> None:
        """The step's layers hold, or may hold soon, the tokens before `end`."""
        for layer in self.cache.layers[self.step.first :]:
            layer.note(end)
