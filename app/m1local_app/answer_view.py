"""An answer as it appears: events to text on stdout, everything about it on stderr.

What it is: the one place that prints a generation's events in a terminal or a pipe, so that
`m1 run -p … > answer.txt` is clean. What it is not: a conversation, or the web page's view.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from m1local_app.boundary import stderr_console
from m1local_app.columns import printable
from m1local_app.interrupt import Keyboard
from m1local_app.language import series, tr
from m1local_app.red_flags import advice

if TYPE_CHECKING:
    from m1local.generate import Event, Finished, TurnsDropped

LONG_PROMPT_TOKENS = 512


def note(text: str, *, copied: bool = False) -> None:
    """Say something that is not an answer: on stderr, dimmed, at a terminal wrapped by words.

    Unless it is to be `copied`, as a command is, which is one line however long.
    """
    style = None if os.environ.get("NO_COLOR") else "dim"
    stderr_console().print(text, style=style, soft_wrap=copied or None)


def note_advice(question: str) -> None:
    """Say what there is to say before the answer where `question` has words of an emergency."""
    if (urgent := advice(question)) is not None:
        note(urgent)


def print_answer(
    events: Iterator["Event"],
    *,
    stats: bool,
    markdown: bool = False,
    used: Callable[[], tuple[int, int]] | None = None,
) -> str:
    """Print an answer as it comes; then why it ended and, if wanted, how fast it came.

    `used` says how much of the context is taken, and how much there is. Returns what was typed
    meanwhile. Raises StoppedError, between two events, when the user pressed Ctrl-C.
    """
    from m1local.generate import Finished, PrefillProgress, TextDelta, TurnsDropped  # loads torch

    finished, view, reading = None, _view(markdown), ReadingLine()
    with Keyboard() as keyboard:
        try:
            for event in events:
                if isinstance(event, PrefillProgress):
                    reading.show(event.done_tokens, event.total_tokens)
                else:
                    reading.wipe()
                if isinstance(event, TurnsDropped):
                    view.interrupt()
                    note(dropped_line(event))
                elif isinstance(event, TextDelta):
                    view.push(event.text)
                elif isinstance(event, Finished):
                    finished = event
                if keyboard.interrupted() and finished is None:
                    break
        finally:
            reading.wipe()
            view.end()
    if finished is None:
        raise StoppedError(keyboard.typed)
    if (ended := ending_line(finished)) is not None:
        note(ended)
    if stats:
        note(speed_line(finished, used))
    return keyboard.typed


class StoppedError(Exception):
    """The user stopped an answer; `args[0]` is what was typed meanwhile."""


class PlainView:
    """Text as it is; on a terminal without the characters that would steer it."""

    def __init__(self) -> None:
        """Print to stdout."""
        self._at_terminal = sys.stdout.isatty()
        self._at_line_start = True

    def push(self, text: str) -> None:
        """Print more."""
        self._write(printable(text) if self._at_terminal else text)
        self._at_line_start = text.endswith("\n") if text else self._at_line_start

    def interrupt(self) -> None:
        """Make way for a note, which is only seen between the words on a terminal."""
        if self._at_terminal:
            self.end()

    def end(self) -> None:
        """End the last line."""
        if not self._at_line_start:
            self._write("\n")
            self._at_line_start = True

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class MarkdownView:
    """Rendered Markdown."""

    def __init__(self) -> None:
        """Draw on the terminal that stdout is."""
        from rich.console import Console

        from m1local_app.markdown_stream import MarkdownStream

        self._console = Console(highlight=False)
        self._stream = MarkdownStream(self._console)

    def push(self, text: str) -> None:
        """Draw more."""
        self._stream.push(printable(text))

    def interrupt(self) -> None:
        """Make way for a note: what was drawn so far stays."""
        self._stream.end()

    def end(self) -> None:
        """Draw what is left."""
        self._stream.end()


def _view(markdown: bool) -> PlainView | MarkdownView:
    return MarkdownView() if markdown else PlainView()


class ReadingLine:
    """How much of a long prompt has been read, on a line that is wiped in the end."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._shown = False

    def show(self, done: int, total: int) -> None:
        """Show progress, at a terminal and of a prompt that takes a while."""
        if total >= LONG_PROMPT_TOKENS and done < total and sys.stderr.isatty():
            text = tr("reading {done:,} of {total:,} tokens", done=done, total=total)
            sys.stderr.write(f"\r{text}\x1b[K\r")
            sys.stderr.flush()
            self._shown = True

    def wipe(self) -> None:
        """Make way for the answer, or a note."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def ending_line(finished: "Finished") -> str | None:
    """Why an answer ended, unless it ended by itself."""
    return {
        "length": tr("[the answer reached its limit; -n allows more]"),
        "context": tr("[the context is full; /clear starts afresh, --ctx-size allows more]"),
        "loop": tr("[stopped: the answer repeated itself; /retry asks again]"),
    }.get(finished.reason.value)


def dropped_line(dropped: "TurnsDropped") -> str:
    """What the model no longer sees."""
    return tr(
        "[the context is full: the model no longer sees {turns} older messages ({tokens} tokens)]",
        turns=dropped.turns,
        tokens=dropped.tokens,
    )


def speed_line(finished: "Finished", used: Callable[[], tuple[int, int]] | None) -> str:
    """Tokens, tokens per second, time to the first one, and how full the context is."""
    line = tr(
        "{new} tokens, {speed:.1f} tokens/s, first after {first:.2f} s ({read} read)",
        new=finished.new_tokens,
        speed=finished.tokens_per_second,
        first=finished.prefill_seconds,
        read=finished.prompt_tokens - finished.cached_tokens,
    )
    if finished.looked_up_tokens:
        line = series((line, tr("{count} looked up", count=finished.looked_up_tokens)))
    return f"[{line}]" if used is None else f"[{line}, {context_line(*used())}]"


def context_line(used: int, capacity: int) -> str:
    """How full the context is."""
    return tr(
        "context {used:,}/{capacity:,} ({share:.0%})",
        used=used,
        capacity=capacity,
        share=used / capacity,
    )
