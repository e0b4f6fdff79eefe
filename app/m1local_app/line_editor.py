"""Reading what the user types: prompt_toolkit on a terminal, plain lines elsewhere.

What it is: keys, completion, history, messages of several lines and the editor. prompt_toolkit
knows how wide Chinese characters are, so that backspace and wrapping are right. What it is not:
aware of what the lines mean. Nothing typed is written to a file here, but for the temporary one
that the editor of Ctrl-G is given; only its user can read it, and it is deleted afterwards.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from m1local_app.textfile import decoded

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Message:
    """What was typed; between triple quotes nothing is a command."""

    text: str
    is_quoted: bool = False

    @property
    def is_command(self) -> bool:
        """Whether it begins as a slash command does: not with a path, nor with two slashes."""
        first = self.text.partition(" ")[0].partition("\n")[0]
        return not self.is_quoted and first.startswith("/") and "/" not in first[1:]

    @property
    def unescaped(self) -> str:
        """The text for the model: of two slashes at the beginning one."""
        doubled = not self.is_quoted and self.text.startswith("//")
        return self.text[1:] if doubled else self.text


class LineEditor(Protocol):
    """Whoever reads a message."""

    multi: bool  # whether Enter begins another line, and Alt-Enter sends
    cleared: bool  # whether Ctrl-C has only emptied the line since the last message

    def read(self, default: str = "") -> Message:
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
    cleared = False

    def read(self, default: str = "") -> Message:
        """One line, or several between triple quotes, or all until an empty one.

        An empty line is `default`, which is shown first.
        """
        if default:
            sys.stderr.write(f"{default}\n")
        line = self._line(PROMPT)
        if default and not line:
            return Message(default)
        is_quoted = line.startswith(QUOTES)
        if not is_quoted and (not self.multi or line.startswith("/")):
            return Message(line)
        lines, end = [line.removeprefix(QUOTES)], QUOTES if is_quoted else ""
        while not (lines[-1].endswith(end) if end else not lines[-1]):
            lines.append(self._line(CONTINUED))
        return Message("\n".join(lines).removesuffix(QUOTES).strip("\n"), is_quoted)

    @staticmethod
    def _line(prompt: str) -> str:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        content = line.encode("utf-8", "surrogateescape")
        return (decoded(content) or content.decode("utf-8", "replace")).rstrip("\n")


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
        self.cleared = False
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

    def read(self, default: str = "") -> Message:
        """One message; raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C without text."""
        self.cleared = False
        text = self._session.prompt(default=default)
        stripped = text.strip()
        if stripped.startswith(QUOTES):
            inner = stripped.removeprefix(QUOTES).removesuffix(QUOTES)
            return Message(inner.strip("\n"), is_quoted=True)
        return Message(text)

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

        @keys.add("c-c", filter=~is_searching)
        def _ctrl_c(event: "KeyPressEvent") -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
                self.cleared = True
            else:
                event.app.exit(exception=KeyboardInterrupt)

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
