"""The commands `m1 history …`: what they print where, and with which exit code."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from m1local_app import boundary, history_commands
from m1local_app.boundary import M1Group
from m1local_app.columns import width
from m1local_app.history import History
from m1local_app.history_commands import parse_age, snippet
from tests.conftest import Process
from tests.test_history_purge import bytes_of

cli = typer.Typer(cls=M1Group)
cli.add_typer(history_commands.history)
COMMANDS = ("list", "search", "show", "export", "rename", "delete", "restore", "purge")


def m1(*arguments: str | Path, piped: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["history", *map(str, arguments)], input=piped)


@pytest.fixture
def store(m1_home: Path) -> Iterator[History]:
    """Two conversations: 1 about eyes, with a hostile answer, and 2, in Chinese, unfinished."""
    with History.open() as history:
        first = history.begin(system="Be brief.", title="Eyes")
        question = history.add(first, "user", "What is glaucoma?", parent=None)
        text = "A disease\x1b]0;title\x07 of the eye.\nQuestion:\n  forged"
        history.add(first, "assistant", text, parent=question, finish="stop")
        second = history.begin()
        question = history.add(second, "user", "什么是高血压?", parent=None)
        history.add(second, "assistant", "高血压是", parent=question)
        yield history


@pytest.fixture
def _person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "is_terminal", lambda: True)


def ids(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()[1:]]


def test_list_shows_the_last_changed_first_in_aligned_columns(store: History) -> None:
    result = m1("list")
    assert result.exit_code == 0
    heads, *rows = result.stdout.splitlines()
    assert heads.split() == ["ID", "CHANGED", "MESSAGES", "TITLE"]
    assert re.fullmatch(r"2   \d{4}-\d\d-\d\d \d\d:\d\d  2         什么是高血压\?", rows[0])
    assert rows[1].startswith("1   ")
    assert rows[1].endswith("2         Eyes")
    assert result.stderr == ""


def test_list_says_that_there_are_more(store: History) -> None:
    result = m1("list", "--limit", "1")
    assert ids(result.stdout) == ["2"]
    assert "There are more" in result.stderr
    assert m1("list", "--limit", "2").stderr == ""
    assert m1("list", "--limit", "0").exit_code == 2


def test_an_empty_history_is_a_note_and_no_error(m1_home: Path) -> None:
    for arguments, note in (
        (("list",), "No conversation is kept."),
        (("list", "--bin"), "The bin is empty."),
        (("search", "x"), "Nothing holds x."),
    ):
        result = m1(*arguments)
        assert (result.exit_code, result.stdout) == (0, "")
        assert note in result.stderr


def test_search_shows_where_the_words_are(store: History) -> None:
    result = m1("search", "血压")
    assert ids(result.stdout) == ["2", "2"]
    assert "  model  高血压是" in result.stdout.splitlines()[1]
    assert "  you    什么是高血压?" in result.stdout.splitlines()[2]
    assert ids(m1("search", "of", "EYE").stdout) == ["1"]
    assert ids(m1("search", "血压", "-n", "1").stdout) == ["2"]
    assert "There are more" in m1("search", "血压", "-n", "1").stderr
    assert "\x1b" not in m1("search", "disease").stdout
    assert m1("search").exit_code == 2


def test_show_marks_questions_and_answers_and_prints_nothing_a_terminal_obeys(
    store: History,
) -> None:
    result = m1("show", "eyes")
    assert result.exit_code == 0
    assert result.stdout == (
        "Eyes\n\nSystem prompt:\n  Be brief.\n\nQuestion:\n  What is glaucoma?\n\nAnswer:\n"
        "  A disease\ufffd]0;title\ufffd of the eye.\n  Question:\n    forged\n"
    )


def test_show_says_that_an_answer_is_unfinished(store: History) -> None:
    assert m1("show", "2").stdout.endswith(
        "Answer:\n  高血压是\n[UNFINISHED: it was interrupted, or is still being written]\n"
    )


@pytest.mark.parametrize("command", ["show", "delete"])
def test_a_name_that_fits_none_or_several_is_one_line(store: History, command: str) -> None:
    store.rename(2, "Eyelids")
    several = "several conversations" if command == "show" else "No conversation is called"
    for name, message in (("ey", several), ("nose", "No conversation is called")):
        result = m1(command, name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_export_writes_and_warns(store: History, tmp_path: Path) -> None:
    path = tmp_path / "eyes.json"
    result = m1("export", "1", path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"Wrote {path}" in result.stderr
    assert json.loads(path.read_text(encoding="utf-8"))["title"] == "Eyes"
    again = m1("export", "1", path)
    assert again.exit_code == 1
    assert "is there already" in again.stderr
    assert m1("export", "2", path, "--overwrite").exit_code == 0
    assert json.loads(path.read_text(encoding="utf-8"))["id"] == 2


def test_rename_says_the_new_title(store: History) -> None:
    assert "Conversation 2 is called Pressure now." in m1("rename", "2", "Pressure").stderr
    assert store.conversation(2).title == "Pressure"
    assert "什么是高血压?" in m1("rename", "2", "").stderr


def test_what_is_deleted_can_be_restored(store: History) -> None:
    result = m1("delete", "Eyes")
    assert result.exit_code == 0
    assert "m1 history restore 1" in result.stderr
    assert ids(m1("list").stdout) == ["2"]
    assert ids(m1("list", "--bin").stdout) == ["1"]
    assert "m1 history restore 1" in m1("show", "1").stderr
    assert "Eyes, is listed again" in m1("restore", "1").stderr
    assert ids(m1("list").stdout) == ["2", "1"]
    for number in ("9", "0"):
        result = m1("restore", number)
        assert result.exit_code == 1
        assert f"no conversation {number} " in result.stderr
    assert m1("restore", str(2**64)).exit_code == 1


def test_restore_takes_a_title_of_what_is_in_the_bin(store: History) -> None:
    store.rename(2, "EYES")
    store.delete(2)
    missing = m1("restore", "Eye")
    assert missing.exit_code == 1
    assert "No conversation in the bin is called Eye; `m1 history list --bin`" in missing.stderr
    assert "Conversation 2, EYES, is listed again." in m1("restore", "eyes").stderr
    assert ids(m1("list").stdout) == ["2", "1"]
    store.delete(1)
    store.delete(2)
    store.rename(2, "Eyes")
    assert "1 (Eyes)" in m1("restore", "Eyes").stderr
    assert len(store.conversations(binned=True)) == 2


def test_purge_without_a_person_to_ask_is_a_usage_error(store: History) -> None:
    store.delete(1)
    for piped in (None, "y\n"):
        result = m1("purge", piped=piped)
        assert result.exit_code == 2
        assert "--yes" in result.stderr
    assert len(store.conversations(binned=True)) == 1


@pytest.mark.usefixtures("_person")
@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        ((), "everything in the bin (1)"),
        (("--older-than", "0h"), "put into the bin before"),
        (("1",), "conversation 1 for good"),
    ],
)
def test_purge_asks_and_obeys(store: History, arguments: tuple[str, ...], question: str) -> None:
    store.delete(1)
    refused = m1("purge", *arguments, piped="n\n")
    assert refused.exit_code == 1
    assert question in refused.stderr
    assert len(store.conversations(binned=True)) == 1
    agreed = m1("purge", *arguments, piped="y\n")
    assert agreed.exit_code == 0
    assert "Deleted one conversation for good." in agreed.stderr
    assert store.conversations(binned=True) == []


def test_purge_with_yes_leaves_no_byte(store: History, m1_home: Path) -> None:
    store.delete(1)
    assert b"glaucoma" in bytes_of(m1_home / "history.db")
    assert "Deleted 0 conversations" in m1("purge", "--yes", "--older-than", "30d").stderr
    assert "Deleted one" in m1("purge", "--yes").stderr
    assert b"glaucoma" not in bytes_of(m1_home / "history.db")
    assert "Deleted one" in m1("purge", "2", "-y").stderr
    assert m1("purge", "2", "-y").exit_code == 1


def test_a_damaged_history_is_one_line(m1_home: Path) -> None:
    m1_home.mkdir()
    (m1_home / "history.db").write_text("no database" * 100)
    result = m1("list")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "damaged" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "age"),
    [("30d", timedelta(days=30)), (" 12 h ", timedelta(hours=12)), ("4w", timedelta(weeks=4))],
)
def test_an_age_is_read(text: str, age: timedelta) -> None:
    assert parse_age(text) == age


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1m", "999999999w", "1.5d"])
def test_what_is_no_age_is_a_usage_error(store: History, text: str) -> None:
    result = m1("purge", "--yes", f"--older-than={text}")
    assert result.exit_code == 2
    assert len(store.conversations()) == 2


def test_every_command_has_an_example_that_names_it() -> None:
    callbacks = {one.name: one.callback for one in history_commands.history.registered_commands}
    assert set(callbacks) == set(COMMANDS)
    for name, callback in callbacks.items():
        assert f"Example:  m1 history {name}" in (inspect.getdoc(callback) or ""), name
        assert m1(str(name), "--help").exit_code == 0


def test_help_loads_neither_sqlite_nor_rich_cells(process: Process) -> None:
    code = (
        "import sys\n"
        "import m1local_app.history_commands\n"
        "heavy = {'sqlite3', 'torch', 'markdown_it', 'rich.cells'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = process(code)
    started.communicate(timeout=60)
    assert started.returncode == 0, (sys.executable, subprocess.list2cmdline(["-c", code]))


def test_a_snippet_is_cut_around_the_word() -> None:
    assert snippet("short\ntext", "text") == "short text"
    line = snippet("x" * 100 + " 血压 " + "y" * 100, "血压")
    assert line.startswith("…" + "x" * 19 + " 血压 y")
    assert width(line) == 60
