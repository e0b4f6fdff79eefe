"""What a user types stays on this machine: no socket but loopback, no log, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, lend_library, write_checkpoint

# An audit hook sees every socket of the process, whichever library opens it; it cannot be removed.
GUARD = """
import sys
NETWORK = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind")
NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
def guard(event, arguments):
    if event in NETWORK:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"  # else a local socket
    elif event in NAMES:
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host)
    if not host.startswith("127.") and host not in ("::1", "localhost", "None", "0.0.0.0"):
        sys.stderr.write(f"\\nNETWORK: {event} {host}\\n")
        raise RuntimeError(f"{event} of {host}")
sys.addaudithook(guard)
"""
RUN = "from m1local_app.cli import cli; cli()"
SECRET = "Zwiebelkuchen im Hochsommer"


def m1(
    *arguments: str | Path, home: Path, code: str = GUARD, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "quantize", ROOT / "app"))
    environment = os.environ | {"PYTHONPATH": path, "M1_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    lend_library(home)
    return subprocess.run(
        [sys.executable, "-c", f"{code}\n{RUN}", *map(str, arguments)],
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
    )


def test_the_guard_would_notice(tmp_path: Path) -> None:
    code = f"{GUARD}\nimport socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "NETWORK: socket" in m1("--help", home=tmp_path, code=code).stderr


def test_doctor_asks_for_the_hub_unless_offline(tmp_path: Path) -> None:
    assert "NETWORK" in m1("doctor", home=tmp_path).stderr
    offline = m1("doctor", "--offline", "--json", home=tmp_path)
    assert (offline.returncode, offline.stderr) == (0, "")


def test_quantizing_and_chatting_open_no_socket(tiny_checkpoint: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    short = ("-n", "8", "--temp", "0")
    for arguments in (
        ("run", tiny_checkpoint, "--offline", "-p", SECRET, *short),
        ("run", tiny_checkpoint, "--offline", "--session", "mine", "-p", SECRET, *short),
        ("chat", tiny_checkpoint, "--continue", "-p", SECRET, *short),
        ("quantize", tiny_checkpoint, tmp_path / "nf4", "--recipe", "bnb-nf4", "--offline"),
        ("chat", tmp_path / "nf4", "-p", SECRET, *short),
        ("show", tmp_path / "nf4"),
        ("verify", tmp_path / "nf4"),
        ("list",),
        ("history", "search", "Zwiebel"),
        ("history", "export", "mine", tmp_path / "mine.html"),
        ("history", "purge", "--yes"),
    ):
        ended = m1(*arguments, home=home)
        assert ended.returncode == 0, (arguments, ended.stderr)
        assert "NETWORK" not in ended.stderr, arguments


def test_a_model_that_is_not_here_is_not_asked_for_offline(tmp_path: Path) -> None:
    ended = m1("run", "someone/something", "--offline", "-p", SECRET, home=tmp_path)
    assert ended.returncode == 1
    assert "NETWORK" not in ended.stderr
    assert "--offline forbids" in ended.stderr


def test_words_are_written_to_the_history_alone(tmp_path: Path) -> None:
    home, source = tmp_path / "home", tmp_path / "model"
    write_checkpoint(source)
    short = ("-n", "4", "--temp", "0")
    ended = m1("run", source, "--session", "mine", "-p", SECRET, *short, home=home)
    assert ended.returncode == 0, ended.stderr
    holding = {
        path.name.partition("-")[0]
        for path in tmp_path.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    }
    assert holding == {"history.db"}
    assert SECRET not in ended.stderr


@pytest.mark.parametrize(
    ("owner", "name"),
    [("m1local.sampling:Sampler", "__call__"), ("m1local.chat", "_with_seed")],
)
def test_the_traceback_of_a_bug_shows_no_words(tmp_path: Path, owner: str, name: str) -> None:
    source = tmp_path / "model"
    write_checkpoint(source)
    code = (
        f"import pkgutil\nowner = pkgutil.resolve_name({owner!r})\n"
        "def broken(*arguments, **options):\n    raise ZeroDivisionError('a bug')\n"
        f"setattr(owner, {name!r}, broken)\n"
    )
    ended = m1("chat", source, "-p", SECRET, home=tmp_path / "home", code=code)
    assert "a bug" in ended.stderr
    assert ended.returncode == 1
    assert SECRET not in ended.stderr + ended.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_conversation_in_the_terminal_opens_no_socket(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyte", reason="the terminal emulator is missing: pip install -e .[dev]")
    from tests.screen import Screen

    lend_library(tmp_path / "home")
    command = ["chat", str(tiny_checkpoint), "-n", "8", "--temp", "0"]
    screen = Screen(command, {"M1_HOME": str(tmp_path / "home")}, GUARD)
    try:
        screen.wait_for("(?m)^>>>")
        for typed, expected in (
            (SECRET, "tokens/s"),
            ("/retry", "(?s)tokens/s.*tokens/s"),
            ("/edit 1 another", "(?s)another.*tokens/s"),
            (f"/export {tmp_path}/talk.html", "Wrote"),
            ("/list", "another"),
            ("/show info", "layers"),
        ):
            screen.settle()
            screen.type(f"{typed}\r")
            screen.wait_for(expected)
        screen.settle()
        screen.type("/bye\r")
        assert screen.exit_code() == 0
        assert b"NETWORK" not in screen.sent
    finally:
        screen.close()
