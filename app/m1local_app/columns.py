"""Texts in a terminal: what may be printed, how wide it is, and tables of it.

What it is: functions on strings, with Chinese characters two columns wide. What it is not: colour.
"""

import re
from collections.abc import Sequence

# What a terminal would obey instead of showing it: control characters (C0, DEL, C1), and those that
# turn the direction of what follows. Halves of surrogate pairs cannot be written at all.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
ELLIPSIS = "…"
GAP = "  "
NOT_FIRST = "，。、；：？！）》」』”’…%"  # on a line
NOT_LAST = "（《「『“‘"


def printable(text: str) -> str:
    """`text` that only shows: what a terminal would obey is replaced; newline and tab stay."""
    return OBEYED.sub(REPLACEMENT, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`text`, printable, on one line, with single spaces."""
    return " ".join(printable(text).split())


def width(text: str) -> int:
    """Terminal columns of one line."""
    from rich.cells import cell_len  # loads tables of Unicode

    return cell_len(text)


def shortened(text: str, columns: int) -> str:
    """`text` in at most `columns`; what does not fit is cut off and marked by an ellipsis."""
    if width(text) <= columns:
        return text
    left = columns - width(ELLIPSIS)
    end = 0
    while end < len(text) and (left := left - width(text[end])) >= 0:
        end += 1
    return (text[:end].rstrip() + ELLIPSIS) if columns >= width(ELLIPSIS) else ""


def breaks(text: str, columns: int) -> list[int]:
    """Where a line is broken so that each part fits into `columns`, spaces at its end apart.

    After a space, or beside a wide character; within a word only where it is longer than that.
    """
    found: list[int] = []
    start = last = used = 0
    for at, character in enumerate(text):
        if at > start and _breaks(text[at - 1], character):
            last = at
        if character != " " and used + width(character) > columns and at > start:
            start = last if last > start else at
            found.append(start)
            used = width(text[start:at])
        used += width(character)
    return found


def _breaks(before: str, after: str) -> bool:
    if before == " " or after == " ":
        return after != " "
    wide = width(before) > 1 or width(after) > 1
    return wide and after not in NOT_FIRST and before not in NOT_LAST


def table(rows: Sequence[Sequence[str]], *, heads: Sequence[str] | None = None) -> str:
    """Rows of cells, each one line, in aligned columns; `heads` come first."""
    lines = [[one_line(cell) for cell in row] for row in ([heads] if heads else []) + [*rows]]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The same of cells that are printed as they are."""
    widths = [max(width(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        GAP.join(padded(cell, most) for cell, most in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def padded(text: str, columns: int) -> str:
    """`text`, with spaces up to so many `columns`."""
    return text + " " * (columns - width(text))
