"""One model answers one question at a time; the others wait in order and know their place.

What it is: a fair queue for threads. What it is not: Gradio's own queue, whose place in the line
only Gradio's overlay shows, and which cannot be left by a click on Stop.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class Ticket:
    """A place in the line."""

    def __init__(self, line: "Turnstile") -> None:
        """Stand in `line`, at its end."""
        self._line = line

    def ahead(self) -> int:
        """How many come before; 0: it is this one's turn."""
        return self._line.ahead(self)

    def wait(self, seconds: float) -> None:
        """Return when the line moves, or after so many seconds."""
        self._line.wait(seconds)


class Turnstile:
    """Lets one through at a time, first come, first served."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._moved = threading.Condition()
        self._tickets: deque[Ticket] = deque()

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Stand in the line until the `with` is left, whether or not it became one's turn."""
        ticket = Ticket(self)
        with self._moved:
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._moved:
                self._tickets.remove(ticket)
                self._moved.notify_all()

    def ahead(self, ticket: Ticket) -> int:
        """How many stand before `ticket`."""
        with self._moved:
            return self._tickets.index(ticket)

    def wait(self, seconds: float) -> None:
        """Return when somebody left, or after so many seconds."""
        with self._moved:
            self._moved.wait(seconds)
