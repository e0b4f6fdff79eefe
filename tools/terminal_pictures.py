"""Pictures of the terminal for docs/: `python -m tools.terminal_pictures`.

What it is: `m1 run` with the demo in a pseudo-terminal, driven by a script of keys, drawn as HTML
by rich and photographed by a headless Chromium. What it is not: a test; tests/test_terminal.py is.
Needs pyte and chromium; POSIX only.
"""

import argparse
import io
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

from tests.screen import COLUMNS, Screen

DOCS = Path(__file__).parent.parent / "docs"
LINE_PIXELS, COLUMN_PIXELS, BORDER_PIXELS = 20, 9, 16
PAGE = """<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; padding: {border}px; background: #fbfbf9 }}
pre {{ margin: 0; font: 15px/{line}px "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace }}
</style><pre>{code}</pre>"""
# What is typed, and what must be there before the next is.
ENGLISH = (
    ("What is glaucoma?\r", r"context\s+\d"),
    ("How is asthma treated?\r", r"(?s)context\s+\d.*context\s+\d"),
    ("/edit 2 What are the symptoms of asthma?\r", r"(?s)symptoms of asthma.*context\s+\d"),
    ("/history\r", r"  2  What are"),
    ("/set temp 0.2\r", r"temp +0\.2"),
    ("/nonsense\r", r"no command"),
)
CHINESE = (
    ("/help\r", "Ctrl-G"),
    ("青光眼是什么？\r", "首个用时"),
    ("/undo\r", "已撤回"),
    ("高血压有哪些症状？", "症状？"),
)


def shown(screen: Screen) -> Text:
    """What stands on the screen and above it, with its colours."""
    emulated = screen._shown
    rows = [*emulated.history.top, *(emulated.buffer[y] for y in range(emulated.lines))]
    text = Text(end="")
    for row in rows:
        for x in range(COLUMNS):
            cell = row[x]
            colour = None if cell.fg == "default" else _named(cell.fg)
            text.append(cell.data, Style(color=colour, bold=cell.bold, italic=cell.italics))
        text.append("\n")
    text.rstrip()
    return text


def _named(colour: str) -> str:
    """The emulator's name of a colour in rich's words."""
    if colour.isalpha():
        return colour.replace("bright", "bright_").replace("brown", "yellow")
    return f"#{colour}"


def photograph(text: Text, target: Path) -> None:
    """Draw `text` as HTML and let Chromium save it as a PNG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(text)
    code = console.export_html(inline_styles=True, code_format="{code}")
    lines = text.plain.count("\n") + 1
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(
            PAGE.format(border=BORDER_PIXELS, line=LINE_PIXELS, code=code), encoding="utf-8"
        )
        width = COLUMNS * COLUMN_PIXELS + 2 * BORDER_PIXELS + 20
        height = lines * LINE_PIXELS + 2 * BORDER_PIXELS
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars",
             f"--window-size={width},{height}", f"--screenshot={target}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


def play(arguments: list[str], keys: tuple[tuple[str, str], ...], home: str) -> Text:
    """Run the script and return the last screen."""
    screen = Screen(["run", *arguments], {"M1_HOME": home})
    try:
        screen.wait_for("(?m)^>>>")
        for typed, expected in keys:
            screen.settle()
            screen.type(typed)
            screen.wait_for(expected)
        screen.settle()
        return shown(screen)
    finally:
        screen.close()


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        for name, arguments, keys in (
            ("terminal.png", ["-n", "80", "--seed", "1"], ENGLISH),
            ("terminal-zh.png", ["--lang", "zh", "-n", "40", "--seed", "1"], CHINESE),
        ):
            photograph(play(arguments, keys, home), DOCS / name)
            print(DOCS / name)


if __name__ == "__main__":
    main()
