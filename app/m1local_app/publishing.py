"""`m1 push`: what would be published, the question, and the sending with a progress bar.

What it is: a checkpoint checked as `m1 verify` does it, then publish.py's findings and events for a
person. What it is not: the upload.
"""

import sys
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from m1local.checkpoint import is_quantized
from m1local.errors import CheckpointError
from m1local_app.boundary import usage_error
from m1local_app.checks import verify_checkpoint
from m1local_app.kept import size_text
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
            f"{folder} is an original checkpoint: its weights are their maker's to publish. Make "
            "a quantized one with `m1 quantize SRC OUT`, and push that."
        )
    typer.echo(verify_checkpoint(folder), err=True)
    publication = Publication.prepare(folder, repository, private=private)
    typer.echo(plan(publication, asked_for_private=private), err=True)
    if publication.exists and publication.there_bytes == publication.total_bytes:
        typer.echo(f"All of it lies in {repository} already; nothing was sent.", err=True)
        return
    if ask:
        if not is_terminal():
            raise usage_error("nobody can be asked here; add --yes to publish without a question.")
        if not typer.confirm(f"Publish it as {repository}?", err=True):
            raise typer.Exit(1)
    try:
        _send(publication)
    except KeyboardInterrupt:
        typer.echo("What was sent is kept; the same command goes on from there.", err=True)
        raise


def plan(publication: Publication, *, asked_for_private: bool) -> str:
    """What is going to happen, as aligned lines, and what the licence says."""
    facts = publication.facts
    certificate = facts.manifest.certificate
    rows = [
        ("repository", f"{publication.repository} ({_state(publication, asked_for_private)})"),
        ("source", facts.manifest.source),
        ("recipe", facts.manifest.recipe),
        ("quality", "not measured" if certificate is None else quality_line(certificate)),
        ("files", f"{len(publication.files)}, {size_text(publication.total_bytes)}"),
    ]
    for file in publication.files:
        state = "replaced" if file.name in publication.replaced else ""
        state = "there already" if file.name in publication.there else state
        rows.append(("", f"{_file_size(file.nbytes):>10}  {file.name}{state and f' ({state})'}"))
    names = [file.name for file in publication.files]
    if facts.origin is Origin.BAICHUAN and not any(is_licence(name) for name in names):
        rows.append(("agreement", "no copy lies in the checkpoint; the card links to the maker's"))
    rows.append(("licence", licence_facts(facts.origin)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def is_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def _file_size(nbytes: int) -> str:
    return size_text(nbytes) if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def _state(publication: Publication, asked_for_private: bool) -> str:
    seen = "private: others do not see it" if publication.private else "public: everybody sees it"
    if not publication.exists:
        return f"new; {seen}" + ("; --public makes it public" if publication.private else "")
    if publication.private and not asked_for_private:
        return f"exists; {seen}, and it stays so: its page on the hub changes that"
    return f"exists; {seen}"


def _send(publication: Publication) -> None:
    console = Console(stderr=True, highlight=False)
    begun = time.monotonic()
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None),
        DownloadColumn(binary_units=True), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("publishing", total=publication.total_bytes)
        for event in publish(publication):
            if isinstance(event, Sending):
                bar.update(task, description=_described(event), completed=event.done_bytes)
            elif isinstance(event, TriedAgain):
                said = f"The connection failed ({event.reason}); again in {event.seconds:.0f} s."
                console.print(said, markup=False)
            elif isinstance(event, Published):
                sent = size_text(publication.total_bytes - publication.there_bytes)
                seconds = time.monotonic() - begun
                console.print(
                    f"Published {event.repository}: {sent} sent in {seconds:.0f} s, every hash "
                    f"checked. {event.url} · m1 run {event.repository}",
                    markup=False,
                    soft_wrap=True,
                )


def _described(event: Sending) -> str:
    if not event.names:
        return "checking"
    return f"sending {event.names[0]}" if len(event.names) == 1 else f"sending {len(event.names)}"
