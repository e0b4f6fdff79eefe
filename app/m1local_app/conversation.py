"""A conversation that is kept: a chat session, and the store that follows it.

What it is: what both front ends talk to. Every question and answer is written as it comes, so that
a kill in the middle of an answer loses half a second of it; going back never deletes anything, an
older version stays in the store. Where another program has gone on with it, what was said there
comes first, and that is said. Without a store nothing is kept, and all else is the same; where
the store fails, that is said once and the conversation goes on. What it is not: the store itself
(history/) or the session that makes the answers (m1local.chat).
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from m1local.chat import ChatSession, Turn
from m1local.errors import M1Error
from m1local.generate import Event, GenerationSettings, TextDelta
from m1local.tokenizer import Message
from m1local_app.language import tr

if TYPE_CHECKING:
    from m1local_app.history import History, StoredMessage

SAVE_SECONDS = 0.5
CANCELLED = "cancelled"
SILENT = timedelta(minutes=1)  # an answer without a change for so long is that of a dead program


class Conversation:
    """One conversation with one model, kept in a store unless there is none."""

    def __init__(
        self, session: ChatSession, store: "History | None", *, label: str, checkpoint: str
    ) -> None:
        """Begin an empty one; answers are kept as made by model `label`, manifest `checkpoint`."""
        self.session = session
        self.store = store
        self.id: int | None = None  # in the store, once something was said
        self._label = label
        self._checkpoint = checkpoint
        self._title = ""
        self._ids: list[int] = []  # in the store, of each turn of the session
        self._failed = False  # whether the store could not follow, and is left alone since
        self._trouble = self._news = ""
        self._unanswered: int | None = None  # the question at its end when it was opened
        self._unfinished = False  # whether its last answer may still have been coming then
        self._session = ""  # the name by which other programs may know it before it is stored

    @property
    def title(self) -> str:
        """The title, perhaps empty."""
        if self._kept_in is not None and self.id is not None:
            with contextlib.suppress(M1Error):  # it was deleted elsewhere meanwhile
                self._title = self._kept_in.conversation(self.id).title
        return self._title

    @property
    def _kept_in(self) -> "History | None":
        """The store, while it follows."""
        return None if self._failed else self.store

    def trouble(self) -> str:
        """Why the conversation is no longer kept, once; usually nothing."""
        trouble, self._trouble = self._trouble, ""
        return trouble

    def news(self) -> str:
        """That another program went on with it before the last answer, once; usually nothing."""
        news, self._news = self._news, ""
        return news

    def send(self, text: str) -> Iterator[Event]:
        """Ask; see ChatSession.send. Follows what another program has added meanwhile.

        Raises M1Error while that is still being answered.
        """
        from m1local_app.history import ContinuedError  # sqlite3, which nobody needs without it

        while True:
            if self._catch_up():
                self._news = tr(
                    "This conversation went on elsewhere; the answer follows what was said there."
                )
            events = self.session.send(text)
            try:  # before anything was passed on
                yield from self._kept(events, keep=len(self._ids), question=text)
            except ContinuedError:
                continue
            return

    def retry(self) -> Iterator[Event]:
        """Answer the last question again; the old answer stays in the store."""
        self._check_current()
        events, at = self.session.retry(), self._last_question()
        return self._kept(events, keep=at + 1, question=None)

    def edit(self, index: int, text: str) -> Iterator[Event]:
        """Ask `text` in place of turn `index`; what followed stays in the store."""

        def edited() -> Iterator[Event]:
            self._check_current()
            yield from self.session.edit(index, text)

        return self._kept(edited(), keep=index, question=text)

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question."""
        self._check_current()
        text = self.session.undo()
        with self._following() as store:
            if store is not None and self.id is not None:
                self._ids = self._ids[: len(self.session.turns)]
                store.set_head(self.id, self._ids[-1] if self._ids else None)
        return text

    def clear(self) -> None:
        """Begin a new conversation with the same model and settings."""
        self.session.clear()
        self.id, self._title, self._ids, self._failed = None, "", [], False
        self._unanswered, self._session, self._news = None, "", ""
        self._unfinished = False

    def set_system(self, text: str) -> None:
        """Change the system prompt, from the next answer on."""
        self.session.system = text
        with self._following() as store:
            if store is not None and self.id is not None:
                store.set_system(self.id, text)

    def rename(self, title: str) -> None:
        """Give it a title."""
        self._title = title
        with self._following() as store:
            if store is not None and self.id is not None:
                store.rename(self.id, title)

    def begin_as(self, title: str) -> None:
        """Give it a title, or go on with one of that title if another program begins it first."""
        self.rename(title)
        self._session = title

    def open(self, conversation_id: int) -> str:
        """Go on with a stored conversation; returns its last question if it has no answer.

        Raises M1Error without a store.
        """
        if self.store is None:
            raise M1Error(tr("Nothing is kept here: this was started with --no-history."))
        found = self.store.conversation(conversation_id)
        unanswered = self._take(self.store.path(conversation_id))
        self.session.system = found.system
        self.id, self._title, self._failed = found.id, found.title, False
        self._news = ""
        return unanswered

    def _take(self, messages: "list[StoredMessage]") -> str:
        """Go on after `messages`; returns the last if it is a question, which is left out."""
        self._unanswered, unanswered = None, ""
        self._unfinished = bool(messages) and messages[-1].finish is None
        if messages and messages[-1].role == "user":  # the program ended before the first word
            *messages, question = messages
            self._unanswered, unanswered = question.id, question.content
        self.session.restore([_turn(message, self._checkpoint) for message in messages])
        self._ids = [message.id for message in messages]
        return unanswered

    def _catch_up(self) -> bool:
        """Take over what another program has added to the end; returns whether it did.

        Raises M1Error while that is being answered. Where the other went back and another way,
        both ways stay as versions.
        """
        path: list[StoredMessage] = []
        with self._following() as store:
            if store is not None and self.id is None and self._session:
                found = [each for each in store.conversations() if each.title == self._session]
                self.id = found[0].id if found else None
            if store is None or self.id is None:
                return False
            path = store.path(self.id)
        shown = [message.id for message in path]
        last = self._ids[-1] if self._ids else None
        if last is not None and last not in shown:
            return False
        after = shown if last is None else shown[shown.index(last) + 1 :]
        if after in ([], [self._unanswered]):
            if self._unfinished and path:  # its answer may have gone on since
                self._take(path)
            return False
        changed, system = path[-1].created, self.session.system
        with contextlib.suppress(M1Error):  # it is in the bin
            known = store.conversation(self.id)
            changed, system = known.changed, known.system
        if path[-1].finish is None and datetime.now(UTC) - changed < SILENT:
            raise M1Error(
                tr(
                    "Another m1 is being answered in this conversation; ask again when that has "
                    "ended, or begin a new one."
                )
            )
        self.session.system = system
        self._take(path)
        return True

    def _check_current(self) -> None:
        """Raise M1Error where another program has added something, which is there from now on."""
        if self._catch_up():
            raise M1Error(
                tr(
                    "This conversation went on elsewhere, and stands here as it does there now. "
                    "Nothing was changed; do that again if you still mean it."
                )
            )

    def versions(self) -> dict[int, tuple[int, int]]:
        """By turn: which version is shown, from 1, and of how many; only where there are more."""
        if self.store is None or self.id is None:
            return {}
        beside: dict[int | None, list[int]] = {}
        for message in self.store.messages(self.id):
            beside.setdefault(message.parent, []).append(message.id)
        shown: dict[int, tuple[int, int]] = {}
        for index, parent in enumerate([None, *self._ids[:-1]] if self._ids else []):
            ids = beside.get(parent, [])
            if len(ids) > 1 and self._ids[index] in ids:
                shown[index] = (ids.index(self._ids[index]) + 1, len(ids))
        return shown

    def flip(self, index: int, step: int) -> str:
        """Show the version `step` further in place of turn `index`, and what followed that one.

        At either end nothing happens. Returns the last question if it has no answer.
        """
        if self.store is None or self.id is None or not 0 <= index < len(self._ids):
            return ""
        ids = [message.id for message in self.store.versions(self._ids[index])]
        wanted = ids.index(self._ids[index]) + step
        if not 0 <= wanted < len(ids):
            return ""
        self.store.show_version(ids[wanted])
        return self.open(self.id)

    def _last_question(self) -> int:
        roles = [turn.message.role for turn in self.session.turns]
        return len(roles) - 1 - roles[::-1].index("user")

    @contextmanager
    def _following(self) -> Iterator["History | None"]:
        """The store to write to; where that fails, it is left alone until another conversation."""
        try:
            yield self._kept_in
        except M1Error as error:
            self._failed = True
            self._trouble = tr("This conversation is not kept any more: {reason}", reason=error)

    def _kept(self, events: Iterator[Event], *, keep: int, question: str | None) -> Iterator[Event]:
        """`events`, each written before it is passed on; the answer follows turn `keep`.

        `question` is written first, unless it is None: then it is there already.
        """
        record: _Record | None = None
        try:
            for event in events:
                with self._following() as store:
                    if store is not None:
                        record = record or self._begin(store, keep, question)
                        record.follow(event)
                yield event
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
            with self._following() as store:
                if store is not None and record is not None and record.end():
                    self._ids, self._unfinished = record.ids, False

    def _begin(self, store: "History", keep: int, question: str | None) -> "_Record":
        if self.id is None:
            self.id = store.begin(system=self.session.system, title=self._title)
        ids = self._ids[:keep]
        if question is not None:
            parent = ids[-1] if ids else None
            beside = self._unanswered
            last = len(ids) == len(self._ids)  # no edit, which is to make another version
            ids.append(
                store.add(self.id, "user", question, parent=parent, last=last, beside=beside)
            )
        reply = self.session.answering
        assert reply is not None, "an answer without a turn"
        record = _Record(store, self.id, ids, reply, (self._label, self._checkpoint))
        record.system = self.session.system
        if question is not None:
            record.shown_before = [self._ids[-1] if self._ids else None]
        return record


