"""A command in a real pseudo-terminal, and what a person would see of it.

What it is: a child process whose output feeds a terminal emulator; POSIX only. What it is not: a
test.
"""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

import pyte

from tests.conftest import ROOT

PATIENCE_SECONDS = 60
COLUMNS, LINES = 80, 24


class Screen:
    """A process, the screen it writes on, and the keys it is sent."""

    def __init__(self, arguments: list[str], environment: dict[str, str], code: str = "") -> None:
        """Run `m1` with `arguments` after `code`, Python that prepares the process."""
        path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "quantize", ROOT / "app"))
        program = f"{code}\nfrom m1local_app.cli import cli; cli()"
        command = [sys.executable, "-c", program, *arguments]
        variables = os.environ | {"PYTHONPATH": path, "TERM": "xterm-256color"} | environment
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            # Whoever started the tests in the background had these ignored; children inherit that.
            for ignored in (signal.SIGINT, signal.SIGHUP):
                signal.signal(ignored, signal.SIG_DFL)
            os.execvpe(command[0], command, variables)
        self._shown = pyte.HistoryScreen(COLUMNS, LINES, history=5000)
        self._shown.write_process_input = self.type  # type: ignore[method-assign,assignment]
        self._stream = pyte.ByteStream(self._shown)
        self.sent = b""  # all the process wrote
        self.resize(COLUMNS, LINES)

    def resize(self, columns: int, lines: int) -> None:
        """Give the window another size."""
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, size)
        self._shown.resize(lines, columns)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.terminal, text.encode())

    def paste(self, text: str) -> None:
        """Paste as terminals do it, marked as such; what is echoed meanwhile is read."""
        data = f"\x1b[200~{text}\x1b[201~".encode()
        while data:
            data = data[os.write(self.terminal, data[:1024]) :]
            self._read(0)

    def lines(self) -> list[str]:
        """The lines on the screen, and those that left it, without trailing blanks."""
        above = ["".join(row[x].data for x in range(len(row))) for row in self._shown.history.top]
        return [line.rstrip() for line in [*above, *self._shown.display]]

    def visible(self) -> list[str]:
        """The lines on the screen."""
        return [line.rstrip() for line in self._shown.display]

    def text(self) -> str:
        """All lines as one text; a wide character counts once."""
        return "\n".join(self.lines()).rstrip()

    def wait_for(self, pattern: str, *, times: int = 1) -> None:
        """Wait until `pattern` is on the screen, or above it, so many times."""
        until = time.monotonic() + PATIENCE_SECONDS
        while len(re.findall(pattern, self.text())) < times:
            assert time.monotonic() < until, f"{pattern!r} never came; the screen:\n{self.text()}"
            self._read(0.2)

    def shown_until(self, wanted: str) -> set[str]:
        """Wait until `wanted` is on the screen; all that stood there one after another."""
        until, shown = time.monotonic() + PATIENCE_SECONDS, {self.text()}
        while not any(wanted in text for text in shown):
            assert time.monotonic() < until, f"{wanted!r} never came; the screen:\n{self.text()}"
            self._read(0.05)
            shown.add(self.text())
        return shown

    def wait_for_answer(self) -> None:
        """Wait until something stands below the message that was sent."""
        until = time.monotonic() + PATIENCE_SECONDS
        while re.match(r">>>|\.\.\.|reading", self.text().rpartition("\n")[2]):
            assert time.monotonic() < until, f"no answer began; the screen:\n{self.text()}"
            self._read(0.2)

    def stop(self, times: int = 1) -> None:
        """Let the answer begin, stop it as the so-manieth, and wait for the prompt."""
        self.wait_for_answer()
        self.type("\x03")
        self.wait_for(r"\[stopped\]", times=times)
        self.settle()

    def prompt(self, number: int = 1) -> None:
        """Wait for an empty prompt as the last line, the `number`-th of all."""
        self.wait_for(r"(?m)^>>>", times=number)
        self.settle()

    def settle(self, seconds: float = 0.3) -> None:
        """Read until nothing has come for a while."""
        while self._read(seconds):
            pass

    def exit_code(self) -> int:
        """Wait until the process has ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            self._read(0.1)
        raise AssertionError(f"it did not leave; the screen:\n{self.text()}")

    def kill(self) -> None:
        """End it as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def close(self) -> None:
        """End it if it has not ended."""
        if self.pid:
            self.kill()
        os.close(self.terminal)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.terminal], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # Linux reports the end as an error
            data = os.read(self.terminal, 65536)
            self.sent += data
            self._stream.feed(data)
            return bool(data)
        return False
