"""Markdown in a terminal while it is still being written.

What it is: finished blocks are printed for good, the last one is drawn again as it grows, and of a
block that is taller than the screen its end; so nothing flickers and everything stays in the
scrollback. What it is not: a Markdown of its own; markdown-it finds the blocks, rich renders them.
Raw HTML and links are shown as the text they are.
"""

import time
from collections.abc import Iterator
from itertools import pairwise

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
        self._live.update(_Lines(_PlainMarkdown(self._text), growing=True), refresh=True)
        self._drawn_at = time.monotonic()

    def end(self) -> None:
        """Print what is left; the cursor is then on a line of its own."""
        if self._live.is_started:
            self._live.stop()
        for block in self._blocks():
            self._print(block)
        self._text = ""

    def _print_finished(self) -> None:
        """Print the blocks before the last one, which alone may still change."""
        *finished, self._text = self._blocks() or [""]
        for block in finished:
            self._print(block)

    def _blocks(self) -> list[str]:
        """The text, cut where its top-level blocks begin."""
        starts = [
            token.map[0]
            for token in self._parser.parse(self._text)
            if token.level == 0 and token.map is not None and token.nesting >= 0
        ]
        lines = self._text.splitlines(keepends=True)
        cuts = [0, *starts[1:], len(lines)]
        return ["".join(lines[start:stop]) for start, stop in pairwise(cuts)]

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        if self._printed:
            self._console.print()
        self._console.print(_Lines(_PlainMarkdown(text)))
        self._printed = True


class _PlainMarkdown(Markdown):
    """Markdown without HTML, which rich would leave out, and without hidden link targets."""

    def __init__(self, text: str) -> None:
        super().__init__(text, hyperlinks=False, code_theme="ansi_dark")
        self.parsed = _parser().parse(text)


class _Lines:
    """A block without blank lines around it; of a growing one as much as there is room for."""

    def __init__(self, markdown: Markdown, *, growing: bool = False) -> None:
        self._markdown = markdown
        self._growing = growing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._markdown, options, pad=False)
        while lines and not _visible(lines[0]):
            del lines[0]
        while lines and not _visible(lines[-1]):
            del lines[-1]
        if self._growing:
            del lines[: -max(1, console.height - ROWS_LEFT)]
        yield from _joined(lines)
        if not self._growing:
            yield Segment.line()


def _visible(line: list[Segment]) -> bool:
    return any(segment.text.strip() or segment.style for segment in line)


def _joined(lines: list[list[Segment]]) -> Iterator[Segment]:
    for number, line in enumerate(lines):
        if number:
            yield Segment.line()
        yield from line


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
