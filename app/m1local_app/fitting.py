"""The recipe `fit` for a size: sensitivities measured with a progress bar, or read back.

What it is: `--budget` and `--for` into a recipe with a rule for every matrix. What was measured is
kept under M1_HOME, so that another size, or a continued run, need not measure again. What it is
not: the measurement (m1local_quantize.sensitivity) or the choice (m1local_quantize.fit).
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from m1local import __version__, home
from m1local.errors import RecipeError
from m1local_app.boundary import stderr_console, usage_error
from m1local_app.kept import size_text
from m1local_app.language import series, tr
from m1local_quantize.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from m1local.config import M1Config
    from m1local_quantize.evaluate import Sample
    from m1local_quantize.fit import Sensitivities
    from m1local_quantize.source import Source


@dataclass(frozen=True, slots=True)
class Size:
    """What the options say of a checkpoint's size: its weights, or the device that it shall fit."""

    budget: int | None = None
    device: int | None = None
    context_tokens: int | None = None  # beside the weights on the device

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError, or leave with exit code 2, where it does not go with `recipe`."""
        if not recipe.candidates:
            raise RecipeError(
                tr(
                    "The recipe {recipe} says itself what each matrix takes; --budget and --for go "
                    "with the recipe fit.",
                    recipe=recipe.name,
                )
            )
        if self.budget is not None and self.device is not None:
            raise usage_error(tr("Give --budget or --for, not both."))
        if self.device is None and self.context_tokens is not None:
            raise usage_error(tr("--ctx-size goes with --for; --budget is the weights alone."))
        if self.budget is None and self.device is None:
            raise RecipeError(
                tr(
                    "The recipe {recipe} needs a size: --budget 7GiB for the checkpoint, or --for "
                    "8GB for the device it shall fit, with --ctx-size.",
                    recipe=recipe.name,
                )
            )

    def weights(self, config: "M1Config") -> int:
        """Bytes that the weights may take."""
        from m1local.engine import DEFAULT_CONTEXT_TOKENS
        from m1local_quantize.fit import weights_within

        if self.budget is not None:
            return self.budget
        assert self.device is not None, self
        longest = min(DEFAULT_CONTEXT_TOKENS, config.max_position_embeddings)
        return weights_within(self.device, config, self.context_tokens or longest)

    @property
    def elsewhere(self) -> frozenset[str]:
        """Matrices that do not count: those that never lie on a card, where its memory is given."""
        from m1local_quantize.fit import OFF_THE_CARD

        return OFF_THE_CARD if self.device is not None else frozenset()


def fitted_recipe(
    recipe: Recipe, source: "Source", size: Size, *, calibration: Path | None = None
) -> Recipe:
    """`recipe` for weights, or a device, of `size`.

    Raises RecipeError where nothing of that size can be had, or the source will not stay.
    """
    from m1local_quantize.fit import Choices, fitted  # torch: not for `m1 --help`

    size.check(recipe)
    if source.files.passing:
        raise RecipeError(
            tr(
                "The recipe {recipe} reads the original twice, so it must stay: add --keep-source, "
                "or fetch it first with `m1 pull {source}`.",
                recipe=recipe.name,
                source=source.name,
            )
        )
    budget = size.weights(source.config)
    Choices.of(recipe, source, size.elsewhere).check(budget)  # before an hour is spent
    found = _sensitivities(recipe, source, calibration)
    chosen = fitted(recipe, source, found, budget, size.elsewhere)
    said = tr(
        "{recipe}: weights within {size}: {formats}",
        recipe=recipe.name,
        size=size_text(budget),
        formats=_formats(chosen),
    )
    typer.echo(said, err=True)
    return chosen


def _formats(recipe: Recipe) -> str:
    counts = Counter(rule.spec for rule in recipe.rules)
    return series(
        tr(
            "{count} x {format}",
            count=count,
            format=f"{spec.format}{f'/{spec.group_size}' if spec.group_size else ''}",
        )
        for spec, count in sorted(counts.items(), key=lambda pair: str(pair[0]))
    )


def _sensitivities(recipe: Recipe, source: "Source", calibration: Path | None) -> "Sensitivities":
    from m1local.checkpoint import matrix_names
    from m1local_quantize.fit import Sensitivities
    from m1local_quantize.journal import described
    from m1local_quantize.text import CALIBRATION

    text = source.read_text(calibration or CALIBRATION)
    decisive = [
        __version__, text.sha256, dict(source.files.identity()), described(source.folder),
        list(map(str, recipe.candidates)),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    path = home.sensitivities() / f"{name}.json"
    kept = Sensitivities.read(path)
    if kept is not None and kept.costs.keys() == set(matrix_names(source.config)):
        return kept
    console = stderr_console()
    found = _measured(source, text.samples, recipe, console)
    try:
        found.write(path)
    except OSError as error:
        console.print(
            tr(
                "what was measured could not be kept in {folder} ({reason})",
                folder=path.parent,
                reason=error.strerror,
            )
        )
    return found


def _measured(
    source: "Source", samples: "Sequence[Sample]", recipe: Recipe, console: "Console"
) -> "Sensitivities":
    """The sensitivities measured now, with a bar for each of the two ways through the layers."""
    from m1local_quantize.fit import Sensitivities
    from m1local_quantize.sensitivity import LayerRead, measure_sensitivity

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    costs = {}
    disabled = not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=disabled) as bar:
        reading = bar.add_task(tr("reading the layers"), total=None)
        measuring = bar.add_task(tr("measuring what each matrix costs"), total=None, start=False)
        for event in measure_sensitivity(source, samples, recipe.candidates):
            if isinstance(event, LayerRead):
                bar.update(reading, completed=event.done, total=event.total)
                continue
            bar.start_task(measuring)
            costs[event.module] = event.costs
            bar.update(measuring, completed=event.done, total=event.total)
    return Sensitivities(costs)