class _Record:
    """A question that is stored, and its answer, written down while it comes."""

    def __init__(
        self,
        store: "History",
        conversation_id: int,
        ids: list[int],
        reply: Turn,
        made_by: tuple[str, str],
    ) -> None:
        self.ids = ids  # of the path, the question last, later the answer
        self.system = ""
        # The message shown before the question, or None; empty where the question is an old one.
        self.shown_before: list[int | None] = []
        self._store = store
        self._conversation_id = conversation_id
        self._reply = reply
        self._model, self._checkpoint = made_by
        self._answer: int | None = None
        self._text = ""
        self._saved_at = time.monotonic()

    def follow(self, event: Event) -> None:
        """Write what `event` adds, at most every `SAVE_SECONDS`."""
        if not isinstance(event, TextDelta):
            if time.monotonic() - self._saved_at >= SAVE_SECONDS:  # a long prompt is read
                self._store.touch(self._conversation_id)
                self._saved_at = time.monotonic()
            return
        self._text += event.text
        if self._answer is None:
            settings = self._reply.settings
            self._answer = self._store.add(
                self._conversation_id,
                "assistant",
                self._text,
                parent=self.ids[-1],
                parameters={"system": self.system} | (parameters(settings) if settings else {}),
                model=self._model,
                checkpoint=self._checkpoint,
            )
            self.ids.append(self._answer)
        elif time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._store.update(self._answer, content=self._text, token_ids=(), finish=None)
            self._saved_at = time.monotonic()

    def end(self) -> bool:
        """Write the whole answer; without one take the question back. Returns if there is one."""
        if self._answer is None:
            if self.shown_before:
                self._store.discard(self.ids[-1], head=self.shown_before[0])
            return False
        finish = self._reply.finish
        self._store.update(
            self._answer,
            content=self._reply.message.content,
            token_ids=self._reply.token_ids,
            finish=CANCELLED if finish is None else finish.reason.value,
        )
        return True


def parameters(settings: GenerationSettings) -> dict[str, object]:
    """What made an answer, by llama.cpp's names' spelling in Python; values that JSON knows."""
    flat = asdict(settings)
    sampling: dict[str, object] = flat.pop("sampling")
    return sampling | {name: value for name, value in flat.items() if name != "stop_token_ids"}


def _turn(message: "StoredMessage", checkpoint: str) -> Turn:
    """A stored message for the session; tokens of another checkpoint mean something else."""
    own = message.checkpoint == checkpoint and bool(checkpoint)
    return Turn(Message(message.role, message.content), list(message.token_ids) if own else [])
