"""The chat in a real pseudo-terminal: several turns, Ctrl-C, the slash commands, leaving."""

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m1local_app.cli import cli
from tests.conftest import ROOT, TINY, write_checkpoint

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

import pty

PATIENCE_SECONDS = 60


class Screen:
    """A child process in a pseudo-terminal, and what it has shown so far."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            # Whoever started the tests in the background had SIGINT ignored; children inherit that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvpe(command[0], command, environment)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until `pattern` appears in what is new; returns that and forgets it."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < until, f"{pattern!r} never came; the screen: {self.shown!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                with contextlib.suppress(OSError):  # Linux reports the end as an error
                    self.shown += os.read(self._terminal, 4096).decode("utf-8", "replace")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def exit_code(self) -> int:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                if select.select([self._terminal], [], [], 0.1)[0]:
                    os.read(self._terminal, 4096)
        raise AssertionError("it did not leave")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    write_checkpoint(folder, TINY | {"max_position_embeddings": 32768}, endless=True)
    (folder / "generation_config.json").write_text(
        '{"assistant_token_id": 7, "temperature": 1.0, "max_new_tokens": 20000}'
    )
    return folder


@pytest.fixture
def screen(endless: Path) -> Iterator[Screen]:
    """`m1 chat` on it, at its first prompt."""
    assert cli is not None
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "quantize", ROOT / "app"))
    code = "from m1local_app.cli import cli; cli()"
    command = [sys.executable, "-c", code, "chat", str(endless), "-c", "32768"]
    started = Screen(command, os.environ | {"PYTHONPATH": path, "TERM": "xterm"})
    started.wait_for("not medical advice")
    started.wait_for(">>> ")
    yield started
    started.close()


def test_ctrl_c_stops_the_answer_and_the_next_question_is_answered(screen: Screen) -> None:
    for question in ("hello", "and now?"):
        screen.type(question + "\r")
        screen.wait_for(question)
        screen.wait_for(r"\w{3}")  # the answer has begun
        screen.type("\x03")
        screen.wait_for(r"\[stopped\]")
        screen.wait_for(">>> ")
    screen.type("/bye\r")
    assert screen.exit_code() == 0


def test_ctrl_c_twice_at_the_prompt_leaves_with_130(screen: Screen) -> None:
    # Python's readline misses a signal that comes while it is still setting the terminal up.
    time.sleep(1)
    screen.type("\x03")
    screen.wait_for("Ctrl-C again leaves")
    screen.wait_for(">>> ")
    time.sleep(1)
    screen.type("\x03")
    assert screen.exit_code() == 130


def test_ctrl_d_leaves(screen: Screen) -> None:
    screen.type("\x04")
    assert screen.exit_code() == 0


def test_slash_commands_answer(screen: Screen) -> None:
    for typed, expected in (
        ("/help", "/system"),
        ("/system", "no system prompt"),
        ("/system 你是医生", "system prompt is set"),
        ("/system", "你是医生"),
        ("/clear", "forgotten"),
        ("/nonsense", "no command /nonsense"),
    ):
        screen.type(typed + "\r")
        screen.wait_for(re.escape(expected))
        screen.wait_for(">>> ")
    screen.type("/exit\r")
    assert screen.exit_code() == 0


def test_a_message_may_have_several_lines(screen: Screen) -> None:
    screen.type('"""first\r')
    screen.wait_for(r"\.\.\. ")
    screen.type('second"""\r')
    screen.wait_for(r'second"""')
    screen.wait_for(r"\w{3}")
    screen.type("\x03")
    screen.wait_for(r"\[stopped\]")
