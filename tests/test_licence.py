"""The licence note, once for every source and never for the demo; the medical notice, once."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from m1local import home
from m1local_app import notices
from m1local_app.cli import cli
from m1local_app.notices import MEDICAL
from m1local_quantize.hub import Record

SHORT = ("-p", "hello", "-n", "1")


def m1(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


def recorded(m1_home: Path) -> set[str]:
    return set(json.loads((m1_home / "licences.json").read_text())) - {MEDICAL}


def test_it_is_shown_once_for_a_folder_and_again_for_another(
    tiny_checkpoint: Path, m1_home: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    assert "Licence" not in m1("quantize", tiny_checkpoint, tmp_path / "a", "--dry-run").stderr
    first = m1("quantize", tiny_checkpoint, tmp_path / "a", "--no-certify")
    assert first.stderr.count("Licence: the weights of") == 1
    assert "commercial use only by written permission" in " ".join(first.stderr.split())
    again = m1("quantize", tiny_checkpoint, tmp_path / "b", "--no-certify", "-r", "int8")
    assert "Licence" not in again.stderr
    assert "Licence" not in m1("run", tiny_checkpoint, *SHORT).stderr
    assert m1("run", other, *SHORT).stderr.count("Licence: the weights of") == 1
    assert "Licence" not in m1("run", other, *SHORT).stderr
    assert recorded(m1_home) == {str(tiny_checkpoint.resolve()), str(other.resolve())}


def test_a_fetched_folder_is_known_by_its_repository(
    tiny_checkpoint: Path, m1_home: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "fetched"))
    Record("someone/m1", "a" * 40, None, {}, complete=True).write(folder)
    m1("quantize", folder, tmp_path / "a", "--no-certify")
    assert recorded(m1_home) == {"someone/m1"}


def test_the_demo_is_quiet(m1_home: Path, tmp_path: Path) -> None:
    quantized = m1("quantize", home.DEMO, tmp_path / "a", "--no-certify")
    assert "Licence" not in quantized.stderr
    assert not (m1_home / "licences.json").exists()


def test_a_home_that_cannot_be_written_stops_nobody(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M1_HOME", str(tmp_path / "file"))
    assert "Licence" in m1("quantize", tiny_checkpoint, tmp_path / "a", "--no-certify").stderr
    notices.accept("one")
    assert notices.is_accepted("one")
    assert not notices.is_accepted("other")


def test_the_medical_notice_is_shown_once_and_recorded(
    tiny_checkpoint: Path, m1_home: Path
) -> None:
    first = m1("chat", tiny_checkpoint, *SHORT)
    assert "no medical advice" in " ".join(first.stderr.split())
    assert MEDICAL in json.loads((m1_home / "licences.json").read_text())
    assert "no medical advice" not in " ".join(m1("chat", tiny_checkpoint, *SHORT).stderr.split())


def test_a_disk_that_is_full_loses_nothing_that_was_accepted(
    m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices.accept("one")

    def cut(path: Path, text: str, **named: str) -> int:
        path.write_bytes(text.encode()[:9])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        notices.accept("other")
    assert notices.is_accepted("one")
    assert notices.is_accepted("other")  # by this process, which could not write it down
    notices._UNRECORDED.clear()
    assert notices.is_accepted("one")
    assert not notices.is_accepted("other")
    assert [path.name for path in m1_home.iterdir()] == ["licences.json"]
