"""What all tabs of the page share: the model, the line before it, and the history.

What it is: the one place that makes conversations and changes the model. What it is not: anything
that Gradio knows about.
"""

import contextlib
import gc
import threading
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

from m1local.chat import ChatSession, Turn
from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.generate import GenerationSettings
from m1local.kv_store import FLOAT
from m1local.placement import GpuLayers
from m1local_app import library, notices
from m1local_app.conversation import Conversation
from m1local_app.conversing import checkpoint_id
from m1local_app.history import History
from m1local_app.language import tr
from m1local_app.web import remembered
from m1local_app.web.forms import Form
from m1local_app.web.tabs import Tab, Tabs
from m1local_app.web.turnstile import Turnstile


@dataclass(slots=True)
class Desk:
    """One loaded model and everybody who talks to it; `store` None: nothing is kept."""

    engine: Engine
    folder: Path
    label: str
    settings: GenerationSettings  # what "reset" goes back to, and new tabs begin with
    store: History | None
    system: str = ""
    overflow: str = "stop"
    context_tokens: int | None = None
    gpu_layers: GpuLayers = 0
    kv_type: str = FLOAT
    given: frozenset[str] = frozenset()  # settings that the command line gave
    turnstile: Turnstile = field(default_factory=Turnstile)
    tabs: Tabs = field(init=False)
    _choosing: threading.Lock = field(default_factory=threading.Lock)
    form: Form = field(init=False)  # as last chosen; a reloaded page begins with it

    def __post_init__(self) -> None:
        """Begin with no tab."""
        self._adopt()
        self.form = self._recalled()
        self.tabs = Tabs(lambda: Tab(self.conversation()))

    @property
    def checkpoint(self) -> str:
        """By what is kept what was accepted and chosen for the present model."""
        return library.identity(self.folder)

    def _adopt(self) -> None:
        """Take over what an earlier m1local kept by the label, which two checkpoints may share."""
        notices.adopt(self.label, self.checkpoint)
        if self.store is not None:
            remembered.adopt(self.label, self.checkpoint)

    def _recalled(self) -> Form:
        """What was chosen last for this checkpoint, unless the command line says otherwise."""
        usual = self.defaults()
        if self.store is None:
            return usual
        before = remembered.recall(self.checkpoint, usual, self.settings)
        return replace(before, **{name: getattr(usual, name) for name in self.given})

    def defaults(self) -> Form:
        """The settings the page was started with: the model's, and the command line's."""
        return Form.of(self.settings, system=self.system, overflow=self.overflow)

    def choose(self, form: Form) -> None:
        """Let pages begin with `form` from now on, after a restart too if anything is kept."""
        with self._choosing:
            self._choose(form)

    def choose_system(self, text: str) -> None:
        """The same of the system prompt alone."""
        with self._choosing:
            self._choose(replace(self.form, system=text))

    def choose_others(self, form: Form) -> None:
        """The same of all but the system prompt."""
        with self._choosing:
            self._choose(replace(form, system=self.form.system))

    def _choose(self, form: Form) -> None:
        self.form = form
        if self.store is not None:
            remembered.remember(self.checkpoint, form, self.defaults(), given=self.given)

    @property
    def accepted(self) -> bool:
        """Whether licence and medical notice were accepted for the present model."""
        return notices.is_accepted(self.checkpoint)

    def check_accepted(self) -> None:
        """Raise M1Error where they were not: nobody is answered before."""
        if not self.accepted:
            raise M1Error(
                tr(
                    "Licence and medical notice of {label} are not accepted yet: open this page "
                    "in a browser, or load it again, and accept them.",
                    label=self.label,
                )
            )

    def conversation(self) -> Conversation:
        """An empty conversation with the present model."""
        session = ChatSession(self.engine, system=self.form.system, settings=self.settings)
        return Conversation(
            session, self.store, label=self.label, checkpoint=checkpoint_id(self.folder)
        )

    def tab(self, session: str | None, shown: str = "") -> Tab:
        """The tab of `session`; one that this server does not know opens what it shows."""
        tab, new = self.tabs.of(session or "")
        if new and shown.isdecimal() and self.store is not None:
            try:
                tab.conversation.open(int(shown))
            except M1Error as error:  # deleted meanwhile: begin anew, and say so
                tab.progress.error = str(error)
        return tab

    def change_model(self, folder: Path, label: str) -> None:
        """Talk to another checkpoint from now on; to be called when it is one's turn.

        A card seldom has room for two: there the present one makes room first, and comes back if
        the other cannot be loaded.
        """
        room_made = self.engine.on_card
        if room_made:
            self.engine.release()
        try:
            engine = self._loaded(folder)
        except Exception as error:  # whatever it was, what was there comes back
            if room_made:
                _forget_frames(error)
                self.engine = self._loaded(self.folder)
                self._renew_tabs()
            raise
        changed = engine.defaults
        kept = self.settings
        self.engine, self.folder, self.label = engine, folder, label
        self.settings = replace(changed, loop_guard=kept.loop_guard, lookup=kept.lookup)
        self.given = frozenset()
        self._adopt()
        self.form = self._recalled()
        self._renew_tabs()

    def _loaded(self, folder: Path) -> Engine:
        return Engine.load(
            folder,
            context_tokens=self.context_tokens,
            gpu_layers=self.gpu_layers,
            kv_type=self.kv_type,
        )

    def _renew_tabs(self) -> None:
        for tab in self.tabs.all():
            tab.conversation = self._renewed(tab.conversation)

    def _renewed(self, before: Conversation) -> Conversation:
        """The same conversation with the present model, which reads its words anew."""
        again = self.conversation()
        if before.id is not None:
            with contextlib.suppress(M1Error):  # deleted meanwhile; it begins anew
                again.open(before.id)
        else:  # kept nowhere
            again.session.restore([Turn(turn.message) for turn in before.session.turns])
        return again


def _forget_frames(error: BaseException | None) -> None:
    """Drop what the functions of an error and of its causes held, as half of a model on a card."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
