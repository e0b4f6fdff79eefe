"""`History`: what the front ends keep of conversations, and how they find it again.

What it is: the API, one transaction for each change. Messages form a tree: editing a question or
asking for another answer adds a version beside the old one, and deletes nothing. What it is not:
the file itself (database.py), or the session that the model answers in (m1local.chat).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from m1local.errors import M1Error
from m1local.home import home
from m1local_app.columns import one_line, shortened
from m1local_app.history import queries, search
from m1local_app.history.database import Database
from m1local_app.history.records import (
    TITLE_COLUMNS,
    Hit,
    Role,
    StoredConversation,
    StoredMessage,
    now,
    parameters_text,
    storable,
    time_of,
)
from m1local_app.language import tr

NAME = "history.db"
CANDIDATES = 5  # named where a title is ambiguous
FORGOTTEN_DAYS = 1  # a conversation without messages may still get its first for so long


class ContinuedError(Exception):
    """Somebody else has gone on with a conversation meanwhile; nothing was added."""


class History:
    """The conversations kept in one file; may be used by several threads and processes at once."""

    def __init__(self, database: Database) -> None:
        """Keep conversations in `database`; `History.open` is the usual way."""
        self._database = database
        with database.reading() as connection:
            search.add_folding(connection)

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """Open the history at `path`, or that of M1_HOME; raises StorageError where it cannot."""
        return cls(Database(home() / NAME if path is None else path))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        """Use the history; it is closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def begin(self, *, system: str = "", title: str = "") -> int:
        """Begin a conversation; it is listed once it has a message. Returns its id."""
        time = now()
        with self._database.writing() as connection:
            cursor = connection.execute(
                "INSERT INTO conversation(turn, created, changed, title, system) "
                f"VALUES ({queries.NEXT_TURN}, ?, ?, ?, ?)",
                (time, time, storable(one_line(title)), storable(system)),
            )
        return queries.new_id(cursor)

    def add(
        self,
        conversation_id: int,
        role: Role,
        content: str,
        *,
        parent: int | None,
        parameters: Mapping[str, object] | None = None,
        model: str = "",
        checkpoint: str = "",
        token_ids: Sequence[int] = (),
        finish: str | None = None,
        last: bool = False,
        beside: int | None = None,
    ) -> int:
        """Add a message after `parent` (None: as the first) and show it; returns its id.

        A question takes a conversation out of the bin: somebody goes on with it. With `last`,
        raises ContinuedError where something is shown after `parent` already, but for `beside`.
        """
        values = (
            conversation_id, parent, role, storable(model), storable(checkpoint), finish, now(),
            parameters_text(parameters), json.dumps(list(token_ids)), storable(content),
        )  # fmt: skip
        with self._database.writing() as connection:
            queries.check_conversation(connection, conversation_id)
            if parent is not None and queries.owner(connection, parent) != conversation_id:
                raise ValueError(f"message {parent} is not of conversation {conversation_id}")
            after = queries.following(connection, conversation_id, parent) if last else []
            if after not in ([], [beside]):
                raise ContinuedError
            cursor = connection.execute(
                "INSERT INTO message(conversation_id, parent, role, model, checkpoint, finish, "
                "created, parameters, token_ids, content) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
            queries.show(connection, conversation_id, queries.new_id(cursor))
            if role == "user":
                queries.restore(connection, conversation_id)
        return queries.new_id(cursor)

    def update(
        self, message_id: int, *, content: str, token_ids: Sequence[int], finish: str | None
    ) -> None:
        """Replace an answer by a longer or the whole one; `finish` None: it is unfinished."""
        with self._database.writing() as connection:
            owner = queries.owner(connection, message_id)
            connection.execute(
                "UPDATE message SET content = ?, token_ids = ?, finish = ? WHERE id = ?",
                (storable(content), json.dumps(list(token_ids)), finish, message_id),
            )
            queries.touch(connection, owner)

    def discard(self, message_id: int, *, head: int | None) -> bool:
        """Delete a message and show what was shown before, up to `head`; False where others follow.

        For a question whose answer never began. Where something else is shown by now, that stays.
        """
        with self._database.writing() as connection:
            owner = queries.owner(connection, message_id)
            follower = "SELECT 1 FROM message WHERE parent = ?"
            if connection.execute(follower, (message_id,)).fetchone():
                return False
            shown = connection.execute("SELECT head FROM conversation WHERE id = ?", (owner,))
            if shown.fetchone()[0] == message_id:
                queries.show(connection, owner, head)
            connection.execute("DELETE FROM message WHERE id = ?", (message_id,))
        return True

    def touch(self, conversation_id: int) -> None:
        """Note that something goes on in a conversation, as while a long prompt is read."""
        with self._database.writing() as connection:
            queries.touch(connection, conversation_id)

    def path(self, conversation_id: int) -> list[StoredMessage]:
        """The shown messages, from the first to the head."""
        return self._messages(queries.PATH, conversation_id)

    def messages(self, conversation_id: int) -> list[StoredMessage]:
        """All messages in order of creation, those of other versions too."""
        return self._messages(
            f"SELECT {queries.MESSAGE_COLUMNS} FROM message WHERE conversation_id = ? ORDER BY id",
            conversation_id,
        )

    def versions(self, message_id: int) -> list[StoredMessage]:
        """A message and those in its place, in order of creation."""
        return self._messages(
            f"SELECT {queries.MESSAGE_COLUMNS} FROM message JOIN message AS itself "
            "ON itself.id = ? AND message.parent IS itself.parent "
            "AND message.conversation_id = itself.conversation_id ORDER BY message.id",
            message_id,
        )

    def show_version(self, message_id: int) -> None:
        """Show this version, and below it what was added last."""
        with self._database.writing() as connection:
            owner = queries.owner(connection, message_id)
            newest = connection.execute(queries.NEWEST_BELOW, (message_id,)).fetchone()[0]
            queries.show(connection, owner, newest)

    def set_head(self, conversation_id: int, message_id: int | None) -> None:
        """Show the path that ends with `message_id`; None: nothing yet."""
        with self._database.writing() as connection:
            queries.check_conversation(connection, conversation_id)
            if message_id is not None and queries.owner(connection, message_id) != conversation_id:
                raise ValueError(f"message {message_id} is not of conversation {conversation_id}")
            queries.show(connection, conversation_id, message_id)

    def set_system(self, conversation_id: int, text: str) -> None:
        """Change the system prompt."""
        with self._database.writing() as connection:
            queries.check_conversation(connection, conversation_id)
            connection.execute(
                "UPDATE conversation SET system = ? WHERE id = ?",
                (storable(text), conversation_id),
            )
            queries.touch(connection, conversation_id)

    def rename(self, conversation_id: int, title: str) -> None:
        """Change the title; an empty one leaves it to the first question. No change in order."""
        with self._database.writing() as connection:
            queries.check_conversation(connection, conversation_id)
            connection.execute(
                "UPDATE conversation SET title = ? WHERE id = ?",
                (storable(one_line(title)), conversation_id),
            )

    def conversation(self, conversation_id: int) -> StoredConversation:
        """One conversation; raises M1Error where there is none, or where it is in the bin."""
        query = queries.CONVERSATIONS.format(where="id = ?")
        rows = self._rows(query, conversation_id) if 0 < conversation_id < queries.ENDLESS else []
        if not rows:
            raise queries.no_conversation(conversation_id)
        if rows[0][6] is not None:
            raise M1Error(
                tr(
                    "Conversation {id} is in the bin; `m1 history restore {id}` takes it out.",
                    id=conversation_id,
                )
            )
        return _conversation(rows[0])

    def conversations(
        self, *, limit: int | None = None, binned: bool = False
    ) -> list[StoredConversation]:
        """Those that have messages, the last changed first; with `binned`, those in the bin."""
        where = f"binned IS {'NOT ' if binned else ''}NULL AND {queries.HAS_MESSAGES}"
        query = queries.CONVERSATIONS.format(where=f"{where} ORDER BY turn DESC LIMIT ?")
        return [_conversation(row) for row in self._rows(query, -1 if limit is None else limit)]

    def latest(self) -> StoredConversation | None:
        """The one changed last, or None."""
        return next(iter(self.conversations(limit=1)), None)

    def find(self, name: str, *, parts: bool = False, binned: bool = False) -> StoredConversation:
        """A conversation by its number or title, or with `parts` by a part of that; raises M1Error.

        Digits are a number or a whole title, never a part: it would be somebody else's. With
        `binned`, titles are those in the bin; a number may also be that of a listed one.
        """
        where = f"binned IS {'NOT ' if binned else ''}NULL"
        rows = self._rows(queries.CONVERSATIONS.format(where=where))
        known = [_conversation(row) for row in rows]
        wanted = name.strip()
        for one in known:
            if wanted == str(one.id):
                return one
        folded = wanted.casefold()
        ways = [
            [one for one in known if one.title == wanted],
            [one for one in known if one.title.casefold() == folded],
        ]
        if parts and not wanted.isdecimal():
            ways.append([one for one in known if one.title.casefold().startswith(folded)])
            ways.append([one for one in known if folded in one.title.casefold()])
        for found in ways:
            if found and folded:
                return _only(found, wanted)
        if wanted.isdecimal() and len(wanted) < 19:  # SQLite's integers have 64 bits
            return self.conversation(int(wanted))  # which says where it is
        if binned:
            message = tr(
                "No conversation in the bin is called {name}; `m1 history list --bin` shows them.",
                name=wanted,
            )
        else:
            message = tr(
                "No conversation is called {name}; `m1 history list` shows them.", name=wanted
            )
        raise M1Error(message)

    def search(self, text: str, *, limit: int = 50) -> list[Hit]:
        """Messages that hold all words of `text`, in any version, the newest first."""
        words = search.words_of(text)
        if not words:
            return []
        where, parameters = search.condition(words)
        found = self._messages(
            f"SELECT {queries.MESSAGE_COLUMNS} FROM message JOIN conversation "
            "ON conversation.id = message.conversation_id "
            f"WHERE conversation.binned IS NULL AND {where} ORDER BY message.id DESC LIMIT ?",
            *parameters,
            limit,
        )
        ids = {message.conversation_id for message in found}
        marks = ", ".join("?" * len(ids))
        rows = self._rows(queries.CONVERSATIONS.format(where=f"id IN ({marks})"), *ids)
        known = {row[0]: _conversation(row) for row in rows}
        return [
            Hit(known[message.conversation_id], message)
            for message in found
            if message.conversation_id in known  # not purged in between
        ]

    def delete(self, conversation_id: int) -> None:
        """Put a conversation into the bin: no longer listed or found, but not lost."""
        self._set_binned(conversation_id, now())

    def restore(self, conversation_id: int) -> None:
        """Take a conversation out of the bin."""
        self._set_binned(conversation_id, None)

    def purge(
        self, *, conversation_id: int | None = None, older_than: timedelta | None = None
    ) -> int:
        """Delete for good: one conversation, in the bin or not, or all that are in the bin.

        With `older_than`, only what was last changed, or put into the bin, longer ago. Returns how
        many; afterwards no byte of their text is in the file, or of anything deleted before.
        """
        before = now() - (older_than or timedelta(0)) // timedelta(microseconds=1)
        forgotten = now() - timedelta(days=FORGOTTEN_DAYS) // timedelta(microseconds=1)
        with self._database.writing() as connection:
            if conversation_id is not None:
                queries.check_conversation(connection, conversation_id)
                where, values = "id = ?", [conversation_id]
            else:
                where, values = "binned IS NOT NULL", []
            if older_than is not None:
                where, values = f"{where} AND coalesce(binned, changed) <= ?", [*values, before]
            count = queries.delete(connection, where, values)
            queries.delete(connection, f"NOT {queries.HAS_MESSAGES} AND changed <= ?", [forgotten])
        self._database.forget_deleted()
        return count

    def user_texts(self, limit: int = 1000) -> list[str]:
        """The last `limit` questions, the oldest first."""
        rows = self._rows(
            "SELECT content FROM message JOIN conversation "
            "ON conversation.id = message.conversation_id "
            "WHERE role = 'user' AND binned IS NULL ORDER BY message.id DESC LIMIT ?",
            limit,
        )
        return [content for (content,) in reversed(rows)]

    def _set_binned(self, conversation_id: int, time: int | None) -> None:
        with self._database.writing() as connection:
            queries.check_conversation(connection, conversation_id)
            connection.execute(
                "UPDATE conversation SET binned = ? WHERE id = ?", (time, conversation_id)
            )

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._database.reading() as connection:
            return connection.execute(query, values).fetchall()

    def _messages(self, query: str, *values: object) -> list[StoredMessage]:
        return [StoredMessage.from_row(row) for row in self._rows(query, *values)]


def _conversation(row: tuple[Any, ...]) -> StoredConversation:
    """A row of CONVERSATIONS; without a title of its own it has that of its first question."""
    identifier, title, system, created, changed, messages, _, question = row
    return StoredConversation(
        id=identifier,
        title=title or shortened(one_line(question or ""), TITLE_COLUMNS),
        system=system,
        created=time_of(created),
        changed=time_of(changed),
        messages=messages,
    )


def _only(found: list[StoredConversation], wanted: str) -> StoredConversation:
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{one.id} ({one.title})" for one in found[:CANDIDATES])
    more = ", …" if len(found) > CANDIDATES else ""
    raise M1Error(
        tr(
            "{name} may be several conversations: {candidates}; give the number of one.",
            name=wanted,
            candidates=names + more,
        )
    )
