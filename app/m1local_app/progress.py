"""Quantizing with a progress bar on stderr.

What it is: the pipeline's events drawn for a person. What it is not: the pipeline.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from m1local.manifest import CheckpointManifest

if TYPE_CHECKING:
    from m1local_quantize.pipeline import Planned


def quantize_with_progress(
    source: Path, target: Path, recipe_name: str, *, overwrite: bool = False
) -> CheckpointManifest:
    """Quantize `source` into `target`; returns the manifest of what was made."""
    # Imported here, as torch is heavy and `m1 --help` must not load it.
    from m1local_quantize.pipeline import (
        CheckpointWritten,
        Planned,
        TensorWritten,
        quantize_checkpoint,
    )
    from m1local_quantize.recipe import Recipe

    recipe = Recipe.find(recipe_name)
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    begun = time.monotonic()
    manifest = None
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(f"quantizing to {recipe.name}", total=None)
        for event in quantize_checkpoint(source, target, recipe, overwrite=overwrite):
            if isinstance(event, Planned):
                bar.update(task, total=event.plan.source_bytes, completed=event.resumed_bytes)
                _say_what_was_found(console, event)
            elif isinstance(event, TensorWritten):
                bar.update(task, completed=event.done_bytes)
            elif isinstance(event, CheckpointWritten):
                manifest = event.manifest
    if manifest is None:
        raise RuntimeError("the pipeline ended without a checkpoint")
    size = sum(record.nbytes for record in manifest.files.values())
    before = sum(record.nbytes for record in manifest.source_files.values())
    console.print(
        f"{recipe.name}: {_size(before)} -> {_size(size)} in {time.monotonic() - begun:.1f} s"
    )
    return manifest


def _say_what_was_found(console: Console, planned: "Planned") -> None:
    if planned.resumed_bytes:
        share = planned.resumed_bytes / planned.plan.source_bytes
        console.print(f"continuing an unfinished run at {share:.0%}")
    elif planned.started_over:
        console.print("starting over: source, recipe or version changed meanwhile")


def _size(nbytes: int) -> str:
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{nbytes / 2**20:.1f} MiB"
