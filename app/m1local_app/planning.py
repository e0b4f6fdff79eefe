"""`m1 plan`: recipe by context by type of keys and values, what each takes, what fits, how fast.

What it is: a table, or JSON, of m1local/memory.py's arithmetic for a checkpoint or an original.
What it is not: a measurement of a model; only free memory and, unless given, bandwidth are asked of
the machine.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from m1local.checkpoint import CONFIG, compute_dtype, is_quantized, matrix_names
from m1local.config import M1Config
from m1local.errors import RecipeError
from m1local.formats import LinearSpec
from m1local.kv_store import KV_BYTES, kind_fits
from m1local.manifest import CheckpointManifest
from m1local.memory import (
    Demand,
    Model,
    Setting,
    bandwidth,
    free_bytes,
    room,
    settle,
    suited,
    used_device,
)
from m1local_app.columns import aligned
from m1local_app.kept import size_text
from m1local_app.language import tr
from m1local_quantize.plan import stored_tensors
from m1local_quantize.recipe import Recipe, shipped_recipes

CONTEXTS = (2048, 8192, 16384, 32768)
HOST_BANDWIDTH = 40e9  # of two channels of DDR4, where nothing is measured: presumed


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to fit into, and how fast it is read: bytes, and bytes per second."""

    device: torch.device
    free: int
    room: int  # of it, for what is planned
    bandwidth: float
    host_bandwidth: float

    @classmethod
    def found(cls, memory: int | None, speed: int | None) -> "Machine":
        """This machine; or one with a card of `memory` bytes, or `speed` bytes per second."""
        given = torch.device("cuda") if memory is not None else used_device()
        if memory is not None:  # of a card on which nothing is yet, not even a context
            free, fillable = memory, room(given, memory, untouched=True)
        else:
            free, fillable = free_bytes(given), room(given)
        host = HOST_BANDWIDTH if speed is not None else bandwidth(torch.device("cpu"))
        if speed is not None:
            return cls(given, free, fillable, float(speed), host)
        return cls(given, free, fillable, bandwidth(used_device()), host)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `setting` None says that nothing fits."""

    recipe: str
    wanted: Setting
    demand: Demand
    setting: Setting | None
    tokens_per_second: float


def plan(folder: Path, machine: Machine, context_tokens: int | None) -> list[Row]:
    """All rows for the model in `folder`; its config.json is enough."""
    config = M1Config.from_file(folder / CONFIG)
    longest = config.max_position_embeddings
    contexts = [context_tokens] if context_tokens else [n for n in CONTEXTS if n <= longest]
    dtype = dtype_on(machine.device)
    return [
        _row(
            recipe,
            Model(config, specs, dtype, dtype_on(torch.device("cpu"))),
            suited(Setting(context, kv_type), machine.device),
            machine,
        )
        for recipe, specs in recipes(folder, config)
        for context in contexts or [longest]
        for kv_type in kinds(config)
    ]


def kinds(config: M1Config) -> list[str]:
    """How the keys and values of this model can be kept."""
    widths = {config.heads(layer).head_dim for layer in range(config.num_hidden_layers)}
    return [kind for kind in KV_BYTES if all(kind_fits(kind, width) for width in widths)]


def dtype_on(device: torch.device) -> torch.dtype:
    """What is computed in on `device`; on a card that is not there, what most cards take."""
    present = device.type == "cpu" or torch.cuda.is_available()
    return compute_dtype(device) if present else torch.bfloat16


def recipes(folder: Path, config: M1Config) -> Iterator[tuple[str, Mapping[str, LinearSpec]]]:
    """The checkpoint's own, or every shipped one that has a format for every matrix."""
    if is_quantized(folder):
        manifest = CheckpointManifest.read(folder)
        yield manifest.recipe, manifest.linears
        return
    from m1local.checkpoint import parameter_shapes

    shapes = parameter_shapes(config)
    for name in shipped_recipes():
        recipe = Recipe.find(name)
        if recipe.candidates:  # fit takes what it is given
            continue
        specs = {}
        try:
            for module in matrix_names(config):
                spec = recipe.rule_for(module).spec
                rows, columns = shapes[f"{module}.weight"]
                if spec.format != "float":
                    stored_tensors(recipe, module, (rows, columns), spec)
                specs[module] = spec
        except RecipeError:
            continue
        yield name, specs


def _row(recipe: str, model: Model, wanted: Setting, machine: Machine) -> Row:
    demand = model.demand(wanted, machine.device)
    if machine.device.type == "cuda":
        taken: Setting | None = settle(model, wanted, machine.device, machine.room)
    else:
        taken = wanted if demand.device <= machine.free else None
    chosen = model.demand(taken, machine.device) if taken else demand
    speed = chosen.tokens_per_second(machine.bandwidth, machine.host_bandwidth)
    return Row(recipe, wanted, chosen, taken, speed if taken else 0.0)


def as_text(rows: list[Row], machine: Machine) -> str:
    """The table, and what it presumes."""
    head = (
        tr("recipe"), tr("context"), "KV", tr("weights"), tr("cache"), tr("workspace"),
        tr("in all"), tr("fits"), tr("tokens/s at most"),
    )  # fmt: skip
    lines = [head, *(_cells(row) for row in rows)]
    told = tr(
        "{device}: {free} free, {speed} GB/s",
        device=machine.device.type,
        free=size_text(machine.free),
        speed=f"{machine.bandwidth / 1e9:.0f}",
    )
    return f"{told}\n\n{aligned(lines)}"


def _cells(row: Row) -> tuple[str, ...]:
    demand, total = row.demand, row.demand.device + row.demand.runtime
    return (
        row.recipe,
        f"{row.wanted.context_tokens:,}",
        row.wanted.kv_type,
        size_text(demand.weights),
        size_text(demand.cache),
        size_text(demand.workspace + demand.graphs + demand.gaps),
        size_text(total),
        _fits(row),
        f"{row.tokens_per_second:.1f}" if row.setting else "–",
    )


def _fits(row: Row) -> str:
    if row.setting is None:
        return tr("no")
    if row.setting.gpu_layers == 0:
        return tr("only on the CPU")
    if row.setting.gpu_layers is not None:
        return tr("with --gpu-layers {count}", count=row.setting.gpu_layers)
    return tr("yes")


def as_json(rows: list[Row], machine: Machine) -> str:
    """The same as an object, in bytes."""
    return json.dumps(
        {
            "device": machine.device.type,
            "free": machine.free,
            "bandwidth": machine.bandwidth,
            "rows": [
                {
                    "recipe": row.recipe,
                    "context_tokens": row.wanted.context_tokens,
                    "kv_type": row.wanted.kv_type,
                    "bytes": asdict(row.demand),
                    "fits": row.setting is not None,
                    "gpu_layers": row.setting.gpu_layers if row.setting else None,
                    "tokens_per_second": round(row.tokens_per_second, 2),
                }
                for row in rows
            ],
        },
        indent=1,
    )
