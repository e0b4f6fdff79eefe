"""Conversations as files: Markdown and JSON; the HTML is in export_html.py.

What it is: `write_export`, which chooses the format by the file's name and writes all or nothing.
What it is not: a backup of the store; only JSON holds versions that are not shown.

In Markdown every text stands in a quotation, so that no answer can look like a part of the
transcript itself, and raw HTML and pictures are escaped (export_markdown.py). A file is readable by
its owner only.
"""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

from m1local.errors import M1Error, StorageError
from m1local_app.columns import OBEYED, printable
from m1local_app.export_markdown import quoted
from m1local_app.history import History, StoredMessage
from m1local_app.language import tr
from m1local_app.transcript import Transcript, answer_facts, notice, time_text

SUFFIXES = (".md", ".html", ".json")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!&~])")


def write_export(
    store: History, conversation_id: int, path: Path, *, overwrite: bool = False
) -> None:
    """Write a conversation to `path`, as .md, .html or .json; raises M1Error.

    A file that is there is replaced with `overwrite` only.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise M1Error(
            tr("{path} tells no format; let its name end in .md, .html or .json.", path=path)
        )
    _check_free(path, overwrite=overwrite)
    transcript = Transcript.of(store, conversation_id)
    _write(path, rendered(transcript, suffix))


def markdown(transcript: Transcript) -> str:
    """The transcript as Markdown."""
    parts = [f"# {_escaped(transcript.conversation.title)}", _quoted(notice())]
    parts.append(_listed(transcript.facts()))
    if transcript.conversation.system:
        parts += [f"## {tr('System prompt')}", _quoted(transcript.conversation.system)]
    for name, message in transcript.numbered():
        parts += [f"## {name}", time_text(message.created), _quoted(message.content)]
        if message.role == "assistant":
            parts.append(_listed(answer_facts(message)))
    return "\n\n".join(parts) + "\n"


def json_text(transcript: Transcript) -> str:
    """The transcript as JSON: all messages, each with its parent; `shown` names the shown path."""
    conversation = transcript.conversation
    value = {
        "format": "m1local conversation",
        "version": 1,
        "notice": notice(),
        "id": conversation.id,
        "title": conversation.title,
        "system": conversation.system,
        "created": conversation.created.isoformat(),
        "changed": conversation.changed.isoformat(),
        "exported": transcript.exported.isoformat(),
        "shown": [message.id for message in transcript.shown],
        "messages": [_json_message(message) for message in transcript.every],
    }
    text = json.dumps(value, ensure_ascii=False, indent=1)
    # Whole, and still safe to print: what a terminal would obey is written as an escape.
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _json_message(message: StoredMessage) -> dict[str, object]:
    return {
        "id": message.id,
        "parent": message.parent,
        "role": message.role,
        "content": message.content,
        "created": message.created.isoformat(),
        "finish": message.finish,
        "model": message.model,
        "checkpoint": message.checkpoint,
        "parameters": dict(message.parameters),
        "token_ids": list(message.token_ids),
    }


def rendered(transcript: Transcript, suffix: str) -> str:
    """The transcript in the format of one of SUFFIXES."""
    if suffix == ".md":
        return markdown(transcript)
    if suffix == ".json":
        return json_text(transcript)
    from m1local_app.export_html import html  # loads a Markdown parser

    return html(transcript)


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise StorageError(tr("{path} is a folder; name a file.", path=path))
    if os.path.lexists(path) and not overwrite:
        raise StorageError(
            tr("{path} is there already; name another file, or add --overwrite.", path=path)
        )


def _write(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader finds the old file or the whole new one."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=".m1-", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            tr(
                "{path} cannot be written ({reason}); check the folder and the space on the disk.",
                path=path,
                reason=error.strerror or error,
            )
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # gone where it was renamed
                temporary.unlink()


def _quoted(text: str) -> str:
    return quoted(printable(text))


def _listed(facts: list[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {_escaped(value)}" for name, value in facts)


def _escaped(line: str) -> str:
    """One line that means nothing in Markdown."""
    return _MARKDOWN.sub(r"\\\1", printable(line))
