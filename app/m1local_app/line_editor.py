"""Reading what the user types: prompt_toolkit on a terminal, plain lines elsewhere.

What it is: keys, completion, history, messages of several lines and the editor. prompt_toolkit
knows how wide Chinese characters are, so that backspace and wrapping are right. What it is not:
aware of what the lines mean. Nothing typed is written to a file here.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'


class LineEditor(Protocol):
    """Whoever reads a message."""

    multi: bool  # whether Enter begins another line, and Alt-Enter sends

    def read(self, default: str = "") -> str:
        """One message, `default` being there to begin with; EOFError where there is no more."""
        ...


def line_editor(
    past: Sequence[str],
    *,
    commands: Iterable[str],
    path_commands: Iterable[str],
    meter: Callable[[], str],
) -> LineEditor:
    """The best editor for where stdin and stderr are.

    `past` are earlier messages, the latest last; `commands` can be completed, and after
    `path_commands` paths; `meter` is shown at the right of the prompt.
    """
    if not (sys.stdin.isatty() and draws()):
        return PlainEditor()
    return PromptEditor(past, commands=commands, path_commands=path_commands, meter=meter)


def draws() -> bool:
    """Whether stdout is a terminal on which the cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class PlainEditor:
    """Lines of stdin; the prompt goes to stderr, so that stdout holds answers only."""

    multi = False

    def read(self, default: str = "") -> str:
        """One line, or several between triple quotes, or all until an empty one."""
        line = self._line(PROMPT)
        if not self.multi and not line.startswith(QUOTES):
            return line
        if line.startswith("/"):
            return line
        lines, end = [line.removeprefix(QUOTES)], QUOTES if line.startswith(QUOTES) else ""
        while not (lines[-1].endswith(end) if end else not lines[-1]):
            lines.append(self._line(CONTINUED))
        return "\n".join(lines).removesuffix(QUOTES).strip("\n")

    @staticmethod
    def _line(prompt: str) -> str:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class PromptEditor:
    """A line editor of prompt_toolkit."""

    def __init__(
        self,
        past: Sequence[str],
        *,
        commands: Iterable[str],
        path_commands: Iterable[str],
        meter: Callable[[], str],
    ) -> None:
        """See `line_editor`."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory

        self.multi = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=InMemoryHistory(past),
            multiline=True,
            key_bindings=self._keys(),
            completer=_completer(commands, path_commands),
            complete_while_typing=False,
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else CONTINUED,
            rprompt=lambda: _while_editing(meter()),
            tempfile_suffix=".md",
        )

    def read(self, default: str = "") -> str:
        """One message; raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
        text = self._session.prompt(default=default)
        stripped = text.strip()
        if stripped.startswith(QUOTES):
            return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
        return text

    def _keys(self) -> "KeyBindings":
        from prompt_toolkit.filters import is_searching
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("enter", filter=~is_searching)
        def _enter(event: "KeyPressEvent") -> None:
            text = event.current_buffer.text
            if unfinished(text, multi=self.multi):
                event.current_buffer.insert_text("\n")
            else:
                event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=~is_searching)
        def _alt_enter(event: "KeyPressEvent") -> None:
            if self.multi:
                event.current_buffer.validate_and_handle()
            else:
                event.current_buffer.insert_text("\n")

        @keys.add("c-g", filter=~is_searching)
        def _editor(event: "KeyPressEvent") -> None:
            event.current_buffer.open_in_editor(validate_and_handle=False)

        return keys


def _while_editing(text: str) -> "StyleAndTextTuples":
    """`text` dimmed; nothing once the message is sent, so that it does not stay on the screen."""
    from prompt_toolkit.application import get_app

    return [] if get_app().is_done else [("fg:ansibrightblack", text)]


def unfinished(text: str, *, multi: bool) -> bool:
    """Whether Enter begins another line instead of sending `text`."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        closed = stripped.endswith(QUOTES) and len(stripped) >= 2 * len(QUOTES)
        return not closed
    return multi and not stripped.startswith("/")


def _completer(commands: Iterable[str], path_commands: Iterable[str]) -> "Completer":
    """Slash commands at the beginning of a message, paths after some of them."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    names, with_path = sorted(commands), tuple(f"{name} " for name in path_commands)
    paths = PathCompleter(expanduser=True)

    class SlashCompleter(Completer):
        def get_completions(
            self, document: Document, complete_event: "CompleteEvent"
        ) -> Iterator[Completion]:
            text = document.text_before_cursor
            if text.startswith(with_path):
                rest = text.partition(" ")[2]
                yield from paths.get_completions(Document(rest, len(rest)), complete_event)
            elif text.startswith("/") and " " not in text:
                for name in names:
                    if name.startswith(text):
                        yield Completion(name, start_position=-len(text))

    return SlashCompleter()
