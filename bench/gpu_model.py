"""The 14B with random weights, made on the card: nothing is read, any format, in seconds.

What it is: m1local.model's model whose matrices are random bytes in a format's own layout, with
scales that keep activations finite. What it is not: a model that says anything.
"""

import torch
from torch import Tensor, nn

from bench.synthetic import DIMENSIONS
from m1local.cache import KVCache
from m1local.checkpoint import EMBEDDING, HEAD, matrix_names, parameter_shapes
from m1local.config import M1Config
from m1local.cuda.transfer import Shared
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import QuantizedEmbedding, QuantizedLinear
from m1local.memory import Model
from m1local.model import M1Model
from m1local.placement import Placement, embed_for_card

M1_14B = M1Config.from_dict(
    DIMENSIONS | {"num_hidden_layers": 40, "sliding_window_layers": list(range(1, 40, 2))}
)
FORMATS = {
    "int4": LinearSpec("int4", 64), "int8": LinearSpec("int8"), "nf4": LinearSpec("bnb-nf4"),
}  # fmt: skip
ROWS = LinearSpec("int8")  # embedding and head, as in every recipe


def specs(config: M1Config, name: str) -> dict[str, LinearSpec]:
    """The format of every matrix, as the recipe `name` has them; of bf16 none."""
    if name not in FORMATS:
        return {}
    ends = (EMBEDDING, HEAD)
    return {module: ROWS if module in ends else FORMATS[name] for module in matrix_names(config)}


def random_matrix(
    shape: tuple[int, int], spec: LinearSpec, device: torch.device, room: Shared | None = None
) -> QuantizedLinear:
    """A matrix (N, K) of random codes, scales and zeros; its values are of the size 1 / sqrt(K).

    Its tensors lie in `room`, as loaded ones do, or else each in memory of its own.
    """
    room = room or Shared(device, 0)
    chosen = format_class(spec.format)
    shared = chosen.shared_tensors(shape, spec)
    tensors: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in shared.items()}
    size = shape[1] ** -0.5
    for name, stored in chosen.stored(*shape, spec).items():
        if name in tensors:
            continue
        tensors[name] = room.take(stored.shape, stored.dtype)
        if stored.dtype in (torch.uint8, torch.int8):
            low, high = (-127, 128) if stored.dtype == torch.int8 else (0, 256)
            tensors[name].random_(low, high)
            continue
        levels = {"int8": 73.0, "int4": 4.6}.get(spec.format, 0.6)  # standard deviation of codes
        scale = size / levels
        if name == "zeros":
            tensors[name].uniform_(-scale, scale)
        else:  # no two alike, so that what lies in the wrong place shows
            tensors[name].uniform_(0.5 * scale, 1.5 * scale)
    return chosen.from_tensors(tensors, shape, spec)


def random_model(config: M1Config, name: str, placement: Placement) -> M1Model:
    """The model of `config` in the format `name`, its parts where `placement` says."""
    with torch.device("meta"):
        model = M1Model(config)
    shapes, wanted = parameter_shapes(config), specs(config, name)
    parts = list(placement.parts(config))
    planned = Model(config, wanted, parts[-1].dtype)  # the head's, which is on the card
    shared = Shared(placement.card, planned.allocated(placement.setting))
    for prefix, device, kind in parts:
        room = shared if device == placement.card else Shared(device, 0)
        for module, spec in wanted.items():
            if module.startswith(prefix):
                rows, columns = shapes[f"{module}.weight"]
                matrix = random_matrix((rows, columns), spec, device, room)
                made: nn.Module = (
                    QuantizedEmbedding(matrix, kind) if module == EMBEDDING else matrix
                )
                parent, _, child = module.rpartition(".")
                setattr(model.get_submodule(parent), child, made)
        for parameter_name, parameter in model.named_parameters():
            if parameter.is_meta and parameter_name.startswith(prefix):
                owner, _, attribute = parameter_name.rpartition(".")
                value = room.take(parameter.shape, kind)
                if len(parameter.shape) == 2:  # a matrix that stays as it was
                    value.normal_(std=parameter.shape[1] ** -0.5)
                else:
                    value.fill_(1)
                new = nn.Parameter(value, requires_grad=False)
                setattr(model.get_submodule(owner), attribute, new)
    embed_for_card(model, placement)
    return model.eval()


def filled_cache(config: M1Config, placement: Placement, position: int) -> KVCache:
    """A cache of random keys and values that ends at `position`."""
    cache = placement.allocate(config)
    for layer in cache.layers:
        for kept in (layer.k, layer.v):
            if kept.scales is None:
                kept.values.normal_(std=0.5)
                continue
            kept.values.random_(-127, 128)
            kept.scales.fill_(0.5 / 73)  # the standard deviation of such codes
        layer.written = layer.raw_start = position
    cache.position = position
    return cache
