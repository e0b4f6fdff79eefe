"""The keyboard while an answer comes: Ctrl-C stops it, and what is typed waits for the prompt.

What it is: SIGINT noted and asked for between two tokens, so that neither the model's cache nor a
half drawn screen is left torn; a second Ctrl-C does not wait, and an end by the system (SIGTERM,
SIGHUP) leaves through the same doors. Keys are not echoed, as they would stand in the middle of the
answer; they are read as they come, pasted lines included, and never sent by themselves. What it is
not: needed at the prompt, whose editor reads keys itself; or of any use outside the main thread,
where Python delivers no signals.
"""

import contextlib
import os
import re
import select
import signal
import sys
import threading
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

PASTES = "\x1b[?2004h", "\x1b[?2004l"  # brackets around pasted text: on and off
SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)
BLOCK = 65536


class Keyboard:
    """A context in which the terminal's keys and signals are held."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._pressed = False
        self._bytes = b""
        self._undo = ExitStack()
        self._reads = False

    def __enter__(self) -> Self:
        """Take over."""
        if threading.current_thread() is threading.main_thread():
            self._hold_signals()
            if sys.platform != "win32" and sys.stdin is not None and sys.stdin.isatty():
                self._take_keys()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        """Give everything back."""
        self._read()
        self._undo.close()

    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed; also takes in what was typed."""
        self._read()
        return self._pressed

    @property
    def typed(self) -> str:
        """What was typed or pasted, as a text to be edited further."""
        return typed_text(self._bytes.decode("utf-8", "replace"))

    def _hold_signals(self) -> None:
        self._handle(signal.SIGINT, self._note)
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                self._handle(getattr(signal, name), _leave)

    def _handle(self, number: int, handler: Any) -> None:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells ask for
            usual = signal.signal(number, handler)
            self._undo.callback(signal.signal, number, usual)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def _take_keys(self) -> None:
        import termios

        terminal = sys.stdin.fileno()
        usual = termios.tcgetattr(terminal)
        quiet = list(usual)
        # Key by key, unseen; and what is being written is not thrown away by Ctrl-C.
        quiet[3] = usual[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        self._undo.callback(termios.tcsetattr, terminal, termios.TCSANOW, usual)
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._undo.callback(_write, PASTES[1])
            _write(PASTES[0])
        self._reads = True

    def _read(self) -> None:
        """Take in what waits; the system holds four thousand bytes of it only."""
        while self._reads and select.select([sys.stdin], [], [], 0)[0]:
            new = b""
            with contextlib.suppress(OSError):
                new = os.read(sys.stdin.fileno(), BLOCK)
            if not new:
                self._reads = False
            self._bytes += new


def typed_text(keys: str) -> str:
    """The text that `keys` would have made: a pasted one whole, typed ones with their backspaces.

    An Enter ends nothing here; it is a line's end within the text, and dropped at its end.
    """
    text = ""
    for part in re.split(r"(\x1b\[200~.*?(?:\x1b\[201~|$))", keys, flags=re.DOTALL):
        if part.startswith("\x1b[200~"):
            text += part.removeprefix("\x1b[200~").removesuffix("\x1b[201~")
            continue
        for key in SEQUENCE.sub("", part):
            if key in "\x7f\b":
                text = text[:-1]
            elif key == "\x15":  # Ctrl-U
                text = ""
            elif key in "\r\n\t" or key.isprintable():
                text += key
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")


def leave_when_told() -> None:
    """Let SIGTERM and SIGHUP end the program as its end does: what is to be deleted then, is."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
