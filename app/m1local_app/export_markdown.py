"""Texts in exported Markdown: what a viewer would run, load or hide becomes the text it was.

What it is: raw HTML and pictures outside code, escaped; the rest stays as it was written, so
ordinary Markdown shows as before. Each `![` counts as a picture: whether it is one may be said in
another text of the file. What it is not: a renderer. Links stay: they wait for a click.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

AT = "at"  # a token's offset in the text of its block
ACTING = ("html_inline", "image")
CODE = ("fence", "code_block")
PASSES = 4  # what is escaped no longer hides what follows, which may be HTML then
# A line that begins so, after marks of quotations and lists, begins a block of HTML for a viewer,
# even without an end; an address in angle brackets does not.
BLOCK = re.compile(
    r"((?:[ \t>*+-]|\d+[.)])*)<(?=[A-Za-z/!?])"
    r"(?![A-Za-z][A-Za-z0-9+.-]+:[^<>\s]*>|[^<>\s@]+@[^<>\s]+>)"
)
Place = tuple[int, int]  # line and column


def quoted(text: str) -> str:
    """A quotation of `text`, Markdown without control characters, HTML and pictures as text."""
    text = "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
    if "<" not in text and "![" not in text:
        return text
    from markdown_it.rules_inline import html_inline  # loads a Markdown parser

    parser = _parser(html_inline, _picture)
    for _ in range(PASSES):
        changed = _passed(text, parser.parse(text))
        if changed == text:
            return text
        text = changed
    return _bluntly(text)  # made to get through


def _parser(*rules: Callable[["StateInline", bool], bool]) -> "MarkdownIt":
    from markdown_it import MarkdownIt

    # What defines a reference for others would define nothing here, and may be a footnote.
    parser = MarkdownIt("commonmark").enable("table").disable(["html_block", "reference"])
    for name, rule in zip(ACTING, rules, strict=True):
        parser.inline.ruler.at(name, _placed(rule))
    return parser


def _picture(state: "StateInline", silent: bool) -> bool:
    """A rule of the parser: what may begin a picture."""
    found = state.src.startswith("![", state.pos)
    if found:
        if not silent:
            state.push("image", "", 0)
        state.pos += 1
    return found


def _placed(rule: Callable[["StateInline", bool], bool]) -> Callable[["StateInline", bool], bool]:
    """`rule`, whose token says where it stood."""

    def placed(state: "StateInline", silent: bool) -> bool:
        at = state.pos
        found = rule(state, silent)
        if found and not silent:
            state.tokens[-1].meta[AT] = at
        return found

    return placed


def _bluntly(text: str) -> str:
    """`text` without any HTML or picture, though code in it shows the escapes."""
    return text.replace("<", "&lt;").replace("![", "!\\[")


def _passed(text: str, tokens: list["Token"]) -> str:
    """`text` with everything escaped that acts, as `tokens` tell."""
    lines = text.split("\n")
    code: set[int] = set()
    places: set[Place] = set()
    changed: set[int] = set()  # lines that were changed in reading, as "\\|" in a table
    ends: dict[int, int] = {}  # in each line, of the cells of a table that were seen
    for token in tokens:
        if token.map is not None and token.type in CODE:
            code.update(range(*token.map))
        elif token.map is not None and token.type == "inline":
            for number, column in _places(token, token.map[0], lines, ends):
                changed.update({number} if column < 0 else ())
                places.add((number, column))
    for number, line in enumerate(lines):
        if number not in code and (found := BLOCK.match(line)):
            places.add((number, found.end(1)))
    for number, column in sorted(places, reverse=True):
        if number not in changed:
            lines[number] = f"{lines[number][:column]}\\{lines[number][column:]}"
    for number in changed:
        lines[number] = _bluntly(lines[number])
    return "\n".join(lines)


def _places(token: "Token", first: int, lines: list[str], ends: dict[int, int]) -> Iterator[Place]:
    """Where an inline token, in `lines` from `first` on, is to be escaped.

    A negative column: somewhere in the line.
    """
    acting = [child for child in token.children or () if child.type in ACTING]
    offsets = sorted({at for child in acting for at in _offsets(child)})
    start = 0
    for number, written in enumerate(token.content.split("\n"), first):
        column = lines[number].find(written, ends.get(number, 0))
        inside = [at - start for at in offsets if start <= at <= start + len(written)]
        if column >= 0:
            ends[number] = column + len(written)
        yield from ((number, column + at if column >= 0 else -1) for at in inside)
        start += len(written) + 1


def _offsets(child: "Token") -> Iterator[int]:
    """Offsets in its block's text: a picture's mark; of a tag every < and `, which act next."""
    at = int(child.meta[AT])
    marks = (
        (0,) if child.type == "image" else (f.start() for f in re.finditer("[<`]", child.content))
    )
    yield from (at + mark for mark in marks)
