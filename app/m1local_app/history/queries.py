"""The SQL of the history, and the steps that several of its changes have in common.

What it is: queries as texts, and functions on a connection inside a transaction. What it is not:
where a transaction begins (database.py), or what the front ends call (store.py).
"""

import sqlite3
from collections.abc import Sequence

from m1local.errors import M1Error
from m1local_app.history.records import now
from m1local_app.language import tr

MESSAGE_COLUMNS = (
    "message.id, message.conversation_id, message.parent, message.role, message.model, "
    "message.checkpoint, message.finish, message.created, message.parameters, "
    "message.token_ids, message.content"
)
# One row for each conversation of `chosen`: its own columns, how many messages lead to its head,
# and its first question.
CONVERSATIONS = """
    WITH RECURSIVE chosen AS (SELECT * FROM conversation WHERE {where}),
    shown(conversation_id, parent) AS (
        SELECT chosen.id, message.parent FROM chosen JOIN message ON message.id = chosen.head
        UNION ALL
        SELECT shown.conversation_id, message.parent
        FROM shown JOIN message ON message.id = shown.parent
    ),
    counted AS (SELECT conversation_id, count(*) AS messages FROM shown GROUP BY conversation_id)
    SELECT chosen.id, chosen.title, chosen.system, chosen.created, chosen.changed,
        coalesce(counted.messages, 0), chosen.binned,
        (SELECT substr(content, 1, 1000) FROM message
         WHERE conversation_id = chosen.id AND role = 'user' ORDER BY id LIMIT 1)
    FROM chosen LEFT JOIN counted ON counted.conversation_id = chosen.id
    ORDER BY chosen.turn DESC
"""
HAS_MESSAGES = "EXISTS (SELECT 1 FROM message WHERE conversation_id = conversation.id)"
NEXT_TURN = "(SELECT coalesce(max(turn), 0) + 1 FROM conversation)"
PATH = f"""
    WITH RECURSIVE shown(id, parent, depth) AS (
        SELECT id, parent, 0 FROM message
        WHERE id = (SELECT head FROM conversation WHERE id = ?)
        UNION ALL
        SELECT message.id, message.parent, shown.depth + 1
        FROM shown JOIN message ON message.id = shown.parent
    )
    SELECT {MESSAGE_COLUMNS} FROM shown JOIN message ON message.id = shown.id
    ORDER BY shown.depth DESC
"""
# Ids grow, so the newest message below a version is one that nothing follows.
NEWEST_BELOW = """
    WITH RECURSIVE below(id) AS (
        VALUES (?)
        UNION ALL
        SELECT message.id FROM below JOIN message ON message.parent = below.id
    )
    SELECT max(id) FROM below
"""


ENDLESS = 2**63  # the first number that SQLite does not have


def no_conversation(conversation_id: int) -> M1Error:
    """The error for an id that no conversation has."""
    return M1Error(
        tr(
            "There is no conversation {id} (any more); `m1 history list` shows them.",
            id=conversation_id,
        )
    )


def check_conversation(connection: sqlite3.Connection, conversation_id: int) -> None:
    """Raise M1Error where there is no such conversation; one in the bin is there."""
    query = "SELECT 1 FROM conversation WHERE id = ?"
    possible = 0 < conversation_id < ENDLESS
    if not possible or connection.execute(query, (conversation_id,)).fetchone() is None:
        raise no_conversation(conversation_id)


def owner(connection: sqlite3.Connection, message_id: int) -> int:
    """The id of a message's conversation; raises M1Error where the message is gone."""
    query = "SELECT conversation_id FROM message WHERE id = ?"
    row = connection.execute(query, (message_id,)).fetchone()
    if row is None:
        raise M1Error(
            tr(
                "Message {id} is no longer in the history; another m1 has deleted it. Begin a new "
                "conversation.",
                id=message_id,
            )
        )
    return int(row[0])


def following(
    connection: sqlite3.Connection, conversation_id: int, parent: int | None
) -> list[int]:
    """The ids of what is shown after `parent` (None: at all); none where `parent` is not shown."""
    ids = [int(row[0]) for row in connection.execute(PATH, (conversation_id,))]
    if parent is None:
        return ids
    return ids[ids.index(parent) + 1 :] if parent in ids else []


def touch(connection: sqlite3.Connection, conversation_id: int) -> None:
    """Note that a conversation has changed: it is the latest now."""
    connection.execute(
        f"UPDATE conversation SET changed = ?, turn = {NEXT_TURN} WHERE id = ?",
        (now(), conversation_id),
    )


def show(connection: sqlite3.Connection, conversation_id: int, head: int | None) -> None:
    """Let the shown path end with `head`."""
    connection.execute("UPDATE conversation SET head = ? WHERE id = ?", (head, conversation_id))
    touch(connection, conversation_id)


def restore(connection: sqlite3.Connection, conversation_id: int) -> None:
    """Take a conversation out of the bin."""
    connection.execute("UPDATE conversation SET binned = NULL WHERE id = ?", (conversation_id,))


def delete(connection: sqlite3.Connection, where: str, values: Sequence[object]) -> int:
    """Delete the conversations `where` with their messages; returns how many."""
    chosen = f"SELECT id FROM conversation WHERE {where}"
    ids = [(row[0],) for row in connection.execute(chosen, values)]
    # Each names the other, so the head goes first.
    connection.executemany("UPDATE conversation SET head = NULL WHERE id = ?", ids)
    connection.executemany("DELETE FROM message WHERE conversation_id = ?", ids)
    connection.executemany("DELETE FROM conversation WHERE id = ?", ids)
    return len(ids)


def new_id(cursor: sqlite3.Cursor) -> int:
    """The id of the row that `cursor` has inserted."""
    assert cursor.lastrowid is not None
    return cursor.lastrowid
