"""Ctrl-C while an answer comes: it stops between two tokens, never inside one.

What it is: SIGINT noted and asked for, so that neither the model's cache nor a half drawn screen is
left torn; a second Ctrl-C does not wait. Meanwhile keys are not echoed, as they would stand in the
middle of the answer; they are there at the next prompt. What it is not: needed at the prompt, whose
editor reads Ctrl-C as a key; or of any use outside the main thread, where Python delivers no
signals.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back; yields a function that says whether it was pressed."""
    pressed = False

    def note_it(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is signal.SIG_IGN:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note_it)
    try:
        with _without_echo():
            yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def _without_echo() -> Iterator[None]:
    """Let the terminal keep what is typed to itself; Windows does so unless a line is read."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    usual = termios.tcgetattr(terminal)
    quiet = list(usual)
    quiet[3] = usual[3] & ~termios.ECHO | termios.NOFLSH  # nor lose what is being written
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, usual)
