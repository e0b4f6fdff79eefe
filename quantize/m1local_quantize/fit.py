"""fit: the bits of every matrix, chosen so that the KL divergence is least within a size.

What it is: measured costs (sensitivity.py) and a budget in bytes into a recipe with a rule for
every matrix; the choice is the multiple-choice knapsack problem, solved by dynamic programming.
What it is not: a measurement, or the arithmetic of what a device needs beside the weights; that is
m1local/memory.py.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy
import torch

from m1local import home
from m1local.checkpoint import EMBEDDING, matrix_names, parameter_shapes
from m1local.config import M1Config
from m1local.errors import RecipeError
from m1local.formats import LinearSpec, format_class
from m1local.memory import Model, Setting, suited
from m1local_quantize.methods import method_for
from m1local_quantize.plan import stored_tensors
from m1local_quantize.recipe import Recipe, Rule
from m1local_quantize.sensitivity import fits
from m1local_quantize.source import Source
from m1local_quantize.stream import LAYER

SLOTS = 1 << 17  # of the budget, at least, where sizes have no larger common measure
GPTQ_GAIN = 0.46  # of refit's divergence; on m1-tiny 0.46 to 0.48 for each format of 3 to 6 bits
OFF_THE_CARD = frozenset({EMBEDDING})  # which stays in the host's memory (placement.py)
Costs = Mapping[LinearSpec, float]


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Nats per token that each matrix costs in each format."""

    costs: Mapping[str, Costs]

    def write(self, path: Path) -> None:
        """Keep them; a cut leaves nothing or all."""
        rows = {
            module: [[spec.format, spec.group_size, cost] for spec, cost in costs.items()]
            for module, costs in self.costs.items()
        }
        home.replace_text(path, json.dumps(rows, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What `write` kept; None where nothing of use is there."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                {
                    module: {LinearSpec(name, size): float(cost) for name, size, cost in costs}
                    for module, costs in rows.items()
                }
            )
        except (OSError, ValueError, TypeError, AttributeError):
            return None


@dataclass(frozen=True, slots=True)
class Choices:
    """What a recipe leaves open for a source, and how much it needs at least.

    Bytes are those that count: none of a matrix that lies `elsewhere`.
    """

    recipe: Recipe
    source: Source
    fixed_bytes: int
    options: Mapping[str, Sequence[tuple[LinearSpec, int]]]  # by module: formats and their bytes

    @classmethod
    def of(cls, recipe: Recipe, source: Source, elsewhere: Collection[str] = ()) -> Self:
        """Raises RecipeError where a rule does not fit its matrix, or nothing of the list does."""
        fixed, options = 0, {}
        for name, shape in parameter_shapes(source.config).items():
            module = name.removesuffix(".weight")
            counts = module not in elsewhere
            rule = recipe.closed_rule(module) if len(shape) == 2 else None
            if len(shape) != 2 or (rule is not None and rule.spec.format == "float"):
                fixed += counts * source.nbytes(name)
                continue
            size = (shape[0], shape[1])
            if rule is not None:
                stored = stored_tensors(recipe, module, size, rule.spec).values()
                fixed += counts * sum(tensor.nbytes for tensor in stored)
                continue
            fitting = [spec for spec in recipe.candidates if fits(module, size, spec)]
            if not fitting:
                raise RecipeError(
                    f"The recipe {recipe.name} has no format that {module} can be stored in; add "
                    "one to its list, or a rule for it."
                )
            options[module] = [(spec, counts * stored_bytes(size, spec)) for spec in fitting]
        return cls(recipe, source, fixed, options)

    def check(self, budget_bytes: int) -> None:
        """Raise RecipeError where not even the smallest formats stay within `budget_bytes`."""
        smallest = sum(min(nbytes for _, nbytes in options) for options in self.options.values())
        least = self.fixed_bytes + smallest
        if least > budget_bytes:
            raise RecipeError(
                f"{self.source.name} takes {least / 2**20:,.1f} MiB at least by the recipe "
                f"{self.recipe.name}, but {max(budget_bytes, 0) / 2**20:,.1f} MiB are allowed. "
                "Allow more, or choose a smaller --ctx-size."
            )


