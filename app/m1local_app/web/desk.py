"""What all tabs of the page share: the model, the line before it, and the history.

What it is: the one place that makes conversations and changes the model. What it is not: anything
that Gradio knows about.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from m1local.chat import ChatSession
from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.generate import GenerationSettings
from m1local.kv_store import FLOAT
from m1local.placement import GpuLayers
from m1local_app.conversation import Conversation
from m1local_app.conversing import checkpoint_id
from m1local_app.history import History
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
    turnstile: Turnstile = field(default_factory=Turnstile)
    tabs: Tabs = field(init=False)
    form: Form = field(init=False)  # as last sent; a reloaded page begins with it

    def __post_init__(self) -> None:
        """Begin with no tab."""
        self.tabs = Tabs(lambda: Tab(self.conversation()))
        self.form = self.defaults()

    def defaults(self) -> Form:
        """The settings the page was started with: the model's, and the command line's."""
        return Form.of(self.settings, system=self.system, overflow=self.overflow)

    def conversation(self) -> Conversation:
        """An empty conversation with the present model."""
        session = ChatSession(self.engine, system=self.system, settings=self.settings)
        return Conversation(
            session, self.store, label=self.label, checkpoint=checkpoint_id(self.folder)
        )

    def tab(self, session: str | None, shown: str = "") -> Tab:
        """The tab of `session`; one that this server does not know opens what it shows."""
        tab, new = self.tabs.of(session or "")
        if not new and tab.conversation.session.engine is not self.engine:
            shown = str(tab.conversation.id or "")
            tab.conversation, new = self.conversation(), True
        if new and shown.isdecimal() and self.store is not None:
            try:
                tab.conversation.open(int(shown))
            except M1Error as error:  # deleted meanwhile: begin anew, and say so
                tab.progress.error = str(error)
        return tab

    def change_model(self, folder: Path, label: str) -> None:
        """Talk to another checkpoint from now on; to be called when it is one's turn."""
        engine = Engine.load(
            folder,
            context_tokens=self.context_tokens,
            gpu_layers=self.gpu_layers,
            kv_type=self.kv_type,
        )
        changed = engine.defaults
        kept = self.settings
        self.engine, self.folder, self.label = engine, folder, label
        self.settings = replace(changed, loop_guard=kept.loop_guard, lookup=kept.lookup)
        self.form = self.defaults()
