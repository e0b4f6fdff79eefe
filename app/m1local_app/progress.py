"""Quantizing with a progress bar on stderr.

What it is: the pipeline's events drawn for a person. What it is not: the pipeline.
"""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
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
from m1local_app.boundary import stderr_console
from m1local_app.columns import aligned
from m1local_app.fetching import note_licence
from m1local_app.kept import size_text
from m1local_app.language import tr

if TYPE_CHECKING:
    from m1local_quantize.pipeline import Planned
    from m1local_quantize.recipe import Recipe
    from m1local_quantize.source import Source


def quantize_with_progress(
    source: "Source",
    target: Path,
    recipe: "Recipe",
    *,
    overwrite: bool = False,
    text: Path | None = None,
    calibration: Path | None = None,
    certify: bool = True,
) -> CheckpointManifest:
    """Quantize `source` into `target`, its licence noted; returns the manifest of what was made."""
    # Imported here, as torch is heavy and `m1 --help` must not load it.
    from m1local_quantize.pipeline import CheckpointWritten, Planned, quantize_checkpoint
    from m1local_quantize.text import CALIBRATION, SHIPPED

    note_licence(source.folder)
    console = stderr_console()
    begun, peak, manifest = time.monotonic(), 0, None
    with _bar(console) as bar:
        drawn = Course(bar, recipe.name, source.files.passing)
        for event in quantize_checkpoint(
            source,
            target,
            recipe,
            overwrite=overwrite,
            text=(text or SHIPPED) if certify else None,
            calibration=calibration or CALIBRATION,
        ):
            peak = max(peak, held_bytes())
            drawn.draw(event)
            if isinstance(event, Planned):
                _say_what_was_found(console, event)
            elif isinstance(event, CheckpointWritten):
                manifest = event.manifest
    if manifest is None:
        raise RuntimeError("the pipeline ended without a checkpoint")
    _say_what_was_made(console, manifest, time.monotonic() - begun, peak)
    return manifest


def _say_what_was_made(
    console: Console, manifest: CheckpointManifest, seconds: float, peak: int
) -> None:
    size = sum(record.nbytes for record in manifest.files.values())
    before = sum(record.nbytes for record in manifest.source_files.values())
    console.print(
        tr(
            "{recipe}: {before} -> {after} in {seconds:.1f} s, {speed} a second, at most {peak} of "
            "memory",
            recipe=manifest.recipe,
            before=size_text(before),
            after=size_text(size),
            seconds=seconds,
            speed=size_text(int(before / seconds)),
            peak=size_text(peak),
        )
    )
    if (cost := quality_in_short(manifest)) is not None:
        console.print(cost)


def quality_in_short(manifest: CheckpointManifest) -> str | None:
    """What quantizing has cost, in few words; None where that was not measured."""
    found = manifest.certificate
    if found is None:
        return None
    return tr(
        "against the original: same top token {same:.1%}, KL divergence {kl:.4f}",
        same=float(found["top1_agreement"]),
        kl=float(found["mean_kl"]),
    )


def dry_run(opened: "Source", recipe: "Recipe", calibration: Path | None = None) -> str:
    """What quantizing a source would take, without writing anything."""
    from m1local_quantize.estimate import estimate
    from m1local_quantize.plan import Plan
    from m1local_quantize.text import CALIBRATION

    plan, tokens = Plan.of(opened, recipe), 0
    if plan.needs_calibration:
        text = opened.read_text(calibration or CALIBRATION)
        tokens = sum(len(sample.token_ids) for sample in text.samples)
    expected = estimate(opened, plan, tokens)
    seconds = expected.seconds
    time = tr("not estimated") if seconds is None else tr("about {n:,.0f} s", n=seconds)
    memory = size_text(expected.memory_bytes)
    rows = (
        (tr("recipe"), recipe.name),
        (tr("reads"), size_text(expected.source_bytes)),
        (tr("writes"), size_text(expected.target_bytes)),
        (tr("memory"), tr("about {size}, besides Python's own", size=memory)),
        (tr("computing"), tr("{time}, without reading, writing and measuring", time=time)),
    )
    return aligned(rows)


