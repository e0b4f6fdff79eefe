"""What a quantization will write: every tensor, in which file, and how many bytes.

What it is: arithmetic on the source's headers and the recipe, before anything is read or written.
What it is not: a guess; the files have exactly these sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from m1local.checkpoint import EMBEDDING, parameter_shapes
from m1local.errors import RecipeError
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import Stored
from m1local_quantize.methods import NEED_INPUTS
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source

FLOAT = LinearSpec("float")
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Step:
    """One source tensor and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    spec: LinearSpec
    method: str
    tensors: Mapping[str, Stored]

    @property
    def is_quantized(self) -> bool:
        """Whether the tensor changes its format."""
        return self.spec != FLOAT

    @property
    def nbytes(self) -> int:
        """Bytes it will take."""
        return sum(stored.nbytes for stored in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps, grouped by the file they are written to."""

    shards: Mapping[str, tuple[Step, ...]]
    linears: Mapping[str, LinearSpec]
    source_bytes: int

    @property
    def steps(self) -> list[Step]:
        """All steps in order."""
        return [step for steps in self.shards.values() for step in steps]

    @property
    def needs_calibration(self) -> bool:
        """Whether some matrix' values are chosen by what comes into it."""
        return any(step.method in NEED_INPUTS for step in self.steps)

    @property
    def target_bytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(step.nbytes for step in self.steps)

    @classmethod
    def of(cls, source: Source, recipe: Recipe, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Self:
        """Plan `recipe` for `source`; raises RecipeError where a format does not fit a matrix."""
        steps, linears, source_bytes = [], {}, 0
        for name, shape in parameter_shapes(source.config).items():
            dtype = source.dtype(name)
            source_bytes += Stored(shape, dtype).nbytes
            spec, method, tensors = FLOAT, "rtn", {name: Stored(shape, dtype)}
            if len(shape) == 2:
                module = name.removesuffix(".weight")
                rule = recipe.rule_for(module)
                spec, method = rule.spec, rule.method
                linears[module] = spec
                if spec.format != FLOAT.format:
                    tensors = stored_tensors(recipe, module, (shape[0], shape[1]), spec)
            steps.append(Step(name, shape, spec, method, tensors))
        return cls(_group(steps, shard_bytes), linears, source_bytes)


def stored_tensors(
    recipe: Recipe, module: str, shape: tuple[int, int], spec: LinearSpec
) -> dict[str, Stored]:
    """What is stored of a matrix (N, K); raises RecipeError where `spec` does not fit it."""
    chosen = format_class(spec.format)
    reason = chosen.check(*shape, spec)
    if module == EMBEDDING and not chosen.gathers:
        reason = f"an embedding's rows are read one by one, which {spec.format} cannot"
    if reason is not None:
        raise RecipeError(
            f"The recipe {recipe.name} stores {module} as {spec.format}, but {reason}. Choose "
            "another group size, format or recipe."
        )
    return {f"{module}.{suffix}": stored for suffix, stored in chosen.stored(*shape, spec).items()}


def _group(steps: list[Step], shard_bytes: int) -> dict[str, tuple[Step, ...]]:
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if groups[-1] and size + step.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += step.nbytes
    if len(groups) == 1:
        return {"model.safetensors": tuple(groups[0])}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": tuple(group)
        for number, group in enumerate(groups, 1)
    }
