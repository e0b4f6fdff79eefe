"""Where expected errors become one line: the command line's boundary.

What it is: M1Error in, one red line on stderr and exit code 1 out; Ctrl-C becomes 130. What it is
not: a catch-all. A bug keeps its traceback, without local variables: they would show what a user
wrote.
"""

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from m1local.errors import M1Error

INTERRUPTED = 130


class M1Group(TyperGroup):
    """A command group that prints an M1Error as one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except M1Error as error:
            line = " ".join(str(error).split())
            typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the answer is gone (`m1 run -p … | head`); Python must not complain too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


def usage_error(message: str) -> typer.Exit:
    """Print what was wrong with the command line; raise the result to leave with exit code 2."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    return typer.Exit(2)


def use_utf8() -> None:
    """Make stdin, stdout and stderr UTF-8 whatever the locale: answers may be Chinese."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
