"""What happens on the page: each method answers one event with what changes on it.

What it is: between Gradio's events and a tab's conversation; errors become the status line's text.
What it is not: the model's work (answers.py), or the look of anything (views.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from m1local.chat import Turn
from m1local.errors import ContextLengthError, M1Error
from m1local.generate import Event
from m1local.tokenizer import Message
from m1local_app import describe, notices
from m1local_app.language import tr
from m1local_app.red_flags import advice
from m1local_app.web import answers, attachments, views
from m1local_app.web.attachments import Attachment
from m1local_app.web.desk import Desk
from m1local_app.web.forms import Form, preset, role
from m1local_app.web.parts import Parts
from m1local_app.web.tabs import SHOWN_TURNS, Asked, OvertakenError, Progress, Tab

Shown = dict[Any, Any]  # a component, and what it shows from now on


class Handlers:
    """The events of one page."""

    def __init__(self, desk: Desk, parts: Parts) -> None:
        """Answer the events of `parts` with what `desk` has."""
        self._desk = desk
        self._parts = parts

    # the conversation

    def load(self, shown: str, request: gr.Request) -> Shown:
        """A tab was opened, or reloaded, at the address of conversation `shown`, perhaps none."""
        self._desk.tabs.drop(request.session_hash or "")
        tab = self._desk.tab(request.session_hash, shown or "")
        page = self._whole(tab) | {self._parts.bin: self._bin()} | self._notices()
        return self._form() | page | self._system(tab)

    def send(self, text: str, current: str, request: gr.Request, *form: Any) -> Iterator[Shown]:
        """Ask what is in the box, with the attached files."""
        tab = self._desk.tab(request.session_hash, current)
        if not attachments.joined(text or "", tab.files).strip():
            return
        asked = tab.ask(text or "")
        turns = [*tab.conversation.session.turns, _asked(asked.question)]
        yield from self._answer(
            tab, asked, form, turns, lambda: self._asked_of(tab, asked.question),
            {self._parts.box: asked.before},
        )  # fmt: skip

    def retry(self, current: str, request: gr.Request, *form: Any) -> Iterator[Shown]:
        """Answer the last question again."""
        tab, claim = self._desk.tab(request.session_hash, current), object()
        back = self._taken_back(tab.calm(claim))
        turns = list(tab.conversation.session.turns)
        while turns and turns[-1].message.role != "user":
            turns.pop()
        yield from self._answer(tab, claim, form, turns, lambda: tab.conversation.retry(), back)

    def edit(
        self, current: str, request: gr.Request, edited: gr.EditData, *form: Any
    ) -> Iterator[Shown]:
        """Ask another question in place of an earlier one."""
        tab = self._desk.tab(request.session_hash, current)
        at = edited.index if isinstance(edited.index, int) else edited.index[0]
        asked = Asked(views.typed(str(edited.value)), [], tab.first + at)
        back = self._taken_back(tab.calm(asked))
        turns = [*tab.conversation.session.turns[: asked.turns], _asked(asked.text)]
        yield from self._answer(
            tab, asked, form, turns, lambda: tab.conversation.edit(asked.turns, asked.text), back
        )

    def undo(self, current: str, request: gr.Request) -> Shown:
        """Take the last question back into the box."""
        tab, back = self._calm(request, current)
        try:
            text = back or {self._parts.box: tab.conversation.undo()}
        except M1Error as error:
            return self._refused(tab, back, error)
        return self._whole(tab) | text

    def flip(self, current: str, request: gr.Request, clicked: gr.EventData) -> Shown:
        """Show another version of a message, and what followed it."""
        tab, back = self._calm(request, current)
        try:
            unanswered = tab.conversation.flip(tab.first + int(clicked.index), int(clicked.step))
        except M1Error as error:
            return self._refused(tab, back, error)
        return self._whole(tab) | (back or self._taken_back(unanswered))

    def earlier(self, current: str, request: gr.Request) -> Shown:
        """Show more of a long conversation."""
        tab = self._desk.tab(request.session_hash, current)
        if tab.awaited:
            return {}
        tab.shown_turns += SHOWN_TURNS
        return self._whole(tab)

    def stop(self, request: gr.Request) -> None:
        """End the answer under way."""
        if (tab := self._desk.tabs.known(request.session_hash or "")) is not None:
            tab.stop()

    def leave(self, request: gr.Request) -> None:
        """Forget a tab that was closed."""
        self._desk.tabs.drop(request.session_hash or "")

    def chat(self, message: str, request: gr.Request) -> Iterator[str]:
        """Ask, and stream the answer so far: the interface for programs."""
        tab = self._desk.tab(request.session_hash)
        tab.conversation.session.settings = self._desk.settings
        try:
            yield from answers.follow(self._desk, tab, lambda: self._asked_of(tab, message))
        except M1Error as error:
            raise gr.Error(str(error), title="m1local", print_exception=False) from error

    # attached files

    def attach(self, upload: str | None, current: str, request: gr.Request) -> Shown:
        """Take a file's text into the next question, if it fits."""
        tab = self._desk.tab(request.session_hash, current)
        if upload is None:
            return {}
        tab.progress.error = ""
        try:
            name, text = attachments.read(Path(upload))
            tokens = len(self._desk.engine.tokenizer.encode(text))
            self._check_room(tab, name, tokens)
        except M1Error as error:
            return self._failed(tab, error) | {self._parts.attach: None}
        tab.files.append(Attachment(name, text, tokens))
        return {
            self._parts.chips: views.attached(tab.files),
            self._parts.status: self._status(tab),
            self._parts.attach: None,
        }

    def detach(self, request: gr.Request, clicked: gr.EventData) -> Shown:
        """Leave a file out of the next question."""
        tab = self._desk.tab(request.session_hash)
        index = int(clicked.detach)
        if 0 <= index < len(tab.files):
            del tab.files[index]
        return {self._parts.chips: views.attached(tab.files)}

    def _check_room(self, tab: Tab, name: str, tokens: int) -> None:
        capacity = self._desk.engine.contexts.capacity
        taken = tab.conversation.session.used_tokens + sum(file.tokens for file in tab.files)
        left = capacity * 3 // 4 - taken  # a quarter is for the answer
        if tokens > left:
            raise M1Error(
                tr(
                    "{name} has {tokens:,} tokens; {left:,} are left of the context, a quarter "
                    "being kept for the answer. Attach a part, begin a new conversation, or start "
                    "m1 with a larger --ctx-size.",
                    name=name,
                    tokens=tokens,
                    left=max(0, left),
                )
            )

    # settings and first visit

    def reset(self) -> Shown:
        """Go back to the model's own settings, and those of the command line."""
        self._desk.choose(self._desk.defaults())
        return self._form()

    def preset(self, name: str | None) -> Shown:
        """The system prompt of a preset; where none is meant, what is written stays."""
        text = preset(name or "")
        if text is None:
            return {}
        self.choose_system(text)
        return {self._parts.form[0]: text}

    def choose_system(self, text: str | None) -> Shown:
        """Begin conversations with this system prompt from now on; show which role it is."""
        text = (text or "").strip()
        self._desk.choose_system(text)
        return {self._parts.preset: role(text)}

    def choose(self, *form: Any) -> None:
        """Answer by these settings from now on; what cannot be is said when it is used.

        The system prompt beside them may be that of an old conversation: it is not meant.
        """
        with contextlib.suppress(M1Error):
            wanted = Form.read(form)
            wanted.settings(self._desk.settings)
            self._desk.choose_others(wanted)

    def accept(self) -> Shown:
        """Record that the notices were accepted, and show the page."""
        notices.accept(self._desk.checkpoint)
        return self._notices()

    # what all have in common

    def _answer(
        self,
        tab: Tab,
        claim: object,
        form: tuple[Any, ...],
        turns: list[Turn],
        start: Callable[[], Iterator[Event]],
        box: Shown,
    ) -> Iterator[Shown]:
        """Show `turns`, `box`, and the answer of `start`, if `claim` is still the latest then."""
        parts, asked = self._parts, turns[-1].message.content if turns else ""
        before = views.messages(turns[tab.frame(len(turns)) :])
        urgent = advice(asked)
        # Advice is not kept waiting for the first word of an answer.
        waiting = before if urgent is None else [*before, views.answer(asked, "")]

        def begin() -> Iterator[Event]:
            self._apply(tab, form)
            return start()

        try:
            yield {
                parts.chat: waiting, parts.chips: views.attached(tab.files),
                parts.send: gr.update(visible=False), parts.stop: gr.update(visible=True),
            } | box  # fmt: skip
            for text in answers.follow(self._desk, tab, begin, claim):
                if tab.silent:
                    return
                shown = [*before, views.answer(asked, text)] if text else waiting
                yield {parts.chat: shown, parts.status: self._status(tab)}
        except OvertakenError:
            if not tab.awaited:  # nothing else will show how it stands
                yield self._whole(tab)
            return
        except ContextLengthError:
            tab.progress.error = self._too_long()
        except M1Error as error:
            tab.progress.error = str(error)
        finally:
            tab.release(claim)
        if not tab.silent and claim is tab.latest:
            if urgent is not None and tab.progress.error:
                tab.progress.notices.append(urgent)
            yield self._unanswered(tab, claim)

    def _unanswered(self, tab: Tab, claim: object) -> Shown:
        """Everything, idle; the question of `claim` and its files come back if it has no answer."""
        if not isinstance(claim, Asked) or claim.is_answered(tab.conversation.session.turns):
            return self._whole(tab)
        tab.files = [*tab.files, *claim.files]
        return self._whole(tab) | {self._parts.box: claim.returned}

    def _asked_of(self, tab: Tab, text: str) -> Iterator[Event]:
        """The events of an answer to `text`, or of its continuation by a Base model."""
        if self._desk.engine.generation.is_chat:
            return tab.conversation.send(text)
        return answers.continued(tab, self._desk, text)

    def _apply(self, tab: Tab, form: tuple[Any, ...]) -> None:
        """Answer as the settings form says; raises M1Error for a wrong value."""
        wanted = Form.read(form)
        session = tab.conversation.session
        session.settings = wanted.settings(self._desk.settings)
        session.overflow = wanted.policy
        if wanted.system != session.system:
            tab.conversation.set_system(wanted.system)

    def _too_long(self) -> str:
        return tr(
            "This does not fit into the context of {capacity:,} tokens. Shorten it, or begin a new "
            "conversation; `m1 ui --ctx-size` allows more.",
            capacity=self._desk.engine.contexts.capacity,
        )

    def _calm(self, request: gr.Request, current: str) -> tuple[Tab, Shown]:
        """The tab, its answer stopped if one was under way, and the last error forgotten.

        And what shows the question that was under way again if it had no answer yet.
        """
        tab = self._desk.tab(request.session_hash, current)
        text = tab.calm()
        tab.progress.error = ""
        return tab, self._taken_back(text)

    def _taken_back(self, question: str) -> Shown:
        """The box with a question that has no answer; as it is where there is none."""
        return {self._parts.box: question} if question else {}

    def _whole(self, tab: Tab) -> Shown:
        """Everything about the conversation; idle, unless something was asked meanwhile."""
        parts, conversation, idle = self._parts, tab.conversation, not tab.awaited
        tab.progress.used = conversation.session.used_tokens
        first = tab.frame(len(conversation.session.turns))
        versions = {at - first: one for at, one in conversation.versions().items() if at >= first}
        store, current = self._desk.store, conversation.id
        known = [] if store is None else store.conversations(limit=views.LISTED)
        return {
            parts.chat: views.messages(conversation.session.turns[first:]),
            parts.status: self._status(tab),
            parts.versions: views.versions(versions),
            parts.earlier: gr.update(visible=first > 0),
            parts.current: "" if current is None else str(current),
            parts.list: views.conversations(known, current),
            parts.title: conversation.title,
            parts.chips: views.attached(tab.files),
            parts.send: gr.update(visible=idle),
            parts.stop: gr.update(visible=not idle),
        } | self._bar()

    def _bar(self) -> Shown:
        """The model's name at the top, which another tab may have changed."""
        return {self._parts.bar: views.bar(self._desk.label)}

    def _anew(self, tab: Tab) -> Shown:
        """Begin another conversation in `tab`, with the system prompt that was chosen last."""
        tab.conversation.clear()
        tab.conversation.session.system = self._desk.form.system
        tab.progress, tab.shown_turns = Progress(), SHOWN_TURNS
        return self._whole(tab) | self._system(tab)

    def _system(self, tab: Tab) -> Shown:
        """The system prompt of the open conversation, in the form."""
        system = tab.conversation.session.system
        return {self._parts.form[0]: system, self._parts.preset: role(system)}

    def _form(self) -> Shown:
        """The settings as chosen last."""
        form = self._desk.form
        shown = dict(zip(self._parts.form, form.values, strict=True))
        return shown | {self._parts.preset: role(form.system)}

    def _notices(self) -> Shown:
        """The page, or what must be accepted before it is shown."""
        parts, accepted = self._parts, self._desk.accepted
        return {
            parts.notices: views.welcome(self._desk.label, self._licence()),
            parts.welcome: gr.update(visible=not accepted),
            parts.shell: gr.update(visible=accepted),
        }

    def _licence(self) -> str:
        try:
            return describe.licence(self._desk.folder)
        except OSError:
            return ""

    def _bin(self) -> str:
        store = self._desk.store
        return views.binned([] if store is None else store.conversations(binned=True))

    def _status(self, tab: Tab) -> str:
        return views.status(tab, capacity=self._desk.engine.contexts.capacity)

    def _refused(self, tab: Tab, back: Shown, error: M1Error) -> Shown:
        """All as it stands, for an answer may have been stopped, and why no more was done."""
        return self._whole(tab) | back | self._failed(tab, error)

    def _failed(self, tab: Tab, error: M1Error) -> Shown:
        tab.progress.error = str(error)
        return {self._parts.status: self._status(tab)}


def _asked(text: str) -> Turn:
    return Turn(Message("user", text))
