"""Markdown in a terminal while it is still being written.

What it is: finished blocks are printed for good, the last one is drawn again as it grows, and of a
block that is taller than the screen its end; so nothing flickers and everything stays in the
scrollback. What it is not: a Markdown of its own; markdown-it finds the blocks, rich renders them.
Raw HTML and links are shown as the text they are.
"""

import time
from collections.abc import Iterator

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

REFRESH_SECONDS = 0.08
ROWS_LEFT = 3  # of the screen, below a tall block


class MarkdownStream:
    """Push text, end it once."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`, a terminal."""
        self._console = console
        self._parser = _parser()
        self._text = ""  # of the blocks that are not printed for good yet
        self._printed = False
        self._drawn_at = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def push(self, text: str) -> None:
        """More of the answer; drawn at most every `REFRESH_SECONDS`."""
        self._text += text
        if time.monotonic() - self._drawn_at < REFRESH_SECONDS:
            return
        self._print_finished()
        if not self._live.is_started:
            self._live.start()
        self._live.update(_Tail(self._text), refresh=True)
        self._drawn_at = time.monotonic()

    def end(self) -> None:
        """Print what is left; the cursor is then on a line of its own."""
        if self._live.is_started:
            self._live.stop()
        self._print(self._text)
        self._text = ""

    def _print_finished(self) -> None:
        """Print the blocks before the last one, which alone may still change."""
        starts = [
            token.map[0]
            for token in self._parser.parse(self._text)
            if token.level == 0 and token.map is not None and token.nesting >= 0
        ]
        if len(starts) > 1:
            lines = self._text.splitlines(keepends=True)
            self._print("".join(lines[: starts[-1]]))
            self._text = "".join(lines[starts[-1] :])

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        if self._printed:
            self._console.print()
        self._console.print(_PlainMarkdown(text))
        self._printed = True


class _PlainMarkdown(Markdown):
    """Markdown without HTML, which rich would leave out, and without hidden link targets."""

    def __init__(self, text: str) -> None:
        super().__init__(text, hyperlinks=False, code_theme="ansi_dark")
        self.parsed = _parser().parse(text)


class _Tail:
    """The last rows of a block, as many as the screen has room for."""

    def __init__(self, text: str) -> None:
        self._markdown = _PlainMarkdown(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._markdown, options, pad=False)
        yield from _joined(lines[-max(1, console.height - ROWS_LEFT) :])


def _joined(lines: list[list[Segment]]) -> Iterator[Segment]:
    for number, line in enumerate(lines):
        if number:
            yield Segment.line()
        yield from line


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
