"""Markdown in a terminal while it is still being written.

What it is: finished blocks are printed for good, the last one is drawn again as it grows, and of a
block that is taller than the screen its end; so nothing flickers and everything stays in the
scrollback. Nothing is hidden: raw HTML, the addresses of links and pictures, and what would be a
link's definition are shown, and a line's end stays one. What it is not: a Markdown of its own;
markdown-it finds the blocks, rich renders them.
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
DRAWING_SHARE = 5  # times as long as it took to draw, nothing is drawn
ROWS_LEFT = 3  # of the screen, below a tall block


class MarkdownStream:
    """Push text, end it once."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`, a terminal."""
        self._console = console
        self._parser = _parser()
        self._whole = ""
        self._text = ""  # of the blocks that are not printed for good yet
        self._size = console.size
        self._printed = False
        self._draw_at = 0.0  # not before
        self._live = _live(console)

    def push(self, text: str) -> None:
        """More of the answer; drawn at most every `REFRESH_SECONDS`, long blocks less often."""
        self._text += text
        self._whole += text
        begun = time.monotonic()
        if begun < self._draw_at:
            return
        if self._console.size != self._size:
            self._begin_again()
        self._print_finished()
        if not self._live.is_started:
            self._live.start()
        self._live.update(_Lines(_PlainMarkdown(self._text), growing=True), refresh=True)
        ended = time.monotonic()
        self._draw_at = ended + max(REFRESH_SECONDS, DRAWING_SHARE * (ended - begun))

    def end(self) -> None:
        """Print what is left; the cursor is then on a line of its own."""
        if self._live.is_started:
            self._live.stop()
        for block in self._blocks():
            self._print(block)
        self._text = ""

    def _begin_again(self) -> None:
        """Draw all of it on a clean screen: in another size nobody knows which rows were ours.

        What was on the screen is scrolled away, not erased.
        """
        if self._live.is_started:
            self._live.stop()
        self._console.file.write("\n" * self._console.height + "\x1b[H")
        self._text, self._printed, self._size = self._whole, False, self._console.size
        self._live = _live(self._console)

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


def _live(console: Console) -> Live:
    return Live(console=console, auto_refresh=False, transient=True)


class _PlainMarkdown(Markdown):
    """Markdown without HTML, which rich would leave out, and without hidden link targets."""

    def __init__(self, text: str) -> None:
        super().__init__(text, hyperlinks=False, code_theme="ansi_dark")
        self.parsed = _parser().parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


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
    chosen = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return chosen.disable(["reference", "image"])
