"""The history's file: damage, permissions, a killed process, several processes at once.

Processes are real ones, started from this file's sources as texts.
"""

import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from m1local.errors import StorageError
from m1local_app.history import History, database
from tests.conftest import Process

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
WRITER = """
import sys
from m1local_app.history import History
name = sys.argv[1]
with History.open() as store:
    print("ready", flush=True)
    sys.stdin.readline()
    conversation = store.begin(title=name)
    parent = None
    for number in range(100):
        parent = store.add(conversation, "user", f"{name} {number}", parent=parent)
"""
STREAMING = """
from m1local_app.history import History
store = History.open()
question = store.add(store.begin(), "user", "q", parent=None)
answer = store.add(1, "assistant", "", parent=question)
text, ids = "", []
while True:
    text += f"word{len(ids)} "
    ids.append(len(ids))
    store.update(answer, content=text, token_ids=ids, finish=None)
    print(len(ids), flush=True)
"""


@pytest.fixture
def path(m1_home: Path) -> Path:
    return m1_home / "history.db"


@pytest.fixture
def store(path: Path) -> Iterator[History]:
    with History.open() as history:
        yield history


def say(store: History, *texts: str) -> int:
    conversation = store.begin()
    parent = None
    for text in texts:
        parent = store.add(conversation, "user", text, parent=parent)
    return conversation


@posix
def test_only_the_owner_may_read_the_file_and_those_beside_it(path: Path, store: History) -> None:
    say(store, "q")
    files = sorted(path.parent.glob("history.db*"))
    assert [file.name for file in files] == ["history.db", "history.db-shm", "history.db-wal"]
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@posix
def test_a_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    History.open().close()
    path.chmod(0o644)
    History.open().close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_no_moment_passes_in_which_others_could_read_the_new_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "chmod", refuse)
    History.open().close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_folder_is_made_on_demand_and_another_path_is_taken(tmp_path: Path) -> None:
    elsewhere = tmp_path / "a" / "b" / "other.db"
    with History.open(elsewhere) as store:
        say(store, "q")
    with History.open(elsewhere) as store:
        assert store.user_texts() == ["q"]


def test_the_safe_settings_of_sqlite_are_on(path: Path) -> None:
    opened = database.Database(path)
    with opened.reading() as connection:
        for pragma, value in (
            ("journal_mode", "wal"), ("secure_delete", 1), ("foreign_keys", 1),
            ("busy_timeout", 30_000), ("temp_store", 2),
        ):  # fmt: skip
            assert connection.execute(f"PRAGMA {pragma}").fetchone() == (value,), pragma
    opened.close()


def make_database(path: Path, *statements: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (("CREATE TABLE t(x)",), "another program"),
        (("PRAGMA application_id = 7",), "another program"),
        (
            (f"PRAGMA application_id = {database.APPLICATION_ID}", "PRAGMA user_version = 99"),
            "newer m1local",
        ),
    ],
    ids=["foreign", "foreign-but-empty", "newer"],
)
def test_a_file_that_is_not_ours_is_named_and_left_alone(
    path: Path, statements: tuple[str, ...], message: str
) -> None:
    make_database(path, *statements)
    path.chmod(0o644)
    before, mode = path.read_bytes(), path.stat().st_mode
    with pytest.raises(StorageError, match=message) as raised:
        History.open()
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before
    assert path.stat().st_mode == mode
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 4000]
)
def test_a_damaged_file_is_named_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"damaged or no history.*move it away"):
        History.open()
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_one_line_when_it_is_met(path: Path) -> None:
    with History.open() as store:
        say(store, *("text " * 200 for _ in range(50)))
    damaged = bytearray(path.read_bytes())
    damaged[8192:-4096] = b"\xff" * (len(damaged) - 12288)
    path.write_bytes(damaged)
    with History.open() as store, pytest.raises(StorageError, match="damaged"):
        store.path(1)


def test_a_folder_in_the_files_place_is_an_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"history\.db cannot be used"):
        History.open()