def fitted(
    recipe: Recipe,
    source: Source,
    found: Sensitivities,
    budget_bytes: int,
    elsewhere: Collection[str] = (),
) -> Recipe:
    """`recipe` with a rule for every matrix that it leaves open.

    All tensors together, but for matrices that lie `elsewhere`, take `budget_bytes` at most; raises
    RecipeError where they cannot.
    """
    choices = Choices.of(recipe, source, elsewhere)
    choices.check(budget_bytes)
    items = [
        [
            (nbytes, found.costs[module][spec] * _gain(recipe, module, spec))
            for spec, nbytes in open_
        ]
        for module, open_ in choices.options.items()
    ]
    rules = []
    picked = choose(items, budget_bytes - choices.fixed_bytes)
    for (module, open_), index in zip(choices.options.items(), picked, strict=True):
        spec = open_[index][0]
        rules.append(Rule(module, spec, method_for(recipe.method, spec)))
    return replace(recipe, rules=(*recipe.rules, *rules), candidates=())


def _gain(recipe: Recipe, module: str, spec: LinearSpec) -> float:
    """What part of the measured cost is left by the recipe's own method."""
    calibrated = module.startswith(LAYER) and method_for(recipe.method, spec) == "gptq"
    return GPTQ_GAIN if calibrated else 1.0


def choose(options: Sequence[Sequence[tuple[int, float]]], budget_bytes: int) -> list[int]:
    """Which option (bytes, cost) of each item makes the sum of costs least within the budget.

    Exact where the sizes' common measure divides the budget into fewer than SLOTS parts; else sizes
    are rounded up to such a part. The cheapest options must fit.
    """
    base = [min(nbytes for nbytes, _ in item) for item in options]
    room = budget_bytes - sum(base)
    extra = [[nbytes - b for nbytes, _ in item] for item, b in zip(options, base, strict=True)]
    measure = math.gcd(*(e for item in extra for e in item)) or 1
    unit = max(measure, -(-room // SLOTS), 1)
    slots = room // unit
    best = numpy.zeros(slots + 1)
    picked = []
    for item, sizes in zip(options, extra, strict=True):
        tried = numpy.full((len(item), slots + 1), numpy.inf)
        for row, (size, (_, cost)) in enumerate(zip(sizes, item, strict=True)):
            taken = -(-size // unit)
            if taken <= slots:
                tried[row, taken:] = best[: slots + 1 - taken] + cost
        picked.append(tried.argmin(axis=0).astype(numpy.int8))
        best = tried.min(axis=0)
    chosen, left = [], slots
    for sizes, pick in zip(reversed(extra), reversed(picked), strict=True):
        chosen.append(int(pick[left]))
        left -= -(-sizes[chosen[-1]] // unit)
    return chosen[::-1]


def stored_bytes(shape: tuple[int, int], spec: LinearSpec) -> int:
    """Bytes of a matrix (N, K) stored as `spec`."""
    return sum(stored.nbytes for stored in format_class(spec.format).stored(*shape, spec).values())


def weights_within(device_bytes: int, config: M1Config, context_tokens: int) -> int:
    """Bytes of weights that leave room on a card for a context and for the work.

    All layers are presumed to lie on the card, keys and values in 16 bits: what is then needed is
    what `m1 plan --memory` says. The embedding is not among these weights; see `OFF_THE_CARD`.
    """
    # Any; the rest differs only in what the card's allocator leaves, and is most with this one.
    specs = dict.fromkeys(matrix_names(config), LinearSpec("int4", 64))
    model = Model(config, specs, torch.bfloat16)
    card = torch.device("cuda")
    demand = model.demand(suited(Setting(context_tokens), card), card)
    return device_bytes - (demand.device + demand.runtime - demand.weights)
