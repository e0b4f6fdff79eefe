"""Where expected errors become one line: the command line's boundary.

What it is: M1Error in, one red line on stderr and exit code 1 out; Ctrl-C becomes 130; and the one
place where the language is chosen, before anything is parsed. What it is not: a catch-all. A bug
keeps its traceback, without local variables: they would show what a user wrote.
"""

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from m1local.errors import M1Error
from m1local_app import help_page, language
from m1local_app.language import tr

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
UNWRITTEN = {errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT}
# Typer brings a click of its own, or uses the installed one; it shows this much of it.
CommandLineError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


class M1Group(TyperGroup):
    """A command group that speaks the user's language and prints an M1Error as one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Take --lang from wherever it stands, translate the help, and parse the rest."""
        chosen, rest = language.take_option(args)
        language.choose_of_system()
        if chosen is not None and chosen not in language.LANGUAGES:
            raise usage_error(tr("--lang is {name!r}; it must be en or zh.", name=chosen))
        if chosen is not None:
            language.choose(chosen)
        help_page.translate(self, ctx)
        help_page.arrange(type(ctx))
        return super().parse_args(ctx, rest)

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run as a program; what is wrong with the command line is one line, too."""
        # Or Python looks through all that was imported for garbage once more, a third of a second.
        atexit.register(gc.freeze)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with contextlib.suppress(ValueError):  # of a thread, which gets no signals
                signal.signal(signal.SIGINT, _interrupt)
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)  # type: ignore[misc]
        try:
            left = super().main(*args, standalone_mode=False, **options)  # type: ignore[misc]
        except CommandLineError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]  # it is the help
            else:
                said = error.format_message()  # type: ignore[attr-defined]
                said = help_page.said(" ".join(said.split()).rstrip(".。"))
                error_line(said + _help_hint(error))
            sys.exit(2)
        except typer.Abort:  # Ctrl-C or Ctrl-D at a question
            error_line(tr("interrupted"))
            sys.exit(1)
        except OSError as error:
            _leave_unwritten(error)
        sys.exit(left if isinstance(left, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except M1Error as error:
            error_line(" ".join(str(error).split()))
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo(tr("interrupted"), err=True)
            raise typer.Exit(INTERRUPTED) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: KeyboardInterrupt, but in the middle of an import the end at once.

    Modules in C are not made for an exception there: it is swallowed, or ends in a crash.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{tr('interrupted')}\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave_unwritten(error: OSError) -> NoReturn:
    """Leave with exit code 1 where nothing more can be written; else raise `error`, a bug.

    Whoever read the answer may be gone (`m1 run -p … | head`), which needs no word, or the disk
    that it goes to is full. Python must not complain too, as it would of stdout at its end.
    """
    if error.errno not in UNWRITTEN:
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        reason, where = error.strerror, error.filename or tr("the output")
        error_line(tr("{where} cannot be written: {reason}.", where=where, reason=reason))
    sys.exit(1)


def _help_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return "." if context is None else tr(". See `{command} --help`.", command=context.command_path)


def error_line(message: str) -> None:
    """Print what went wrong on stderr: one line, red where colour is wanted, wrapped by words."""
    style = None if os.environ.get("NO_COLOR") else "red"
    stderr_console().print(tr("error: {message}", message=message), style=style)


def stderr_console() -> "Console":
    """Stderr, on which nothing is markup: text is wrapped at a terminal, and as it is elsewhere."""
    from rich.console import Console

    made = Console(stderr=True, highlight=False, emoji=False, markup=False)
    made.soft_wrap = not made.is_terminal
    return made


def ask(question: str, otherwise: str) -> None:
    """Go on only where a person says yes; raises typer.Exit, and says `otherwise` to a program."""
    if not is_terminal():
        raise usage_error(otherwise)
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)


def is_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def usage_error(message: str) -> typer.Exit:
    """Print what was wrong with the command line; raise the result to leave with exit code 2."""
    error_line(message)
    return typer.Exit(2)


def use_utf8() -> None:
    """Make stdin, stdout and stderr UTF-8 whatever the locale: answers may be Chinese.

    What is read and is not UTF-8 can be got back (textfile.py). A stream that was closed (`>&-`)
    reads and writes nothing.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            errors = "surrogateescape" if name == "stdin" else "replace"
            reconfigure(encoding="utf-8", errors=errors)
