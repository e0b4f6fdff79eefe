"""What the history answers: conversations, messages, and where a search found something.

What it is: values, and how they are read from a row. What it is not: anything that changes the
file; a record stays as it was when it was read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

Role = Literal["user", "assistant"]
TITLE_COLUMNS = 60
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMessage:
    """A question, or an answer with how it was made; `finish` None: unfinished or interrupted."""

    id: int
    conversation_id: int
    parent: int | None
    role: Role
    content: str
    token_ids: tuple[int, ...]
    parameters: Mapping[str, object]
    model: str
    checkpoint: str
    finish: str | None
    created: datetime

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Self:
        """Read the MESSAGE_COLUMNS of queries.py."""
        return cls(
            id=row[0],
            conversation_id=row[1],
            parent=row[2],
            role=row[3],
            model=row[4],
            checkpoint=row[5],
            finish=row[6],
            created=time_of(row[7]),
            parameters=json.loads(row[8]),
            token_ids=tuple(json.loads(row[9])),
            content=row[10],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConversation:
    """A conversation without its messages; `messages` counts those on the shown path."""

    id: int
    title: str
    system: str
    created: datetime
    changed: datetime
    messages: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A message that a search found, and its conversation."""

    conversation: StoredConversation
    message: StoredMessage


def time_of(microseconds: int) -> datetime:
    """The UTC time so many microseconds after 1970."""
    return _EPOCH + microseconds * _MICROSECOND


def now() -> int:
    """Microseconds since 1970."""
    return (datetime.now(UTC) - _EPOCH) // _MICROSECOND


def storable(text: str) -> str:
    """`text` as SQLite keeps and searches it whole: no NUL, no half of a surrogate pair."""
    return (
        text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    )


def parameters_text(parameters: Mapping[str, object] | None) -> str:
    """`parameters` as JSON that every reader accepts: infinities and the unknown become text."""
    return json.dumps(_plain(parameters or {}), ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {storable(str(name)): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        parts = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [_plain(part) for part in parts]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return storable(str(value))
