"""Full text search in the history, for English and Chinese.

What it is: the SQL condition for the words a user typed. Words of three and more characters are
looked up in the trigram index, which needs no spaces between words; shorter ones, which it cannot
find, are looked for in every message. What it is not: a query language. Nothing that is typed is
ever syntax, only text to be found.
"""

import sqlite3

INDEXED = 3  # characters of the shortest word that the trigram index finds
MOST = 100  # words that are looked for; SQLite takes some hundreds
FOLD = "folded"


def words_of(text: str) -> list[str]:
    """The words to be found, the first MOST; a control character separates like a space."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return list(dict.fromkeys(words))[:MOST]


def condition(words: list[str]) -> tuple[str, list[str]]:
    """SQL that is true for a `message` with all `words`, and its parameters."""
    indexed = [word for word in words if len(word) >= INDEXED]
    short = [word for word in words if len(word) < INDEXED]
    parts: list[str] = []
    parameters: list[str] = []
    if indexed:
        parts.append("message.id IN (SELECT rowid FROM message_text WHERE message_text MATCH ?)")
        parameters.append(" AND ".join(_quoted(word) for word in indexed))
    for word in short:
        parts.append(f"instr({FOLD}(message.content), ?) > 0")
        parameters.append(word.casefold())
    return " AND ".join(parts), parameters


def add_folding(connection: sqlite3.Connection) -> None:
    """Give `connection` the function that makes upper and lower case the same."""
    connection.create_function(FOLD, 1, str.casefold, deterministic=True)


def _quoted(word: str) -> str:
    """`word` as a string of FTS5, in which only the quotation mark means something."""
    doubled = word.replace('"', '""')
    return f'"{doubled}"'
