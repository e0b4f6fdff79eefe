"""Fetching a model from the hub with a progress bar, the licence note before it.

What it is: the hub's events drawn for a person. What it is not: the transfer.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from m1local import home
from m1local.errors import HubError
from m1local_app import library
from m1local_app.boundary import stderr_console, usage_error
from m1local_app.kept import size_text
from m1local_app.language import tr
from m1local_app.notices import show_licence_once
from m1local_app.options import Chosen
from m1local_quantize.hashing import FileHashes
from m1local_quantize.hub import FileFetched, Record, Repository, pull
from m1local_quantize.transfer import BytesFetched

if TYPE_CHECKING:
    from m1local_quantize.source import Source


def fetched(
    model: str | None, *, offline: bool, keep_source: bool, revision: str | None = None
) -> Chosen:
    """What `model` names; of a repository the whole, or with `keep_source` unset all but weights.

    Without a `revision` it stays the one that was asked for before. Raises HubError where something
    would have to be fetched and `offline` is set.
    """
    if model is None or not library.is_repository(model):
        if revision is not None:
            raise usage_error(
                tr("--revision is of a repository on the hub; {model} is none.", model=model or "")
            )
        return library.find(model)
    folder = library.source_folder(model)
    record = Record.read(folder)
    asked = revision if revision is not None or record is None else record.asked
    if record is not None and record.asked != asked:
        record = None  # of another revision
    if record is not None and record.complete:
        return library.find(model)
    if keep_source or record is None or not record.described:
        if offline:
            raise HubError(
                tr(
                    "{model} is not on this disk yet, and --offline forbids to fetch it.",
                    model=model,
                )
            )
        pull_with_progress(model, folder, revision=asked, weights=keep_source)
    record = Record.read(folder)
    if record is not None and record.complete:
        return library.find(model)
    return Chosen(folder, model.partition("/")[2], repository=model)


def completed(chosen: Chosen, *, offline: bool) -> Chosen:
    """A checkpoint that is needed as a whole: of a repository, its weights come too.

    Raises HubError where they would have to and `offline` is set.
    """
    if chosen.repository is None:
        return chosen
    if offline:
        raise HubError(_not_here(chosen.repository))
    record = Record.read(chosen.folder)
    asked = None if record is None else record.asked
    pull_with_progress(chosen.repository, chosen.folder, revision=asked)
    return library.find(chosen.repository)


def open_source(chosen: Chosen, *, offline: bool, whole: bool = True) -> "Source":
    """The original to be quantized, whose weights may still have to come.

    Where the `whole` of it is going to be read, that begins while torch is being imported.
    Raises HubError where weights would have to come and `offline` is set.
    """
    hashes = FileHashes(chosen.folder)
    if whole and chosen.repository is None:
        hashes.begin_early()
    from m1local_quantize.source import Source  # torch, which `m1 --help` must not load

    if chosen.repository is None:
        return Source.open(chosen.folder, hashes=hashes)
    if offline:
        raise HubError(_not_here(chosen.repository))
    from m1local_quantize.arriving import ArrivingFiles

    record = Record.read(chosen.folder)
    asked = None if record is None else record.asked
    found = Repository.find(chosen.repository, chosen.folder, revision=asked)
    return Source.open(chosen.folder, ArrivingFiles.of(found))


def _not_here(repository: str) -> str:
    return tr(
        "The weights of {repository} are not on this disk, and --offline forbids to fetch them.",
        repository=repository,
    )


def pull_with_progress(
    repository: str, folder: Path, *, revision: str | None = None, weights: bool = True
) -> None:
    """Fetch `repository` into `folder`, or all but its weights."""
    show_licence_once(repository)
    console = stderr_console()
    begun, total = time.monotonic(), 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(tr("fetching {repository}", repository=repository), total=None)
        for event in pull(repository, folder, revision=revision, weights=weights):
            if isinstance(event, BytesFetched | FileFetched):
                total = event.total_bytes
                bar.update(task, total=total, completed=event.done_bytes)
    seconds = time.monotonic() - begun
    if weights:
        console.print(
            tr(
                "{repository}: {size} in {seconds:.0f} s, every hash checked",
                repository=repository,
                size=size_text(total),
                seconds=seconds,
            )
        )


def note_licence(folder: Path) -> None:
    """Show the licence note of the source in `folder` once; the demo is this project's own."""
    if folder.resolve() != home.DEMO.resolve():
        record = Record.read(folder)
        show_licence_once(str(folder.resolve()) if record is None else record.repository)