def test_a_file_in_the_folders_place_is_an_error(path: Path) -> None:
    path.parent.write_text("")
    with pytest.raises(StorageError, match=r"history\.db cannot be used"):
        History.open()


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
@posix
def test_a_folder_that_may_not_be_written_is_an_error(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied"):
        History.open()
    path.parent.chmod(0o700)


@pytest.mark.parametrize(
    ("pragma", "message"),
    [("query_only = ON", "may only be read"), ("max_page_count = 1", "disk is full")],
)
def test_a_disk_that_takes_nothing_is_one_line_and_nothing_is_lost(
    path: Path, pragma: str, message: str
) -> None:
    opened = database.Database(path)
    store = History(opened)
    say(store, "kept")
    with opened.reading() as connection:
        connection.execute(f"PRAGMA {pragma}")
    with pytest.raises(StorageError, match=message) as raised:
        say(store, "lost" * 100_000)
    assert str(path) in str(raised.value)
    assert store.user_texts() == ["kept"]
    store.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (sqlite3.SQLITE_IOERR_WRITE, "cannot be used"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "may only be read"),
        (sqlite3.SQLITE_CORRUPT_INDEX, "damaged"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "locked"),
        (sqlite3.SQLITE_CANTOPEN_ISDIR, "cannot be used"),
    ],
)
def test_sqlites_finer_codes_are_explained_too(path: Path, code: int, message: str) -> None:
    opened = database.Database(path)
    error = sqlite3.OperationalError("from SQLite")
    error.sqlite_errorcode = code
    with pytest.raises(StorageError, match=message), opened.reading():
        raise error
    opened.close()


def test_a_bug_stays_a_bug(path: Path) -> None:
    opened = database.Database(path)
    with pytest.raises(sqlite3.OperationalError, match="syntax"), opened.writing() as connection:
        connection.execute("NO SQL")
    opened.close()


def test_a_locked_file_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with History.open() as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            store.begin()
        other.close()
        store.begin()


def test_an_old_sqlite_is_named(m1_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    with pytest.raises(StorageError, match=r"SQLite 3\.34"):
        History.open()


def test_two_processes_lose_nothing(path: Path, process: Process) -> None:
    writers = [process(WRITER, name) for name in ("first", "second")]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    with History.open() as store:
        for name in ("first", "second"):
            messages = store.path(store.find(name).id)
            assert [one.content for one in messages] == [f"{name} {n}" for n in range(100)]
            assert len(store.search(name, limit=1000)) == 100


def test_processes_that_make_the_file_at_once_all_succeed(path: Path, process: Process) -> None:
    writers = [process(WRITER.replace("range(100)", "range(1)"), str(n)) for n in range(4)]
    for writer in writers:
        writer.communicate("go\n", timeout=60)
        assert writer.returncode == 0
    with History.open() as store:
        assert len(store.conversations()) == 4


def test_a_file_that_is_made_while_it_is_looked_at_is_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may finish a new file between two questions about it."""
    value = database.Database._value
    made = threading.Event()

    def make() -> None:
        History.open().close()
        made.set()

    other = threading.Thread(target=make)

    def slow(opened: database.Database, pragma: str) -> object:
        found = value(opened, pragma)
        if pragma == "application_id" and not other.ident:
            other.start()
            made.wait(0.5)  # it waits for us where what is read has to be true at one moment
        return found

    monkeypatch.setattr(database.Database, "_value", slow)
    with History.open() as store:
        store.begin()
    other.join(60)
    assert made.is_set()


def test_a_killed_process_leaves_what_it_had_of_the_answer(path: Path, process: Process) -> None:
    writer = process(STREAMING)
    assert writer.stdout is not None
    for number in range(1, 31):
        assert writer.stdout.readline() == f"{number}\n"
    writer.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    writer.communicate(timeout=60)
    with History.open() as store:
        question, answer = store.path(1)
        assert (question.content, answer.finish) == ("q", None)
        count = len(answer.token_ids)
        assert count >= 30
        assert answer.content == "".join(f"word{number} " for number in range(count))
        assert [hit.message.id for hit in store.search("word29")] == [answer.id]


def test_another_process_writes_while_one_streams(store: History, process: Process) -> None:
    """A lock held by one thread's change is waited for, not an error."""
    conversation = say(store, "q")
    answer = store.add(conversation, "assistant", "", parent=1)
    writer = process(WRITER, "other")
    stop = threading.Event()

    def release() -> None:
        writer.communicate("go\n", timeout=60)
        stop.set()

    thread = threading.Thread(target=release)
    thread.start()
    updates = 0
    while not stop.is_set():
        store.update(answer, content=f"text {updates}", token_ids=(), finish=None)
        updates += 1
    thread.join()
    assert writer.returncode == 0
    assert updates > 1
    assert len(store.path(store.find("other").id)) == 100
