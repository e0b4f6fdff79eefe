"""The conversation in a terminal.

What it is: the loop that reads a message or a command and shows the answer. What it is not: the
editor (line_editor.py), the commands (slash.py), the drawing (answer_view.py), or the conversation
itself (conversation.py).
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from m1local.errors import M1Error
from m1local_app.answer_view import StoppedError, note, note_advice, print_answer
from m1local_app.boundary import INTERRUPTED, error_line
from m1local_app.language import tr
from m1local_app.line_editor import Message, line_editor
from m1local_app.slash import PATH_COMMANDS, Leave, SlashCommands, command_names

if TYPE_CHECKING:
    from m1local.generate import Event
    from m1local_app.conversation import Conversation


HELD_SECONDS = 0.7  # for so long Ctrl-C after a stopped answer means that answer still


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
        self._prefill = ""  # what stood at the prompt before the user typed
        self._interrupted = False  # whether Ctrl-C was the last thing that came
        self._stopped_at = -HELD_SECONDS
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
        while True:
            try:
                if (message := self._read()) is not None:
                    self._take(message)
            except EOFError:
                sys.stderr.write("\n")
                return
            except Leave:
                return

    def _read(self) -> Message | None:
        """The next message; None where Ctrl-C came instead, which leaves when it came before."""
        self._editor.multi = self._slash.multi
        self._prefill, self._slash.ask_again = self._slash.ask_again, ""
        try:
            message = self._editor.read(self._prefill)
        except KeyboardInterrupt:
            if time.monotonic() - self._stopped_at < HELD_SECONDS:
                return None  # the key that stopped the answer is still held down
            if self._interrupted and not self._editor.cleared:
                raise typer.Exit(INTERRUPTED) from None
            self._interrupted, self._slash.editing = True, None
            note(tr("(Ctrl-C again leaves; Ctrl-D and /bye do, too)"))
            return None
        self._interrupted = False
        return message

    def _take(self, message: Message) -> None:
        """Obey or answer; whatever went wrong is one line, and the conversation goes on."""
        editing, self._slash.editing = self._slash.editing, None
        events, before = None, self._conversation.session.answering
        try:
            if self._is_command(message, editing):
                editing, events = None, self._slash.obey(message.text)
            elif message.text.strip():
                note_advice(message.unescaped)
                events = self._events(message.unescaped, editing)
            if events is not None:
                self._show(events)
        except StoppedError as stopped:
            self._stopped_at, self._slash.ask_again = time.monotonic(), str(stopped)
            note(tr("[stopped]"))
        except KeyboardInterrupt:
            note(tr("[stopped]"))
        except M1Error as error:
            error_line(" ".join(str(error).split()))
        finally:
            if events is not None:
                events.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
        if events is not None:
            session = self._conversation.session
            reply = session.answering
            answered = reply is not before and bool(session.turns) and session.turns[-1] is reply
            self._after(message, editing, answered=answered)

    def _after(self, message: Message, editing: int | None, *, answered: bool) -> None:
        """Give a question without an answer back, and say what else there is to say."""
        if not answered and not self._raw:
            typed = self._slash.ask_again
            self._slash.ask_again = "\n".join(part for part in (message.text, typed) if part)
            self._slash.editing = editing
            note(tr("[no answer: the question is at the prompt again]"))
        if news := self._conversation.news():
            note(news)
        if trouble := self._conversation.trouble():
            error_line(" ".join(trouble.split()))
        sys.stderr.write("\n")  # a little air between an answer and the next question

    def _is_command(self, message: Message, editing: int | None) -> bool:
        """Whether a message is for the terminal; a text that is being edited is for the model."""
        if not message.is_command:
            return False
        return editing is None or (
            message.text != self._prefill and self._slash.knows(message.text)
        )

    def _events(self, text: str, editing: int | None) -> Iterator["Event"]:
        session = self._conversation.session
        if self._raw:
            return session.engine.complete(text, session.settings)
        if editing is not None:
            return self._conversation.edit(editing, text)
        return self._conversation.send(text)

    def _show(self, events: Iterator["Event"]) -> None:
        session = self._conversation.session
        typed = print_answer(
            events,
            stats=self._slash.stats,
            markdown=self._markdown and session.settings.json_schema is None,
            used=lambda: (session.used_tokens, session.engine.contexts.capacity),
        )
        self._slash.ask_again = typed

    def _meter(self) -> str:
        """How full the context is, for the right edge of the prompt; nothing while it is empty."""
        session = self._conversation.session
        if not session.turns:
            return ""
        return f"{session.used_tokens / session.engine.contexts.capacity:.0%}"
