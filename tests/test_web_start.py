"""`m1 ui` as a program: behind a proxy setting, with a password, and killed in mid-answer."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from m1local_app import notices
from m1local_app.history import History
from m1local_app.web import serving
from tests.conftest import ROOT, lend_library
from tests.web_page import MARKS, PATIENCE_SECONDS, SlowEngine, Window

pytestmark = MARKS
NOWHERE = "http://127.0.0.1:9"  # nobody listens there


@contextlib.contextmanager
def started(
    folder: Path, m1_home: Path, *options: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The page's address, and the process that serves the checkpoint in `folder`."""
    lend_library(m1_home)
    port = serving.free_port()
    environment = os.environ | {
        "M1_HOME": str(m1_home),
        "PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in (".", "quantize", "app")),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "ALL_PROXY"), NOWHERE),
    }
    environment = {k: v for k, v in environment.items() if k.lower() != "no_proxy"}
    command = [
        sys.executable, "-c", "from m1local_app.cli import cli; cli()", "ui", str(folder),
        "--no-browser", "--port", str(port), *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(address, process)
        yield address, process
    finally:
        process.kill()
        process.communicate()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        assert process.poll() is None, (process.communicate()[1] or b"").decode()
        assert time.monotonic() < end, "the page never came up"
        with contextlib.suppress(OSError), opener.open(address):
            return
        time.sleep(0.2)


@pytest.fixture
def folder(tmp_path: Path, m1_home: Path) -> Path:
    """An endless model whose notices were accepted."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    notices.accept("model (int4)")
    return SlowEngine(tmp_path / "model").folder


def test_a_kill_in_mid_answer_loses_nothing_that_was_stored(
    folder: Path, m1_home: Path, opened: Window
) -> None:
    with started(folder, m1_home, "-n", "6000") as (address, process):  # with proxies set, too
        opened.open(address)
        opened.ask("before the kill", answers=1, length=200)
        opened.until(lambda: stored(m1_home), "nothing of the answer was stored")
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = stored(m1_home)
    with started(folder, m1_home, "-n", "8") as (address, _):
        opened.open(address)
        opened.browser.get_log("browser")  # of the connection that broke
        opened.click("#list button")
        opened.until(lambda: opened.questions == ["before the kill"], "it was forgotten")
        assert len(opened.answers) == 1
        opened.send("after it", answers=2)
        opened.assert_private_and_quiet()
    messages = path(m1_home)
    assert [content for role, content in messages if role == "user"] == [
        "before the kill",
        "after it",
    ]
    assert messages[1][1] == kept


@pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM")
def test_uploads_are_gone_when_the_program_is_told_to_end(
    folder: Path, m1_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with started(folder, m1_home) as (_, process):
        (uploads,) = temporary.glob("m1-*")
        (uploads / "patient.txt").write_text("words")
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
        assert not uploads.exists()


def path(m1_home: Path) -> list[tuple[str, str]]:
    with History.open(m1_home / "history.db") as store:
        latest = store.latest()
        messages = [] if latest is None else store.path(latest.id)
    return [(message.role, message.content) for message in messages]


def stored(m1_home: Path) -> str:
    """The answer as far as it is stored."""
    return next((content for role, content in path(m1_home) if role == "assistant"), "")


def test_a_password_is_asked_for_by_a_page_that_loads_nothing_from_elsewhere(
    folder: Path, m1_home: Path, opened: Window
) -> None:
    with started(folder, m1_home, "-n", "6000", "--auth", "me:open sesame") as (address, _):
        opened.browser.get(address)
        opened.until(lambda: opened.shown("input[type=password]"), "nobody asks for a password")
        assert not opened.shown("#shell")
        fields = "input:not([type=password])", "input[type=password]"
        for selector, text in zip(fields, ("me", "wrong"), strict=True):
            opened.type(selector, text)
        opened.click("button")
        opened.until(lambda: "ncorrect" in opened.texts("body")[0], "a wrong one was taken")
        opened.type("input:not([type=password])", "me")
        opened.type("input[type=password]", "open sesame\n")
        opened.until(lambda: opened.shown("#box textarea"), "the right one was not taken")
        opened.browser.get_log("browser")  # of the wrong one, which the server refuses
        opened.ask("hello", answers=1)
        opened.stop()
        opened.assert_private_and_quiet()
        opened.browser.get("about:blank")
        opened.browser.get_log("browser")
