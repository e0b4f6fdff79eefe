"""Where answers go and questions come from: closed, full, or in another encoding."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1local_app.cli import cli
from m1local_app.textfile import decoded, read_text_file
from tests.conftest import ROOT
from tests.damage import refused

from m1local.errors import M1Error  # isort: skip

SHELL = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
TEXT = "什么是青光眼？\nWhat is glaucoma?"


def run(command: str, home: Path, *, code: int) -> str:
    """What `command`, in which m1 is the program, says on stderr."""
    program = f"'{sys.executable}' -c 'from m1local_app.cli import cli; cli()'"
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "quantize", "app"))
    done = subprocess.run(
        ["sh", "-c", command.replace("m1 ", f"{program} ")], capture_output=True, text=True,
        env=os.environ | {"M1_HOME": str(home), "PYTHONPATH": paths}, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@SHELL
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["--help", "list", "doctor"])
def test_a_full_disk_is_one_line(command: str, m1_home: Path) -> None:
    said = run(f"m1 {command} > /dev/full", m1_home, code=1)
    assert "the output cannot be written: No space left on device." in said


@SHELL
@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-"])
def test_a_stream_that_is_closed_holds_nothing(closed: str, m1_home: Path) -> None:
    run(f"m1 list {closed}", m1_home, code=0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_chinese_text_is_read_however_it_is_encoded(encoding: str, tmp_path: Path) -> None:
    content = TEXT.replace("\n", "\r\n").encode(encoding)
    assert decoded(content) == TEXT
    (tmp_path / "note.txt").write_bytes(content)
    assert read_text_file(tmp_path / "note.txt") == TEXT


@pytest.mark.parametrize("content", [b"\0\1", b"\xff\xff\xff", b"\x81"])
def test_what_is_no_text_is_refused(content: bytes, tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert decoded(content) is None
    (tmp_path / "note.txt").write_bytes(content)
    with refused(M1Error, "is no text in UTF-8, UTF-16 or GB18030"):
        read_text_file(tmp_path / "note.txt")
    shown = CliRunner().invoke(cli, ["chat", str(tiny_checkpoint)], input=content)
    assert shown.exit_code == 1
    assert "The input is no text in UTF-8" in shown.stderr


def test_a_piped_question_may_be_in_gb18030(tiny_checkpoint: Path, m1_home: Path) -> None:
    def asked(encoding: str) -> str:
        command = ["chat", str(tiny_checkpoint), "--temp", "0", "-n", "4"]
        shown = CliRunner().invoke(cli, command, input="心脏".encode(encoding))
        assert shown.exit_code == 0, shown.output
        return shown.stdout

    assert asked("gb18030") == asked("utf-8")


@SHELL
def test_ctrl_c_in_the_middle_of_an_import_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nprint('here', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\nprint('went on', flush=True)\n"
    )
    program = (
        "import signal, typer, m1local_app.cli as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # some shells ignore it
        "@c.cli.command()\ndef slowly() -> None:\n    import slow\n"
        "c.cli(['slowly'])\n"
    )
    paths = os.pathsep.join(
        [*(str(ROOT / part) for part in ("", "quantize", "app")), str(tmp_path)]
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(0.2)
        process.send_signal(2)
        said, error = process.communicate(timeout=60)
    assert (process.returncode, said, error) == (130, "", "interrupted\n")
