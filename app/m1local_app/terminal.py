"""The conversation in a terminal, and single questions through a pipe.

What it is: reads lines, prints events. Answers go to stdout, everything else to stderr, so that
`m1 run -p … > answer.txt` is clean. What it is not: the conversation itself (m1local.chat).
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from m1local.errors import ContextLengthError, M1Error
from m1local_app.boundary import INTERRUPTED

if TYPE_CHECKING:
    from m1local.chat import ChatSession
    from m1local.generate import Event, Finished

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'
LONG_PROMPT_TOKENS = 512
HELP = f"""\
/help            this list
/clear           forget the conversation, keep the system prompt
/system [TEXT]   show the system prompt, or set it and start afresh
/bye             leave (also /exit, /quit, Ctrl-D)
{QUOTES}              begin and end a message of several lines
Ctrl-C           stop the answer; at the prompt twice: leave"""


def note(text: str) -> None:
    """Say something that is not an answer: on stderr, dimmed."""
    typer.secho(text, err=True, dim=True)


def print_answer(events: Iterator["Event"], *, stats: bool) -> None:
    """Print an answer as it comes; then, if wanted, how fast it came."""
    from m1local.generate import Finished, FinishReason, PrefillProgress, TextDelta  # loads torch

    finished = None
    for event in events:
        if isinstance(event, PrefillProgress):
            show_reading(event.done_tokens, event.total_tokens)
        elif isinstance(event, TextDelta):
            sys.stdout.write(event.text)
            sys.stdout.flush()
        elif isinstance(event, Finished):
            finished = event
    sys.stdout.write("\n")
    sys.stdout.flush()
    if finished is None:
        return
    if finished.reason is FinishReason.LENGTH:
        note("[the answer reached its limit; -n allows more]")
    elif finished.reason is FinishReason.CONTEXT:
        note("[the context is full; /clear starts afresh, --ctx-size allows more]")
    if stats:
        note(speed_line(finished))


def show_reading(done: int, total: int) -> None:
    """How much of a long prompt has been read, on a line that is wiped at the end."""
    if total >= LONG_PROMPT_TOKENS and sys.stderr.isatty():
        text = f"reading {done:,} of {total:,} tokens" if done < total else ""
        sys.stderr.write(f"\r{text:<40}\r")
        sys.stderr.flush()


def speed_line(finished: "Finished") -> str:
    """Tokens, time to first token and tokens per second of one answer."""
    read = finished.prompt_tokens - finished.cached_tokens
    return (
        f"[{finished.new_tokens} tokens, {finished.tokens_per_second:.1f} tokens/s; "
        f"{read} tokens read in {finished.prefill_seconds:.2f} s]"
    )


class Terminal:
    """An interactive conversation."""

    def __init__(self, session: "ChatSession", *, raw: bool, stats: bool) -> None:
        """Talk through `session`; with `raw`, every line is continued without a template."""
        self._session = session
        self._raw = raw
        self._stats = stats

    def run(self) -> None:
        """Read and answer until the user leaves."""
        with contextlib.suppress(ImportError):  # line editing and history, where Python has them
            import readline  # noqa: F401
        note("/help lists the commands, Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                text = self._read()
            except EOFError:
                sys.stderr.write("\n")
                return
            except KeyboardInterrupt:
                if interrupted:
                    sys.stderr.write("\n")
                    raise typer.Exit(INTERRUPTED) from None
                interrupted = True
                note("\n(Ctrl-C again leaves; Ctrl-D and /bye do, too)")
                continue
            interrupted = False
            if text.startswith("/"):
                if self._command(text):
                    return
            elif text.strip():
                self._answer(text)

    def _read(self) -> str:
        line = _input(PROMPT)
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].endswith(QUOTES):
            lines.append(_input(CONTINUED))
        return "\n".join(lines).removesuffix(QUOTES).strip("\n")

    def _answer(self, text: str) -> None:
        session = self._session
        events = (
            session.engine.complete(text, session.settings) if self._raw else session.send(text)
        )
        try:
            print_answer(events, stats=self._stats)
        except KeyboardInterrupt:
            note("\n[stopped]")
        except ContextLengthError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator

    def _command(self, text: str) -> bool:
        """Obey a slash command; returns whether to leave."""
        name, _, argument = text[1:].strip().partition(" ")
        if name in ("bye", "exit", "quit"):
            return True
        if name in ("help", "?"):
            note(HELP)
        elif name == "clear":
            self._session.clear()
            note("The conversation is forgotten.")
        elif name == "system":
            self._system(argument.strip())
        else:
            note(f"There is no command /{name}; /help lists them.")
        return False

    def _system(self, text: str) -> None:
        if text:
            self._session.system = text
            self._session.clear()
            note("The system prompt is set; the conversation starts afresh.")
        else:
            note(self._session.system or "There is no system prompt; /system TEXT sets one.")


def _input(prompt: str) -> str:
    """A line from the user; the prompt is no answer, so it keeps out of a redirected stdout."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def piped_text() -> str | None:
    """What was piped into the command, or None when a person sits at it."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise M1Error(f"The piped text cannot be read: {error}.") from error
