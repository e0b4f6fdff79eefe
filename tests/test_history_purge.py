"""Deleting for good: no byte is left in any file, and nothing is deleted but what was meant."""

import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from m1local.errors import M1Error, StorageError
from m1local_app.history import History, database
from tests.test_history_files import say


@pytest.fixture
def path(m1_home: Path) -> Path:
    return m1_home / "history.db"


@pytest.fixture
def store(path: Path) -> Iterator[History]:
    with History.open() as history:
        yield history


def bytes_of(path: Path) -> bytes:
    """Everything in the database and the files beside it."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


def test_purging_leaves_no_byte_of_what_was_deleted(path: Path, store: History) -> None:
    # "qxz" is what the index keeps of the secret even where no whole word is left.
    secret, piece = b"qxzvsecret", b"qxz"
    conversation = say(store, "first", *["the qxzvsecret " + "padding " * 300] * 20)
    answer = store.add(conversation, "assistant", "qxzvsecret", parent=None)
    store.update(answer, content="other", token_ids=(), finish="stop")
    store.rename(conversation, "qxzvsecret title")
    store.set_system(conversation, "qxzvsecret system")
    kept = say(store, "what is kept")
    assert secret in bytes_of(path)
    store.delete(conversation)
    assert secret in bytes_of(path), "the bin keeps it"
    assert store.purge() == 1
    assert secret not in bytes_of(path)
    assert piece not in bytes_of(path)
    assert b"what is kept" in bytes_of(path)
    assert [one.id for one in store.conversations()] == [kept]
    assert store.search("kept")[0].conversation.id == kept


def test_purging_removes_traces_of_discarded_messages_too(path: Path, store: History) -> None:
    conversation = say(store, "kept")
    store.discard(store.add(conversation, "user", "qxzvsecret", parent=1), head=1)
    assert store.purge() == 0
    assert b"qxz" not in bytes_of(path)


def test_purging_says_that_a_reader_keeps_traces(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with History.open() as store:
        conversation = say(store, "q")
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM message").fetchall()
        with pytest.raises(StorageError, match="purge again"):
            store.purge(conversation_id=conversation)
        reader.close()
        assert store.purge() == 0
        assert store.conversations() == []


def test_purging_takes_only_what_is_in_the_bin_and_old_enough(store: History) -> None:
    listed, binned = say(store, "listed"), say(store, "binned")
    store.delete(binned)
    assert store.purge(older_than=timedelta(days=1)) == 0
    assert store.purge(conversation_id=listed, older_than=timedelta(days=1)) == 0
    assert store.purge(older_than=timedelta(0)) == 1
    assert store.user_texts() == ["listed"]
    assert store.purge() == 0
    assert store.purge(conversation_id=listed) == 1
    assert store.user_texts() == []


def test_purging_takes_forgotten_empty_conversations_but_no_fresh_one(
    store: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = store.begin(system="nothing was asked")
    assert store.purge() == 0
    assert store.conversation(conversation).system == "nothing was asked"
    monkeypatch.setattr("m1local_app.history.store.FORGOTTEN_DAYS", 0)
    store.purge()
    with pytest.raises(M1Error, match="no conversation"):
        store.conversation(conversation)


def test_purging_gives_the_space_back(path: Path) -> None:
    with History.open() as store:
        say(store, *["padding " * 300] * 20)
        size = len(bytes_of(path))
        store.purge(conversation_id=1)
        assert len(bytes_of(path)) < size
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA freelist_count").fetchone() == (0,)
    connection.close()
