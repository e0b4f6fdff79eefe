"""Quantizing with a progress bar on stderr.

What it is: the pipeline's events drawn for a person. What it is not: the pipeline.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from m1local.manifest import CheckpointManifest
from m1local_app.kept import size_text

if TYPE_CHECKING:
    from m1local_quantize.pipeline import Planned


def quantize_with_progress(
    source: Path,
    target: Path,
    recipe_name: str,
    *,
    overwrite: bool = False,
    text: Path | None = None,
    calibration: Path | None = None,
    certify: bool = True,
) -> CheckpointManifest:
    """Quantize `source` into `target`; returns the manifest of what was made."""
    # Imported here, as torch is heavy and `m1 --help` must not load it.
    from m1local_quantize.pipeline import CheckpointWritten, Planned, quantize_checkpoint
    from m1local_quantize.recipe import Recipe
    from m1local_quantize.text import CALIBRATION, SHIPPED

    recipe = Recipe.find(recipe_name)
    console = Console(stderr=True, highlight=False)
    begun = time.monotonic()
    manifest = None
    measured_on = (text or SHIPPED) if certify else None
    with _bar(console) as bar:
        task = bar.add_task(f"quantizing to {recipe.name}", total=None)
        for event in quantize_checkpoint(
            source,
            target,
            recipe,
            overwrite=overwrite,
            text=measured_on,
            calibration=calibration or CALIBRATION,
        ):
            _draw(bar, task, event)
            if isinstance(event, Planned):
                _say_what_was_found(console, event)
            elif isinstance(event, CheckpointWritten):
                manifest = event.manifest
    if manifest is None:
        raise RuntimeError("the pipeline ended without a checkpoint")
    size = sum(record.nbytes for record in manifest.files.values())
    before = sum(record.nbytes for record in manifest.source_files.values())
    seconds = time.monotonic() - begun
    console.print(f"{recipe.name}: {size_text(before)} -> {size_text(size)} in {seconds:.1f} s")
    if manifest.certificate is not None:
        found = manifest.certificate
        console.print(
            f"against the original: same top token {float(found['top1_agreement']):.1%}, "
            f"KL divergence {found['mean_kl']:.4f}"
        )
    return manifest


def dry_run(source: Path, recipe_name: str) -> str:
    """What quantizing `source` would take, without writing anything."""
    from m1local_quantize.estimate import estimate
    from m1local_quantize.plan import Plan
    from m1local_quantize.recipe import Recipe
    from m1local_quantize.source import Source

    opened, recipe = Source.open(source), Recipe.find(recipe_name)
    expected = estimate(opened, Plan.of(opened, recipe))
    seconds = "not estimated" if expected.seconds is None else f"about {expected.seconds:,.0f} s"
    rows = (
        ("recipe", recipe.name),
        ("reads", size_text(expected.source_bytes)),
        ("writes", size_text(expected.target_bytes)),
        ("memory", f"about {size_text(expected.memory_bytes)}, besides Python's own"),
        ("computing", f"{seconds}, without reading, writing and measuring"),
    )
    return "\n".join(f"{name:<9}  {value}" for name, value in rows)


def measure_with_progress(
    source: Path, folder: Path, text: Path | None
) -> Mapping[str, str | int | float]:
    """The certificate of the checkpoint in `folder`, measured now against its original."""
    from m1local.manifest import CheckpointManifest
    from m1local_quantize.certificate import LayerMeasured, certificate, certify
    from m1local_quantize.source import Source
    from m1local_quantize.text import SHIPPED

    specs = CheckpointManifest.read(folder).linears
    opened = Source.open(source)
    measured_on = opened.read_text(text or SHIPPED)
    found = None
    with _bar(Console(stderr=True, highlight=False)) as bar:
        task = bar.add_task("measuring", total=None)
        for event in certify(opened, folder, specs, measured_on):
            if isinstance(event, LayerMeasured):
                _draw(bar, task, event)
            else:
                found = certificate(event, measured_on)
    if found is None:
        raise RuntimeError("the measurement ended without a result")
    return found


def quality_line(certificate: Mapping[str, str | int | float]) -> str:
    """A certificate in one line."""
    return (
        f"KL divergence {certificate['mean_kl']:.4f} (99 %: {certificate['p99_kl']:.3f}), same top "
        f"token {float(certificate['top1_agreement']):.1%}, perplexity "
        f"{perplexity(certificate['reference_perplexity'])} -> "
        f"{perplexity(certificate['perplexity'])}, on {certificate['tokens']:,} tokens of "
        f"{certificate['text']}"
    )


def perplexity(value: str | float) -> str:
    """A perplexity with as many digits as mean something."""
    number = float(value)
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _draw(bar: Progress, task: TaskID, event: object) -> None:
    from m1local_quantize.certificate import LayerMeasured
    from m1local_quantize.pipeline import Planned, TensorWritten

    if isinstance(event, Planned):
        bar.update(task, total=event.plan.source_bytes, completed=event.resumed_bytes)
    elif isinstance(event, TensorWritten):
        bar.update(task, completed=event.done_bytes)
    elif isinstance(event, LayerMeasured):
        description = f"measuring, layer {event.done} of {event.total}"
        bar.update(task, description=description, total=event.total, completed=event.done)


def _say_what_was_found(console: Console, planned: "Planned") -> None:
    if planned.resumed_bytes:
        share = planned.resumed_bytes / planned.plan.source_bytes
        console.print(f"continuing an unfinished run at {share:.0%}")
    elif planned.started_over:
        console.print("starting over: source, recipe or version changed meanwhile")