def measure_with_progress(
    source: Path, folder: Path, text: Path | None
) -> Mapping[str, str | int | float]:
    """The certificate of the checkpoint in `folder`, measured now against its original."""
    from m1local.manifest import CheckpointManifest
    from m1local_quantize.certificate import StageMeasured, certificate, certify
    from m1local_quantize.source import Source
    from m1local_quantize.text import SHIPPED

    specs = CheckpointManifest.read(folder).linears
    opened = Source.open(source)
    measured_on = opened.read_text(text or SHIPPED)
    found = None
    with _bar(stderr_console()) as bar:
        task = bar.add_task(tr("measuring"), total=None)
        for event in certify(opened, folder, specs, measured_on):
            if isinstance(event, StageMeasured):
                done, total = event.done, event.total
                said = tr("measuring, stage {done} of {total}", done=done, total=total)
                bar.update(task, description=said, total=total, completed=done)
            else:
                found = certificate(event, measured_on)
    if found is None:
        raise RuntimeError("the measurement ended without a result")
    return found


def quality_line(certificate: Mapping[str, str | int | float]) -> str:
    """A certificate in one line."""
    return tr(
        "KL divergence {kl:.4f} (99 %: {tail:.3f}), same top token {same:.1%}, perplexity {before} "
        "-> {after}, on {tokens:,} tokens of {text}",
        kl=certificate["mean_kl"],
        tail=certificate["p99_kl"],
        same=float(certificate["top1_agreement"]),
        before=perplexity(certificate["reference_perplexity"]),
        after=perplexity(certificate["perplexity"]),
        tokens=certificate["tokens"],
        text=certificate["text"],
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


class Course:
    """The bars of one quantization: what is done, and, where it comes over the network, what came.

    The bar of what is done counts bytes of the source; its rate and its end include measuring.
    """

    def __init__(self, bar: Progress, recipe: str, arriving: bool) -> None:
        """Draw into `bar`, which need not be shown."""
        self._bar, self._recipe = bar, recipe
        self._done = bar.add_task(tr("quantizing to {recipe}", recipe=recipe), total=None)
        self._came = bar.add_task(tr("fetching"), total=None) if arriving else None
        self.measured = "0"

    @classmethod
    def unseen(cls, recipe: str) -> "Course":
        """One whose figures are shown elsewhere."""
        return cls(Progress(disable=True), recipe, arriving=False)

    @property
    def share(self) -> float:
        """What is done of the whole, 0 to 1."""
        return self._bar.tasks[self._done].percentage / 100

    @property
    def pace(self) -> str:
        """Bytes a second and the time left, in words; "" where nothing can be said yet."""
        task = self._bar.tasks[self._done]
        if task.speed is None or task.time_remaining is None:
            return ""
        left = timedelta(seconds=task.time_remaining)
        return tr("{speed}/s, {left} left", speed=size_text(int(task.speed)), left=left)

    def draw(self, event: object) -> None:
        """Take in one event of the pipeline."""
        from m1local_quantize.certificate import StageMeasured
        from m1local_quantize.passage import TensorWritten
        from m1local_quantize.pipeline import Planned
        from m1local_quantize.transfer import BytesFetched

        bar, held = self._bar, size_text(held_bytes())
        if isinstance(event, Planned):
            bar.update(self._done, total=event.plan.source_bytes, completed=event.resumed_bytes)
        elif isinstance(event, TensorWritten):
            text = tr("quantizing to {recipe} ({held})", recipe=self._recipe, held=held)
            bar.update(self._done, completed=event.done_bytes, description=text)
        elif isinstance(event, StageMeasured):
            self.measured = f"{event.done}/{event.total}"
            text = tr(
                "quantizing to {recipe} ({held}), measured {done}/{total}",
                recipe=self._recipe,
                held=held,
                done=event.done,
                total=event.total,
            )
            bar.update(self._done, description=text)
        elif isinstance(event, BytesFetched) and self._came is not None:
            bar.update(self._came, total=event.total_bytes, completed=event.done_bytes)


def held_bytes() -> int:
    """Memory this process holds now, without files that are only mapped where that can be told."""
    information = psutil.Process().memory_info()
    return int(information.rss) - int(getattr(information, "shared", 0))


def _say_what_was_found(console: Console, planned: "Planned") -> None:
    if planned.resumed_bytes:
        share = planned.resumed_bytes / planned.plan.source_bytes
        console.print(tr("continuing an unfinished run at {share:.0%}", share=share))
    elif planned.started_over:
        console.print(tr("starting over: source, recipe or version changed meanwhile"))
