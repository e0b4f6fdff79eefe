"""The conversation in a terminal.

What it is: the loop that reads a message or a command and shows the answer. What it is not: the
editor (line_editor.py), the commands (slash.py), the drawing (answer_view.py), or the conversation
itself (conversation.py).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from m1local.errors import M1Error
from m1local_app.answer_view import note, print_answer
from m1local_app.boundary import INTERRUPTED, error_line
from m1local_app.language import tr
from m1local_app.line_editor import line_editor
from m1local_app.slash import PATH_COMMANDS, Leave, SlashCommands, command_names

if TYPE_CHECKING:
    from m1local.generate import Event
    from m1local_app.conversation import Conversation


class Terminal:
    """An interactive conversation."""

    def __init__(
        self, conversation: "Conversation", *, folder: Path, raw: bool, stats: bool, markdown: bool
    ) -> None:
        """Talk through `conversation`; with `raw`, every line is continued without a template."""
        self._conversation = conversation
        self._raw = raw
        self._markdown = markdown
        self._slash = SlashCommands(conversation, folder=folder, stats=stats)
        store = conversation.store
        self._editor = line_editor(
            store.user_texts() if store is not None else [],
            commands=command_names(),
            path_commands=PATH_COMMANDS,
            meter=self._meter,
        )

    def run(self, unanswered: str = "") -> None:
        """Read and answer until the user leaves; `unanswered` is there to be sent again."""
        self._slash.ask_again = unanswered
        note(tr("/help lists the commands, Ctrl-D leaves."))
        interrupted = False
        while True:
            try:
                text = self._read()
            except EOFError:
                sys.stderr.write("\n")
                return
            except KeyboardInterrupt:
                if interrupted:
                    raise typer.Exit(INTERRUPTED) from None
                interrupted = True
                self._slash.editing = None
                note(tr("(Ctrl-C again leaves; Ctrl-D and /bye do, too)"))
                continue
            interrupted = False
            try:
                self._take(text)
            except Leave:
                return

    def _read(self) -> str:
        self._editor.multi = self._slash.multi
        default, self._slash.ask_again = self._slash.ask_again, ""
        return self._editor.read(default)

    def _take(self, text: str) -> None:
        """Obey or answer `text`; whatever went wrong is one line, and the conversation goes on."""
        editing, self._slash.editing = self._slash.editing, None
        is_command = editing is None and text.startswith("/")
        turns, events = self._conversation.session.turns, None
        try:
            if is_command:
                events = self._slash.obey(text)
            elif text.strip():
                events = self._events(text, editing)
            if events is not None:
                self._show(events)
        except KeyboardInterrupt:
            note(tr("[stopped]"))
        except M1Error as error:
            error_line(" ".join(str(error).split()))
        finally:
            if events is not None:
                events.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
        unanswered = self._conversation.session.turns is turns
        if events is not None and not is_command and not self._raw and unanswered:
            self._slash.ask_again, self._slash.editing = text, editing
            note(tr("[no answer: the question is at the prompt again]"))
        if events is not None:
            sys.stderr.write("\n")  # a little air between an answer and the next question

    def _events(self, text: str, editing: int | None) -> Iterator["Event"]:
        session = self._conversation.session
        if self._raw:
            return session.engine.complete(text, session.settings)
        if editing is not None:
            return self._conversation.edit(editing, text)
        return self._conversation.send(text)

    def _show(self, events: Iterator["Event"]) -> None:
        print_answer(
            events,
            stats=self._slash.stats,
            markdown=self._markdown,
            capacity=self._conversation.session.engine.contexts.capacity,
        )

    def _meter(self) -> str:
        """How full the context is, for the right edge of the prompt; nothing while it is empty."""
        session = self._conversation.session
        if not session.turns:
            return ""
        return f"{session.used_tokens / session.engine.contexts.capacity:.0%}"
