"""One token through a model on the card: static buffers, a captured graph, and bookkeeping.

What it is: the decode step as a row of kernels, whose input is a token and a position that lie on
the card; the same launches are captured once as a CUDA graph, or made anew each time where
capturing is not possible, with a reason. `Decoder` keeps the cache's books as the model's own
forward pass does, so both may take turns. What it is not: prefill, or a sampler (drawing.py).

The step for a token that was drawn on the card may be begun before the host knows the token
(`launch_ahead`); if the host then wants another one, or none, what was written lies behind the
sequence's end, where nothing looks.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from m1local.cache import KVCache
from m1local.cuda import attention, fused
from m1local.cuda.activation import Activation
from m1local.cuda.embedding import EmbeddingRows
from m1local.cuda.matrix import Matrix
from m1local.cuda.one_row import alike, vector_product
from m1local.formats.base import QuantizedLinear
from m1local.model import M1Layer, M1Model
from m1local.rope import Rotation, frequencies, turned

NOWHERE = (-1, None)  # a position and token that match nothing
WARM_UPS = 2  # Triton compiles at the first launch, which must not be captured


def stored(module: nn.Module) -> Matrix | None:
    """A module's weights as the kernels read them; None where torch is to multiply."""
    return module.on_card() if isinstance(module, QuantizedLinear) else None


def multiply(module: nn.Module, x: Activation) -> Tensor:
    """x (1, K) @ W.T as parts (parts, N), whose sum is the product."""
    if matrix := stored(module):
        return vector_product(x, matrix)
    whole: Tensor = module(x.natural)
    return whole


def multiply_both(one: nn.Module, other: nn.Module, x: Activation) -> tuple[Tensor, Tensor]:
    """The same of two matrices of one shape: in one launch where both are stored alike."""
    first, second = stored(one), stored(other)
    if first is None or second is None or not alike(first, second):
        return multiply(one, x), multiply(other, x)
    gate, up = vector_product(x, first, second).chunk(2, dim=1)
    return gate, up


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
        width, inner = config.hidden_size, config.intermediate_size
        self.normed, self.mixed, self.inner = (
            Activation(columns, dtype=dtype, device=self.device)
            for columns in (width, width, inner)
        )
        self.q = torch.zeros(width, dtype=dtype, device=self.device)
        layouts = {layer.layout: layer for layer in cache.layers[first:]}
        self.kept = {layout: attention.buffers(layer) for layout, layer in layouts.items()}
        self.frequencies = {
            layout.head_dim: frequencies(layout.head_dim, config.rope_theta, self.device)
            for layout in layouts
        }
        self.rows = EmbeddingRows(model.model.embed_tokens) if first == 0 else None

    def __call__(self) -> None:
        """Read `token` at `position`: the cache grows, `logits` are the next token's."""
        backbone = self.model.model
        if self.rows is not None:
            self.rows.write(self.token, self.x)
        turns = {width: turned(self.position, by) for width, by in self.frequencies.items()}
        product: Tensor | None = None
        for index in range(self.first, len(self.cache.layers)):
            block = backbone.layers[index]
            assert isinstance(block, M1Layer)
            product = self._layer(block, index, product, turns)
        fused.add_and_norm(self.x, product, backbone.norm.weight, backbone.norm.eps, self.normed)
        parts = multiply(self.model.lm_head, self.normed)
        torch.sum(parts, 0, dtype=torch.float32, out=self.logits)
        self.position.add_(1)

    def _layer(
        self,
        block: M1Layer,
        index: int,
        product: Tensor | None,
        turns: Mapping[int, Rotation],
    ) -> Tensor:
        """One layer, adding the `product` of the one before; returns its own last product."""
        layer, module = self.cache.layers[index], block.self_attn
        norm = block.input_layernorm
        fused.add_and_norm(self.x, product, norm.weight, norm.eps, self.normed)
        packed = multiply(module.W_pack, self.normed)
        taps, turn = (module.conv_k, module.conv_v), turns[layer.layout.head_dim]
        fused.place(packed, self.q, layer, taps, turn, self.position)
        attention.attend(self.q, layer, self.position, self.kept[layer.layout], self.mixed)
        product = multiply(module.o_proj, self.mixed)
        norm = block.post_attention_layernorm
        fused.add_and_norm(self.x, product, norm.weight, norm.eps, self.normed)
        gate, up = multiply_both(block.mlp.gate_proj, block.mlp.up_proj, self.normed)
        fused.silu_up(gate, up, self.inner)
        return multiply(block.mlp.down_proj, self.inner)


class Replay:
    """Work that is launched again and again: as a captured graph, or as it is with a reason."""

    def __init__(
        self,
        work: Callable[[], None],
        device: torch.device,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Capture `work`, after it ran a few times, each time after `prepare`."""
        self._launch, self.reason = work, ""
        if device.type != "cuda":
            self.reason = f"no graphs on {device.type}"
            return
        try:
            self._launch = captured(work, prepare)
        except RuntimeError as error:  # what cannot be captured can still be launched
            said = str(error) or type(error).__name__
            self.reason = f"capturing failed: {said.splitlines()[0]}"

    def __call__(self) -> None:
        """Launch it once."""
        self._launch()


def captured(work: Callable[[], None], prepare: Callable[[], object]) -> Callable[[], None]:
    """`work` as a CUDA graph's replay."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            prepare()
            work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Where capturing fails torch leaves the thread on the graph's stream: the outer one takes it
    # back. What other threads do with the card meanwhile is no business of the capture.
    with (
        torch.cuda.stream(current),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


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
