"""`m1 push`: what would be published, the question, and the sending with a progress bar.

What it is: a checkpoint checked as `m1 verify` does it, then publish.py's findings and events for a
person. What it is not: the upload.
"""

import sys
import time
from pathlib import Path

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from m1local.checkpoint import is_quantized
from m1local.errors import CheckpointError
from m1local_app.boundary import ask, stderr_console
from m1local_app.checks import verify_checkpoint
from m1local_app.columns import aligned
from m1local_app.kept import size_text
from m1local_app.language import tr
from m1local_app.progress import quality_line
from m1local_quantize.card import Origin, licence_facts
from m1local_quantize.hub import is_licence
from m1local_quantize.insist import TriedAgain
from m1local_quantize.publish import Publication, Published, Sending, check_repository, publish


def push(folder: Path, repository: str, *, private: bool, ask: bool) -> None:
    """Check the checkpoint in `folder`, say what would be published, ask, and publish it.

    Raises CheckpointError for one that is not whole, or not quantized, and HubError where the hub
    refuses or cannot be reached.
    """
    check_repository(repository)
    if not is_quantized(folder):
        raise CheckpointError(
            tr(
                "{folder} is an original checkpoint: its weights are their maker's to publish. "
                "Make a quantized one with `m1 quantize SRC OUT`, and push that.",
                folder=folder,
            )
        )
    typer.echo(verify_checkpoint(folder), err=True)
    publication = Publication.prepare(folder, repository, private=private)
    typer.echo(plan(publication, asked_for_private=private), err=True)
    if publication.exists and publication.there_bytes == publication.total_bytes:
        said = tr(
            "All of it lies in {repository} already; nothing was sent.", repository=repository
        )
        typer.echo(said, err=True)
        return
    if ask:
        _ask(repository)
    try:
        _send(publication)
    except KeyboardInterrupt:
        typer.echo(tr("What was sent is kept; the same command goes on from there."), err=True)
        raise


def _ask(repository: str) -> None:
    ask(
        tr("Publish it as {repository}?", repository=repository),
        tr("nobody can be asked here; add --yes to publish without a question."),
    )


def plan(publication: Publication, *, asked_for_private: bool) -> str:
    """What is going to happen, as aligned lines, and what the licence says."""
    facts = publication.facts
    certificate = facts.manifest.certificate
    names = [file.name for file in publication.files]
    size = size_text(publication.total_bytes)
    rows = [
        (tr("repository"), _place(publication, asked_for_private)),
        (tr("source"), facts.manifest.source),
        (tr("recipe"), facts.manifest.recipe),
        (tr("quality"), tr("not measured") if certificate is None else quality_line(certificate)),
        (tr("files"), tr("{count}, {size}", count=len(names), size=size)),
    ]
    for file in publication.files:
        rows.append(("", f"{_file_size(file.nbytes):>10}  {_file_name(file.name, publication)}"))
    if facts.origin is Origin.BAICHUAN and not any(is_licence(name) for name in names):
        said = tr("no copy lies in the checkpoint; the card links to the maker's")
        rows.append((tr("agreement"), said))
    rows.append((tr("licence"), licence_facts(facts.origin)))
    return aligned(rows)


def _file_size(nbytes: int) -> str:
    return size_text(nbytes) if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def _file_name(name: str, publication: Publication) -> str:
    if name in publication.there:
        return tr("{name} (there already)", name=name)
    return tr("{name} (replaced)", name=name) if name in publication.replaced else name


def _place(publication: Publication, asked_for_private: bool) -> str:
    name = publication.repository
    if not publication.exists and publication.private:
        return tr(
            "{name} (new; private: others do not see it; --public makes it public)", name=name
        )
    if not publication.exists:
        return tr("{name} (new; public: everybody sees it)", name=name)
    if not publication.private:
        return tr("{name} (exists; public: everybody sees it)", name=name)
    if asked_for_private:
        return tr("{name} (exists; private: others do not see it)", name=name)
    return tr(
        "{name} (exists; private: others do not see it, and it stays so: its page on the hub "
        "changes that)",
        name=name,
    )


def _send(publication: Publication) -> None:
    console = stderr_console()
    begun = time.monotonic()
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None),
        DownloadColumn(binary_units=True), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(tr("publishing"), total=publication.total_bytes)
        for event in publish(publication):
            if isinstance(event, Sending):
                bar.update(task, description=_described(event), completed=event.done_bytes)
            elif isinstance(event, TriedAgain):
                said = tr(
                    "The connection failed ({reason}); again in {seconds:.0f} s.",
                    reason=event.reason,
                    seconds=event.seconds,
                )
                console.print(said, markup=False)
            elif isinstance(event, Published):
                said = tr(
                    "Published {repository}: {size} sent in {seconds:.0f} s, every hash checked. "
                    "{url} · m1 run {repository}",
                    repository=event.repository,
                    size=size_text(publication.total_bytes - publication.there_bytes),
                    seconds=time.monotonic() - begun,
                    url=event.url,
                )
                console.print(said, markup=False, soft_wrap=True)


def _described(event: Sending) -> str:
    if not event.names:
        return tr("checking")
    if len(event.names) == 1:
        return tr("sending {name}", name=event.names[0])
    return tr("sending {count}", count=len(event.names))
