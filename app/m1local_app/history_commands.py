"""The commands `m1 history …`: list, search, show, export, rename, delete, restore, purge.

What it is: Typer commands, each only wiring; cli.py joins them to `m1`. SQLite is imported inside
functions, since `m1 --help` must answer at once. What it is not: where anything is decided; the
store (history/) and the export do that. Answers go to stdout, notes to stderr.
"""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m1local_app.boundary import ask
from m1local_app.columns import one_line, printable, shortened, table
from m1local_app.language import tr

if TYPE_CHECKING:
    from m1local_app.history import Hit, StoredConversation, StoredMessage

SNIPPET_COLUMNS = 60
BEFORE = 20  # characters of a snippet before the first word that was searched
HOURS = {"h": 1, "d": 24, "w": 24 * 7}
MOST_HOURS = 24 * 366 * 1000


def parse_age(text: str) -> timedelta:
    """The time of "30d", "12h" or "4w"; raises typer.BadParameter."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*([hdw])\s*", text)
    hours = int(found[1]) * HOURS[found[2]] if found else MOST_HOURS
    if hours >= MOST_HOURS:
        message = tr("{text} is no age; write it as 12h, 30d or 4w.", text=repr(text[:40]))
        raise typer.BadParameter(message)
    return timedelta(hours=hours)


Name = Annotated[
    str,
    typer.Argument(metavar="ID|TITLE", help="The number that `m1 history list` shows, or a title."),
]
Binned = Annotated[
    str,
    typer.Argument(
        metavar="ID|TITLE", help="The number that `m1 history list --bin` shows, or a title."
    ),
]

history = typer.Typer(
    name="history", help="The conversations kept on this machine.", no_args_is_help=True
)


@history.command("list")
def list_conversations(
    limit: Annotated[
        int,
        typer.Option("--limit", "-n", min=1, max=10**6, metavar="N", help="How many at most."),
    ] = 50,
    binned: Annotated[bool, typer.Option("--bin", help="Those that were deleted.")] = False,
) -> None:
    """List the conversations, the last changed first.

    Example:  m1 history list --limit 10
    """
    from m1local_app.history import History

    with History.open() as store:
        found = store.conversations(limit=limit + 1, binned=binned)
    if not found:
        _note(tr("The bin is empty.") if binned else tr("No conversation is kept."))
        return
    typer.echo(_listed(found[:limit]))
    if len(found) > limit:
        _note(tr("There are more; --limit shows them."))


@history.command("search")
def search_messages(
    words: Annotated[list[str], typer.Argument(help="All must be in a message; in any case.")],
    limit: Annotated[
        int,
        typer.Option("--limit", "-n", min=1, max=10**6, metavar="N", help="How many at most."),
    ] = 50,
) -> None:
    """Find messages, in Chinese too, the newest first.

    Example:  m1 history search blood pressure
    """
    from m1local_app.history import History

    text = " ".join(words)
    with History.open() as store:
        hits = store.search(text, limit=limit + 1)
    if not hits:
        _note(tr("Nothing holds {words}.", words=one_line(text)))
        return
    heads = (tr("ID"), tr("WRITTEN"), tr("BY"), tr("TEXT"))
    typer.echo(table([_hit(hit, words[0]) for hit in hits[:limit]], heads=heads))
    if len(hits) > limit:
        _note(tr("There are more; --limit shows them."))


@history.command("show")
def show_conversation(name: Name) -> None:
    """Print a conversation as it was shown last.

    Example:  m1 history show 3
    """
    from m1local_app.history import History

    with History.open() as store:
        conversation = store.find(name, parts=True)
        messages = store.path(conversation.id)
    parts = [one_line(conversation.title)]
    if conversation.system:
        parts.append(_marked(tr("System prompt"), conversation.system))
    parts += [_message(message) for message in messages]
    typer.echo("\n\n".join(parts))


@history.command("export")
def export_conversation(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to write: .md, .html or .json.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is already there.")
    ] = False,
) -> None:
    """Write a conversation to a file: as a text, a page, or with all its versions.

    Example:  m1 history export 3 glaucoma.html
    """
    from m1local_app.export import write_export
    from m1local_app.history import History

    with History.open() as store:
        conversation = store.find(name)
        write_export(store, conversation.id, file, overwrite=overwrite)
    _note(tr("Wrote {file}. It is not encrypted; who has it can read it.", file=file))


@history.command("rename")
def rename_conversation(
    name: Name,
    title: Annotated[str, typer.Argument(help="The new title; '' for the first question.")],
) -> None:
    """Give a conversation another title.

    Example:  m1 history rename 3 "Glaucoma in the family"
    """
    from m1local_app.history import History

    with History.open() as store:
        conversation = store.find(name)
        store.rename(conversation.id, title)
        named = store.conversation(conversation.id)
    _note(tr("Conversation {id} is called {title} now.", id=named.id, title=named.title))


@history.command("delete")
def delete_conversation(name: Name) -> None:
    """Put a conversation into the bin; `m1 history purge` empties it.

    Example:  m1 history delete 3
    """
    from m1local_app.history import History

    with History.open() as store:
        conversation = store.find(name)
        store.delete(conversation.id)
    _note(
        tr(
            "Conversation {id}, {title}, is in the bin. `m1 history restore {id}` takes it out; "
            "`m1 history purge` deletes it for good.",
            id=conversation.id,
            title=conversation.title,
        )
    )


@history.command("restore")
def restore_conversation(name: Binned) -> None:
    """Take a conversation out of the bin; `m1 history list --bin` shows what is in it.

    Example:  m1 history restore 3
    """
    from m1local_app.history import History

    with History.open() as store:
        found = store.find(name, binned=True)
        store.restore(found.id)
    _note(tr("Conversation {id}, {title}, is listed again.", id=found.id, title=found.title))


@history.command("purge")
def purge_conversations(
    number: Annotated[
        int | None,
        typer.Argument(
            metavar="ID", show_default=False, help="Only this conversation, in the bin or not."
        ),
    ] = None,
    older_than: Annotated[
        timedelta | None,
        typer.Option(
            "--older-than", parser=parse_age, metavar="AGE",
            help="Only what was deleted (with ID: changed) so long ago: 12h, 30d or 4w.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:  # fmt: skip
    """Delete what is in the bin for good, to the last byte; asks first.

    Example:  m1 history purge --older-than 30d
    """
    from m1local_app.history import History

    with History.open() as store:
        if not yes:
            _ask(_question(number, older_than, len(store.conversations(binned=True))))
        count = store.purge(conversation_id=number, older_than=older_than)
    if count == 1:
        _note(tr("Deleted one conversation for good."))
    else:
        _note(tr("Deleted {count} conversations for good.", count=count))


def _question(number: int | None, older_than: timedelta | None, binned: int) -> str:
    if number is not None:
        return tr("Delete conversation {id} for good?", id=number)
    if older_than is not None:
        return tr("Delete what was put into the bin before that for good?")
    return tr("Delete everything in the bin ({count}) for good?", count=binned)


def _ask(question: str) -> None:
    ask(question, tr("nobody can be asked here; add --yes to delete for good."))


def _note(text: str) -> None:
    typer.echo(printable(text), err=True)


def _listed(found: Sequence["StoredConversation"]) -> str:
    heads = (tr("ID"), tr("CHANGED"), tr("MESSAGES"), tr("TITLE"))
    rows = [(str(one.id), _local(one.changed), str(one.messages), one.title) for one in found]
    return table(rows, heads=heads)


def _hit(hit: "Hit", word: str) -> tuple[str, str, str, str]:
    message = hit.message
    by = tr("you") if message.role == "user" else tr("model")
    written = _local(message.created)
    return (str(hit.conversation.id), written, by, snippet(message.content, word))


def snippet(text: str, word: str) -> str:
    """The part of `text` around `word`, on one short line."""
    line = one_line(text)
    start = max(line.casefold().find(one_line(word).casefold()) - BEFORE, 0)
    if start:
        line = "…" + line[start:]
    return shortened(line, SNIPPET_COLUMNS)


def _local(time: datetime) -> str:
    """A time as the clock on the wall shows it."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M")


def _message(message: "StoredMessage") -> str:
    from m1local_app.transcript import ending

    if message.role == "user":
        return _marked(tr("Question"), message.content)
    text = _marked(tr("Answer"), message.content)
    return text if message.finish == "stop" else f"{text}\n[{ending(message)}]"


def _marked(mark: str, text: str) -> str:
    """A text, safe to print, under what it is; no text can look like such a mark."""
    lines = printable(text).split("\n")
    return "\n".join([f"{mark}:", *(f"  {line}".rstrip() for line in lines)])
