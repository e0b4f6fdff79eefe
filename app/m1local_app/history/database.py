"""The file of the history: opened, checked, brought up to date, and written to safely.

What it is: SQLite in WAL mode, readable only by its owner, one transaction for each change, and
errors of the disk as one line for the user. Deleted text is overwritten (secure_delete). What it is
not: what the rows mean (store.py). A file of another program, a newer version or a damaged one is
never changed.

One connection serves all threads of the process, behind a lock; other processes have their own.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m1local.errors import StorageError
from m1local_app.language import tr

APPLICATION_ID = 0x4D31_6869  # "M1hi" at byte 68 of the file
BUSY_SECONDS = 30.0
OLDEST_SQLITE = (3, 34, 0)  # the first with FTS5's trigram tokenizer

# A conversation's messages are a tree: versions of a question or an answer have the same parent.
# `head` is the last message of the path that is shown. `turn` orders conversations by their last
# change, whatever the clock does. The long texts come last: what only follows `parent` skips them.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversation (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            head INTEGER REFERENCES message(id),
            turn INTEGER NOT NULL,
            created INTEGER NOT NULL,
            changed INTEGER NOT NULL,
            binned INTEGER,
            title TEXT NOT NULL,
            system TEXT NOT NULL
        )""",
        """CREATE TABLE message (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation_id INTEGER NOT NULL REFERENCES conversation(id),
            parent INTEGER REFERENCES message(id),
            role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
            model TEXT NOT NULL,
            checkpoint TEXT NOT NULL,
            finish TEXT,
            created INTEGER NOT NULL,
            parameters TEXT NOT NULL,
            token_ids TEXT NOT NULL,
            content TEXT NOT NULL
        )""",
        "CREATE INDEX conversation_by_turn ON conversation(turn)",
        "CREATE INDEX conversation_by_head ON conversation(head)",
        "CREATE INDEX message_by_conversation ON message(conversation_id)",
        "CREATE INDEX message_by_parent ON message(parent)",
        """CREATE VIRTUAL TABLE message_text USING fts5(
            content, content = 'message', content_rowid = 'id', tokenize = 'trigram'
        )""",
        """CREATE TRIGGER message_added AFTER INSERT ON message BEGIN
            INSERT INTO message_text(rowid, content) VALUES (new.id, new.content);
        END""",
        """CREATE TRIGGER message_updated AFTER UPDATE OF content ON message BEGIN
            INSERT INTO message_text(message_text, rowid, content)
            VALUES ('delete', old.id, old.content);
            INSERT INTO message_text(rowid, content) VALUES (new.id, new.content);
        END""",
        """CREATE TRIGGER message_deleted AFTER DELETE ON message BEGIN
            INSERT INTO message_text(message_text, rowid, content)
            VALUES ('delete', old.id, old.content);
        END""",
    ),
)


class Database:
    """An open history file."""

    def __init__(self, path: Path) -> None:
        """Open `path`, made if it is not there; raises StorageError for one that is not ours."""
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StorageError(
                tr(
                    "The history needs SQLite 3.34 or newer, and this Python has {version}; "
                    "install a newer Python.",
                    version=sqlite3.sqlite_version,
                )
            )
        self.path = path
        self._lock = threading.RLock()
        _make_private(path)
        with _explained(path):
            # Transactions are begun and ended here, not by the module (isolation_level=None).
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file; the last process to do so tidies up the files beside it."""
        with self._lock, _explained(self.path):
            self._connection.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one query."""
        with self._lock, _explained(self.path):
            yield self._connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one change: all of it is kept, or none where an error leaves it."""
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def forget_deleted(self) -> None:
        """Leave no byte of what was deleted in the file or beside it."""
        with self.writing() as connection:
            # The index keeps the pieces of deleted words until its parts are merged.
            connection.execute("INSERT INTO message_text(message_text) VALUES ('rebuild')")
        with self.reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("VACUUM")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise StorageError(
                tr(
                    "It is deleted, but traces stay in {path}-wal while another m1 reads it; "
                    "close that one and purge again.",
                    path=self.path,
                )
            )

    def _prepare(self) -> None:
        with _explained(self.path):
            with self._snapshot():  # another process may be making the file just now
                current = self._is_current()
            if not current:
                self._migrate()
            self._use_wal()
            for pragma in (
                "synchronous = FULL",  # a power cut loses no more than what was not written yet
                "foreign_keys = ON",
                "secure_delete = ON",
                "temp_store = MEMORY",  # no conversation in a folder for temporary files
            ):
                self._connection.execute(f"PRAGMA {pragma}")
        if os.name == "posix" and self.path.stat().st_mode & 0o077:
            with contextlib.suppress(PermissionError):  # another user's file stays as it is
                self.path.chmod(0o600)

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """What is read inside was true at one moment, whatever others write meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _is_current(self) -> bool:
        """Whether the schema is this version's; raises StorageError for what is not ours."""
        application, version = self._value("application_id"), self._value("user_version")
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application != APPLICATION_ID and (application or version or tables):
            raise StorageError(
                tr(
                    "{path} is a database of another program; move it away, and a new history "
                    "begins.",
                    path=self.path,
                )
            )
        if version > len(MIGRATIONS):
            raise StorageError(
                tr(
                    "{path} was written by a newer m1local; update this one, or move the file "
                    "away.",
                    path=self.path,
                )
            )
        return bool(version == len(MIGRATIONS))

    def _migrate(self) -> None:
        with self.writing() as connection:
            self._is_current()  # again: another process may have been faster
            for number in range(self._value("user_version"), len(MIGRATIONS)):
                for statement in MIGRATIONS[number]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    def _use_wal(self) -> None:
        """Switch to WAL; SQLite does not wait by itself where another process does the same."""
        if self._value("journal_mode") == "wal":
            return
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _value(self, pragma: str) -> Any:
        return self._connection.execute(f"PRAGMA {pragma}").fetchone()[0]


def _make_private(path: Path) -> None:
    """Make the folder and an empty file that only its owner may read; SQLite's others follow it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except PermissionError:
        if not path.is_file():
            raise StorageError(_unusable(path, tr("permission denied"))) from None
        return  # one that may only be read
    except OSError as error:
        raise StorageError(_unusable(path, error.strerror or str(error))) from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk or the file into one line; a bug stays what it is."""
    try:
        yield
    except sqlite3.Error as error:
        text = _explanation(path, error)
        if text is None:
            raise
        raise StorageError(text) from error


def _explanation(path: Path, error: sqlite3.Error) -> str | None:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes keep more above
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return tr(
            "{path} is damaged or no history ({reason}); move it away, and a new one begins.",
            path=path,
            reason=error,
        )
    if code == sqlite3.SQLITE_FULL:
        return tr("The disk is full: {path} cannot grow; free some space.", path=path)
    if code == sqlite3.SQLITE_READONLY:
        return tr(
            "{path} may only be read; change its permissions, or set M1_HOME to another folder.",
            path=path,
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return tr("Another program keeps {path} locked; close it and try again.", path=path)
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
        return _unusable(path, str(error))
    return None


def _unusable(path: Path, reason: str) -> str:
    return tr(
        "The history {path} cannot be used ({reason}); check the folder, or set M1_HOME to "
        "another.",
        path=path,
        reason=reason,
    )
