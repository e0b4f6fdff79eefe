"""What Typer says itself: its help and its complaints, in the chosen language and in 80 columns.

What it is: the help's texts translated, its tables of seven columns made two, and its complaints
looked up by their pattern. What it is not: a help of its own. Of Typer only names of texts, tables
and classes are replaced; a complaint of another version of it stays English.
"""

import functools
import re
import string
from collections.abc import Sequence
from typing import Any

from m1local_app.columns import breaks
from m1local_app.language import marked, tr

CELLS = 6  # names, short names, both of "off", the kind of value, the help; before them a star
COMPLAINTS = (  # the more special first
    marked("Invalid value for {place}: {reason}"),
    marked("No such option: {name} (Possible options: {names})"),
    marked("No such option: {name}"),
    marked("No such command {name}. Did you mean {names}?"),
    marked("No such command {name}"),
    marked("Missing argument {name}. Choose from: {names}"),
    marked("Missing argument {name}"),
    marked("Missing command"),
    marked("Option {name} requires an argument"),
    marked("Option {name} does not take a value"),
    marked("Got unexpected extra argument(s) ({names})"),
    marked("Input should be a valid integer, unable to parse string as an integer"),
    marked("Input should be a valid number, unable to parse string as a number"),
    marked("Input should be greater than or equal to {least}"),
    marked("Input should be less than or equal to {most}"),
    marked("Value error, {value} is not one of {names}"),
)
HELP = marked("Show this message and exit.")
METAVARS = {
    "options_metavar": marked("[OPTIONS]"),
    "subcommand_metavar": marked("COMMAND [ARGS]..."),
}


def said(complaint: str) -> str:
    """What Typer says of a command line, in the chosen language; as it is where it is not known."""
    for text in COMPLAINTS:
        found = re.fullmatch(_pattern(text), complaint)
        if found:
            values = found.groupdict()
            if "reason" in values:
                values["reason"] = said(values["reason"])
            return tr(text, **values)
    return complaint


@functools.cache
def _pattern(text: str) -> str:
    parts = string.Formatter().parse(text)
    return "".join(
        re.escape(part) + (f"(?P<{name}>.+)" if name else "") for part, name, *_ in parts
    )


def translate(command: Any, context: Any) -> None:
    """Put the help of `command`, and of all below it, into the chosen language."""
    for attribute in ("help", "short_help", "epilog", *METAVARS):
        text = getattr(command, attribute, None)
        if text:
            setattr(command, attribute, _examples_below(tr(text)))
    shown = command.get_help_option(context)
    for parameter in (*command.params, *([] if shown is None else [shown])):
        if getattr(parameter, "help", None):
            parameter.help = tr(parameter.help)
        panel = getattr(parameter, "rich_help_panel", None)
        if isinstance(panel, str):
            parameter.rich_help_panel = tr(panel)
    for below in getattr(command, "commands", {}).values():
        translate(below, context)


def _examples_below(text: str) -> str:
    """`text` with the examples of its last paragraph, which dots part, on a line each."""
    *before, last = text.split("\n\n")
    head, *examples = re.split(r"\s+·\s+", last)
    if not examples:
        return text
    named, first = head.split(maxsplit=1)
    listed = (" ".join(example.split()) for example in (first, *examples))
    return "\n\n".join([*before, "\n".join((named, *listed))])


def arrange(context: Any) -> None:
    """Let the help have tables that fit into 80 columns, and Typer's words in the chosen language.

    `context` is the class of Typer's contexts.
    """
    from rich.table import Table
    from rich.text import Text
    from typer import rich_utils

    class NarrowTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            *names, text = _two(cells) if len(cells) >= CELLS else cells
            super().add_row(*names, _wrapped(text) if isinstance(text, Text) else text, **options)
            for column in self.columns:
                column.overflow = "fold"

    def joined(parts: list[Text]) -> Text:
        return Text(" ").join(parts)

    vars(rich_utils).update(Table=NarrowTable, Columns=joined)
    rich_utils.ARGUMENTS_PANEL_TITLE = tr("Arguments")
    rich_utils.OPTIONS_PANEL_TITLE = tr("Options")
    rich_utils.COMMANDS_PANEL_TITLE = tr("Commands")
    rich_utils.DEFAULT_STRING = tr("[default: {}]")
    rich_utils.REQUIRED_LONG_STRING = tr("[required]")
    _speak_in_usage(context)


def _speak_in_usage(context: Any) -> None:
    """Let the line of usage begin in the chosen language."""
    if getattr(context.formatter_class, "speaks", False):
        return

    class Formatter(context.formatter_class):  # type: ignore[misc]
        speaks = True

        def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
            super().write_usage(prog, args, tr("Usage: ") if prefix is None else prefix)

    context.formatter_class = Formatter


def _two(cells: Sequence[Any]) -> list[Any]:
    """The cells of an option's row in two, its names and its help; before them a star, if any."""
    from rich.text import Text

    *star, long, short, off, off_short, kind, text = cells
    names = [name for cell in (long, short, off, off_short) for name in cell.split(",") if name]
    shown = Text(", ").join(names)
    if kind.plain not in ("", "<bool>"):  # a flag takes no value
        shown = Text(" ").join([shown, kind])
    return [*star, shown, text]


def _wrapped(text: Any) -> Any:
    """`text`, which breaks between Chinese characters, too, and nowhere within a word."""
    made = _wrapping()(style=text.style)
    made.append_text(text)
    return made


@functools.cache
def _wrapping() -> Any:
    from rich.containers import Lines
    from rich.text import Text

    class Wrapped(Text):
        def wrap(self, console: Any, width: int, **options: Any) -> Lines:
            lines = Lines()
            for line in self.split(allow_blank=True):
                lines.extend(line.divide(breaks(line.plain, width)))
            for line in lines:
                line.rstrip()
            return lines

    return Wrapped
