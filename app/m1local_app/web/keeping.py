"""The side panel's events: open, search, rename, delete, restore, export, purge.

What it is: between the panel and the store. What it is not: the store (history/), or the
conversation's own events (handlers.py).
"""

from collections.abc import Callable

import gradio as gr

from m1local.errors import M1Error
from m1local_app.export import rendered
from m1local_app.language import tr
from m1local_app.transcript import Transcript
from m1local_app.web import views
from m1local_app.web.handlers import Handlers, Shown
from m1local_app.web.tabs import SHOWN_TURNS, Progress, Tab

FORMATS = {"Markdown": ".md", "HTML": ".html", "JSON": ".json"}


class Keeping(Handlers):
    """The events of the side panel, and all others."""

    def new(self, current: str, request: gr.Request) -> Shown:
        """Begin a new conversation."""
        tab, back = self._calm(request, current)
        return self._anew(tab) | {self._parts.deleted: "", self._parts.box: ""} | back

    def open(self, current: str, request: gr.Request, clicked: gr.EventData) -> Shown:
        """Open the conversation that was clicked."""
        tab, back = self._calm(request, current)
        try:
            unanswered = tab.conversation.open(int(clicked.open))
        except M1Error as error:
            return self._refused(tab, back, error)
        tab.progress, tab.shown_turns = Progress(), SHOWN_TURNS
        return self._whole(tab) | self._system(tab) | (back or self._taken_back(unanswered))

    def search(self, wanted: str, current: str) -> Shown:
        """List the conversations in which all words are said; all where none is given."""
        store, here = self._desk.store, int(current) if current.isdecimal() else None
        if store is None or not (wanted or "").strip():
            known = [] if store is None else store.conversations(limit=views.LISTED)
            return {self._parts.list: views.conversations(known, here)}
        return {self._parts.list: views.hits(store.search(wanted), wanted, here)}

    def rename(self, title: str, current: str, request: gr.Request) -> Shown:
        """Give the open conversation a title."""
        tab = self._desk.tab(request.session_hash, current)
        try:
            tab.conversation.rename(title)
        except M1Error as error:
            return self._failed(tab, error)
        return self._list(tab)

    def delete(self, current: str, request: gr.Request) -> Shown:
        """Put the open conversation into the bin, and begin another."""
        tab, back = self._calm(request, current)
        store, identifier = self._desk.store, tab.conversation.id
        if store is None or identifier is None:
            return self._whole(tab) | back
        try:
            store.delete(identifier)
        except M1Error as error:
            return self._refused(tab, back, error)
        return self._anew(tab) | self._binned(identifier) | back

    def restore(self, current: str, request: gr.Request, clicked: gr.EventData) -> Shown:
        """Take a conversation out of the bin, and open it."""
        tab, back = self._calm(request, current)
        try:
            if self._desk.store is not None:
                self._desk.store.restore(int(clicked.restore))
                tab.conversation.open(int(clicked.restore))
        except M1Error as error:
            return self._refused(tab, back, error)
        return self._whole(tab) | self._system(tab) | self._binned(None) | back

    def purge(self, sure: bool, current: str, request: gr.Request) -> Shown:
        """Delete all conversations for good, once that was confirmed."""
        store = self._desk.store
        if store is None:
            return {}
        if not sure:
            tab = self._desk.tab(request.session_hash, current)
            return self._failed(tab, M1Error(tr("Tick the box above the button first.")))
        tab, back = self._calm(request, current)
        try:
            for one in store.conversations():
                store.delete(one.id)
            store.purge()
        except M1Error as error:
            return self._refused(tab, back, error)
        tab.files = []
        return self._anew(tab) | self._binned(None) | {self._parts.purge_sure: False}

    def exporter(self, name: str) -> Callable[..., Shown]:
        """An event's handler that makes a file of the open conversation, in the format `name`.

        It goes as a name and a text, which the browser saves: nothing is written here.
        """

        def export(current: str, request: gr.Request) -> Shown:
            tab = self._desk.tab(request.session_hash, current)
            try:
                return {self._parts.exported: self._file(tab, FORMATS[name])}
            except M1Error as error:
                return self._failed(tab, error) | {self._parts.exported: None}

        return export

    def _file(self, tab: Tab, suffix: str) -> dict[str, str]:
        store, identifier = self._desk.store, tab.conversation.id
        if store is None or identifier is None:
            raise M1Error(tr("There is nothing to export yet."))
        text = rendered(Transcript.of(store, identifier), suffix)
        return {"name": f"m1-{identifier}{suffix}", "text": text}

    def _list(self, tab: Tab) -> Shown:
        store = self._desk.store
        known = [] if store is None else store.conversations(limit=views.LISTED)
        return {
            self._parts.list: views.conversations(known, tab.conversation.id),
            self._parts.title: tab.conversation.title,
        }

    def _binned(self, identifier: int | None) -> Shown:
        return {self._parts.bin: self._bin(), self._parts.deleted: views.deleted(identifier)}
