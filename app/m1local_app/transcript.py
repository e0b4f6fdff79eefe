"""What an exported conversation says, whatever its format.

What it is: the messages of one conversation at one moment, and the facts about each in words of
the chosen language. What it is not: a format (export.py, export_html.py), or the store itself.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from m1local_app.columns import one_line
from m1local_app.history import History, StoredConversation, StoredMessage
from m1local_app.language import tr


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation: the `shown` messages in order, and `every` one with all versions."""

    conversation: StoredConversation
    shown: tuple[StoredMessage, ...]
    every: tuple[StoredMessage, ...]
    exported: datetime

    @classmethod
    def of(cls, store: History, conversation_id: int) -> Self:
        """Read a conversation; raises M1Error where there is none."""
        conversation = store.conversation(conversation_id)
        every = {message.id: message for message in store.messages(conversation_id)}
        # Both are of one moment: what another process adds between the queries is in neither.
        shown = tuple(one for one in store.path(conversation_id) if one.id in every)
        return cls(conversation, shown, tuple(every.values()), datetime.now(UTC))

    def numbered(self) -> Iterator[tuple[str, StoredMessage]]:
        """Each shown message after what it is called; an answer has its question's number."""
        number = 0
        for message in self.shown:
            if message.role == "user":
                number += 1
                yield tr("Question {number}", number=number), message
            else:
                yield tr("Answer {number}", number=number), message

    def facts(self) -> list[tuple[str, str]]:
        """Names and values about the whole."""
        facts = [
            (tr("Begun"), time_text(self.conversation.created)),
            (tr("Changed"), time_text(self.conversation.changed)),
            (tr("Exported"), time_text(self.exported)),
        ]
        left_out = len(self.every) - len(self.shown)
        if left_out:
            text = tr(
                "messages of other versions: {count}; an export as .json holds them", count=left_out
            )
            facts.append((tr("Left out"), text))
        return facts


def notice() -> str:
    """What stands above every transcript."""
    return tr(
        "This text was written by a language model. It is not medical advice; ask a doctor or a "
        "pharmacist before you act on it."
    )


def answer_facts(message: StoredMessage) -> list[tuple[str, str]]:
    """Names and values about how an answer was made, each one line."""
    values = dict(_flat(message.parameters))
    seed = values.pop("seed", "")
    parameters = ", ".join(f"{name} {value}" for name, value in values.items())
    unknown = tr("not recorded")
    return [
        (tr("Model"), one_line(message.model) or unknown),
        (tr("Checkpoint"), one_line(message.checkpoint) or unknown),
        (tr("Parameters"), one_line(parameters) or unknown),
        (tr("Seed"), seed or unknown),
        (tr("Ended"), ending(message)),
    ]


def ending(message: StoredMessage) -> str:
    """How an answer ended, in words."""
    known = {
        None: tr("UNFINISHED: it was interrupted, or is still being written"),
        "stop": tr("by itself"),
        "length": tr("CUT OFF: it reached the limit of tokens"),
        "context": tr("CUT OFF: the context was full"),
        "loop": tr("CUT OFF: it repeated itself"),
        "cancelled": tr("CUT OFF: it was stopped"),
    }
    return known.get(message.finish) or one_line(str(message.finish))


def time_text(time: datetime) -> str:
    """UTC in ISO 8601, to the second."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _flat(parameters: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Names and values as text, of parts within parts too; what is None was not set."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, float):
            yield name, f"{value:g}"
        elif isinstance(value, str):
            yield name, value
        elif value is not None:
            yield name, json.dumps(value, ensure_ascii=False)
