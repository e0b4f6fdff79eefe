"""What `m1 run` takes on a card where nobody said: recipe, context, and how the context is kept.

What it is: the first of a few steps that fits into the card's free memory by the plan
(planning.py), and the line that says which, and how to choose otherwise. A checkpoint that is kept
already is taken before another is made. What it is not: for the CPU, or where the recipe or the
context was named; there everything is as it was asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from m1local.checkpoint import CONFIG, is_quantized, matrix_names
from m1local.config import M1Config
from m1local.cuda import int4pack
from m1local.engine import DEFAULT_CONTEXT_TOKENS
from m1local.formats import LinearSpec
from m1local.kv_store import BYTES
from m1local.manifest import NAME as MANIFEST
from m1local.memory import (
    CONTEXT_BYTES,
    Model,
    Setting,
    by_kernels,
    free_bytes,
    room,
    settle,
    suited,
    used_device,
)
from m1local_app import library
from m1local_app.kept import size_text
from m1local_app.language import tr
from m1local_app.options import Chosen
from m1local_app.planning import dtype_on, kinds, recipes
from m1local_quantize.fit import OFF_THE_CARD, weights_within
from m1local_quantize.recipe import Recipe

MADE = ("int8", "int4")  # the recipes of what may be made anew, the best first
KNOWN = ("int8", "bnb-int8", "int4-gptq", "int4", "bnb-nf4")  # of what may be kept already
LEAST_CONTEXT = 2048
FIT_CONTEXT = 4096  # tokens beside which `fit` is advised
FIT_LEAST = LinearSpec("int3", 64)  # for every matrix: fewer bits are not advised


@dataclass(frozen=True, slots=True)
class Choice:
    """What is taken: `setting` as it fits; `instead_of` names the recipe that would be made anew.

    `needed` and `free` are bytes of the card, `layers` those of the model. `fit_size` are the bytes
    of a card for which the recipe `fit` would put all layers there; 0 where it could not.
    """

    recipe: str
    setting: Setting
    layers: int
    needed: int
    free: int
    instead_of: str = ""
    fit_size: int = 0

    @property
    def whole(self) -> bool:
        """Whether no layer stays with the CPU."""
        return self.setting.gpu_layers is None


def choose(chosen: Chosen, kv_type: str | None) -> Choice | None:
    """What to take of the model `chosen`; None where no card is there, or none could be planned.

    `kv_type` None leaves it to the plan.
    """
    device = used_device()
    if device.type == "cpu":
        return None
    plan = _Plan(chosen.folder, device, kv_type)
    if is_quantized(chosen.folder):
        return plan.best(tuple(plan.models))
    # Without kernels torch multiplies four bits far faster than eight, where it knows them packed.
    packed = not by_kernels(device) and int4pack.serves(device, int4pack.TILE)
    makes = MADE[-1:] if packed else MADE
    made = plan.best(tuple(name for name in makes if name in plan.models))
    if made is not None and not made.whole:
        made = replace(made, fit_size=_fit_size(chosen.folder, made.free))
    if made is None or _is_kept(chosen, made.recipe):
        return made
    kept = plan.best(tuple(n for n in KNOWN if n in plan.models and _is_kept(chosen, n)))
    if kept is None or (made.whole and not kept.whole):
        return made
    return replace(kept, instead_of=made.recipe, fit_size=made.fit_size)


def _fit_size(folder: Path, free: int) -> int:
    """For how large a card `fit` is to choose, where `free` bytes of one are; 0: not enough."""
    config = M1Config.from_file(folder / CONFIG)
    size = free + CONTEXT_BYTES  # which is made already, and is taken off a card's size
    least = Model(config, dict.fromkeys(matrix_names(config), FIT_LEAST), dtype_on(used_device()))
    needed = least.weights - sum(least.parts[part] for part in OFF_THE_CARD)
    return size if weights_within(size, config, FIT_CONTEXT) >= needed else 0


class _Plan:
    """The models that a folder may become, and the memory they are to fit into."""

    def __init__(self, folder: Path, device: torch.device, kv_type: str | None) -> None:
        config = M1Config.from_file(folder / CONFIG)
        self.models: Mapping[str, Model] = {
            name: Model(config, specs, dtype_on(device), dtype_on(torch.device("cpu")))
            for name, specs in recipes(folder, config)
        }
        self._device, self._free = device, free_bytes(device)
        self._room = room(device, self._free)
        self._longest = min(DEFAULT_CONTEXT_TOKENS, config.max_position_embeddings)
        self._kinds = kinds(config) if kv_type is None else [kv_type]
        self._layers = config.num_hidden_layers

    def best(self, names: tuple[str, ...]) -> Choice | None:
        """The first of `names` that is whole on the card with the usual context; then less.

        Less is the last of `names` with a shorter context, and at last fewer layers on the card.
        None where there are no names.
        """
        found = None
        for name, wanted in self._steps(names):
            found = self._of(name, wanted)
            if found.whole:
                return found
        return found

    def _steps(self, names: tuple[str, ...]) -> Iterator[tuple[str, Setting]]:
        for name in names:
            for kind in self._kinds:
                yield name, Setting(self._longest, kind)
        tokens = self._longest // 2
        while names and tokens >= LEAST_CONTEXT:
            yield names[-1], Setting(tokens, self._kinds[-1])
            tokens //= 2

    def _of(self, name: str, wanted: Setting) -> Choice:
        model, wanted = self.models[name], suited(wanted, self._device)
        setting = settle(model, wanted, self._device, self._room)
        needed = model.demand(setting, self._device).device + self._free - self._room
        return Choice(name, setting, self._layers, needed, self._free)


def _is_kept(chosen: Chosen, recipe: str) -> bool:
    folder = library.kept_folder(chosen, Recipe.find(recipe))
    return (folder / MANIFEST).is_file()


def line(choice: Choice) -> str:
    """What was chosen, why, and what to type to choose otherwise."""
    setting = choice.setting
    where = ""
    if setting.gpu_layers is not None:
        where = tr(
            ", with {count} of {layers} layers there", count=setting.gpu_layers,
            layers=choice.layers,
        )  # fmt: skip
    said = tr(
        "Chosen for this card: {recipe}, {tokens:,} tokens of context{kept}; {needed} of {free} "
        "free{where}. Otherwise: --recipe, --ctx-size, --kv-type; `m1 plan` shows what fits.",
        recipe=choice.recipe,
        tokens=setting.context_tokens,
        kept=tr(" in 8 bits") if setting.kv_type == BYTES else "",
        needed=size_text(choice.needed),
        free=size_text(choice.free),
        where=where,
    )
    if choice.fit_size:
        said += " " + tr(
            "In fewer bits all layers would be there: --recipe fit --for {size:.1f}GB --ctx-size "
            "{tokens}.",
            size=choice.fit_size // 10**8 / 10,
            tokens=FIT_CONTEXT,
        )
    if choice.instead_of:
        said += " " + tr(
            "It is made already; a new one would be {recipe}: --recipe {recipe}.",
            recipe=choice.instead_of,
        )
    return said
