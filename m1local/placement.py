"""Which part of a model lies on the card, and which stays with the computer.

What it is: the choice by the memory plan (memory.py) or by hand, the loading of each part where it
belongs, and a cache whose layers lie beside their weights. The last layers are on the card, with
the head, so that a token crosses the bus once; the embedding stays with the computer, since a token
needs a row of it only. What it is not: arithmetic, or the forward pass,
which follows the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from m1local.advice import check
from m1local.cache import KVCache, LayerCache
from m1local.checkpoint import (
    CONFIG,
    EMBEDDING,
    HEAD,
    Part,
    compute_dtype,
    is_quantized,
    load_model,
)
from m1local.config import M1Config
from m1local.context import Decoder, Reader
from m1local.cuda import support
from m1local.cuda.host_embedding import HostEmbedding
from m1local.cuda.transfer import Moved, Transfer
from m1local.errors import DependencyError
from m1local.manifest import CheckpointManifest
from m1local.memory import (
    LAYERS,
    Demand,
    Model,
    Setting,
    in_smaller_chunks,
    room,
    settle,
    suited,
    used_device,
)
from m1local.model import M1Model
from m1local.native.step import CompiledStep

CPU = torch.device("cpu")
NORM = "model.norm"
GpuLayers = int | Literal["auto", "all"]


@dataclass(frozen=True, slots=True)
class Placement:
    """The layers from `first` on lie on `card`, the ones before on the CPU."""

    card: torch.device
    first: int
    setting: Setting

    def layer_device(self, layer: int) -> torch.device:
        """Where the weights, keys and values of `layer` lie."""
        return self.card if layer >= self.first else CPU

    def parts(self, config: M1Config) -> Iterator[Part]:
        """Where the tensors lie, and in which type: that of the layers that they are for."""
        yield Part(EMBEDDING, CPU, compute_dtype(self.layer_device(0)))
        for layer in range(config.num_hidden_layers):
            device = self.layer_device(layer)
            yield Part(f"{LAYERS}{layer}.", device, compute_dtype(device))
        for name in (NORM, HEAD):
            yield Part(name, self.card, compute_dtype(self.card))

    def allocate(self, config: M1Config) -> KVCache:
        """A cache for `setting`, each layer where its weights are, in the type it computes in."""
        setting = self.setting
        planned = KVCache.allocate(
            config,
            setting.context_tokens,
            dtype=torch.float32,
            device="meta",
            max_chunk=setting.max_chunk,
            rewind_tokens=setting.rewind_tokens,
            kv_type=setting.kv_type,
        )
        layers = []
        for index, layer in enumerate(planned.layers):
            device = self.layer_device(index)
            dtype = compute_dtype(device)
            layers.append(
                LayerCache(
                    layer.layout,
                    layer.slots,
                    batch_size=1,
                    dtype=dtype,
                    device=str(device),
                    kv_type=setting.kv_type,
                )
            )
        return KVCache(layers, capacity=planned.capacity, max_chunk=planned.max_chunk)


def place(folder: Path, wanted: Setting, gpu_layers: GpuLayers) -> Placement:
    """Where the parts of the model in `folder` go on this machine.

    "auto" puts as much on the card as fits, "all" everything, a number so many layers. Raises
    MemoryLimitError where what was asked for does not fit, before anything is read, and
    DependencyError where a card was asked for and there is none.
    """
    config = M1Config.from_file(folder / CONFIG)
    layers, card = config.num_hidden_layers, used_device()
    if gpu_layers == 0 or (card.type == "cpu" and gpu_layers == "auto"):
        return Placement(CPU, 0, wanted)
    if card.type == "cpu":
        raise DependencyError(
            f"--gpu-layers {gpu_layers} needs an NVIDIA card and a torch with CUDA; torch finds "
            "none here (m1 doctor). Leave the option out to use the CPU."
        )
    model, wanted, free = planned_model(folder, card), suited(wanted, card), room(card)
    if gpu_layers == "auto":
        return settled(settle(model, wanted, card, free), layers, card)
    if gpu_layers != "all" and gpu_layers < layers:
        wanted = replace(wanted, gpu_layers=gpu_layers)
    if model.demand(wanted, card).device > free:
        wanted = in_smaller_chunks(wanted)
    check(model, wanted, card, free)
    return settled(wanted, layers, card)


def planned_model(folder: Path, device: torch.device) -> Model:
    """What the plan must know of the checkpoint in `folder`, if it computes on `device`."""
    config = M1Config.from_file(folder / CONFIG)
    specs = CheckpointManifest.read(folder).linears if is_quantized(folder) else {}
    return Model(config, specs, compute_dtype(device), compute_dtype(CPU))


def demand(folder: Path, placement: Placement) -> Demand:
    """What the checkpoint in `folder` takes where `placement` puts it."""
    card, setting = placement.card, placement.setting
    if card.type == "cpu":  # all of it is there, whatever a card was asked for
        setting = replace(setting, gpu_layers=None)
    return planned_model(folder, card).demand(setting, card)


def settled(setting: Setting, layers: int, card: torch.device) -> Placement:
    """The placement that `setting` of the plan means for a model of so many `layers`."""
    on_card = layers if setting.gpu_layers is None else setting.gpu_layers
    if on_card == 0:
        return Placement(CPU, 0, setting)
    return Placement(card, layers - on_card, setting)


def load(folder: Path, placement: Placement) -> tuple[M1Model, Moved | None]:
    """Load the model in `folder` where `placement` says; and what was moved to a card."""
    if placement.card.type == "cpu":
        return load_model(folder), None
    config, planned = M1Config.from_file(folder / CONFIG), planned_model(folder, placement.card)
    # Where a kernel is missing the weights are packed anew, and what was moved is given back.
    together = support.usable(placement.card)
    transfer = Transfer(placement.card, planned.allocated(placement.setting) if together else 0)
    parts = list(placement.parts(config))
    model = load_model(folder, device=placement.card, parts=parts, move=transfer)
    embed_for_card(model, placement)
    moved = transfer.finish()
    if not together:  # what lay there before it was packed
        torch.cuda.empty_cache()
    return model, moved


def embed_for_card(model: M1Model, placement: Placement) -> None:
    """Where all layers are on a card, let its embedding, which is not, take token ids there."""
    if placement.first == 0:
        width, card = model.config.hidden_size, placement.card
        module = HostEmbedding(model.model.embed_tokens, width, card, compute_dtype(card))
        model.model.embed_tokens = module  # type: ignore[assignment]


def decoder_of(model: M1Model, placement: Placement) -> Callable[[KVCache], Decoder] | None:
    """What makes the decoder of a cache; None where the model itself is to decode."""
    if why_plain(placement.card):
        return None
    from m1local.cuda.drawing import DrawingDecoder  # Triton, which is only there with a card

    return lambda cache: DrawingDecoder(model, cache, placement.first)


def reader_of(model: M1Model, placement: Placement) -> Callable[[KVCache], Reader | None]:
    """What makes the reader of a few tokens for a cache; it makes None where none serves."""
    if placement.card.type != "cpu":
        return lambda cache: None
    return lambda cache: CompiledStep.of(model, cache)


def why_plain(card: torch.device) -> str:
    """Why single tokens go through the model's own forward pass; "" where kernels decode."""
    return support.missing(card) or ""


def decoding(card: torch.device) -> str:
    """How single tokens are computed on `card`, and why, in words for `m1 doctor`."""
    if reason := why_plain(card):
        return f"the model's own forward pass ({reason})"
    from m1local.cuda.replay import Replay

    tried = torch.zeros(1, device=card)

    def work() -> None:
        tried.add_(1)

    reason = Replay(work, card).reason
    return f"kernels, launched one by one ({reason})" if reason else "one captured CUDA graph"
