"""The tabs of browsers that talk to this server, each with a conversation of its own.

What it is: what a tab is doing, by the session's name that Gradio gives it. What it is not: the
conversation itself, or Gradio's state, which would copy it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from m1local.chat import Turn
from m1local.errors import M1Error
from m1local_app.conversation import Conversation
from m1local_app.language import tr
from m1local_app.web.attachments import Attachment, joined

MOST_TABS = 64
SHOWN_TURNS = 40  # the page draws all that it shows at every update of an answer
INTERRUPT_SECONDS = 30


@dataclass(slots=True)
class Progress:
    """How far an answer is; what the status line says."""

    waiting: int = 0
    reading: tuple[int, int] | None = None
    first_seconds: float | None = None
    tokens: int = 0
    tokens_per_second: float = 0.0
    used: int | None = None
    notices: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A question as it was typed, with its files, after so many turns.

    `before` is the text of those before it that came back into the box without an answer.
    """

    text: str
    files: list[Attachment]
    turns: int
    before: str = ""

    @property
    def question(self) -> str:
        """What the model is asked."""
        return joined(self.text, self.files)

    @property
    def returned(self) -> str:
        """What the box holds once this one comes back, too."""
        return "\n".join(part for part in (self.before, self.text) if part)

    def is_answered(self, turns: Sequence[Turn]) -> bool:
        """Whether `turns` end with its answer; others may have been taken over before it."""
        return len(turns) > self.turns and turns[-2].message.content == self.question


class OvertakenError(Exception):
    """Something else was asked or done in the tab before the answer began; no one is told."""


class Tab:
    """One tab: its conversation, the files attached to the next question, the answer under way."""

    def __init__(self, conversation: Conversation) -> None:
        """Begin with `conversation`, idle."""
        self.conversation = conversation
        self.files: list[Attachment] = []
        self.latest: object = None  # what was asked last, or else a mark of what was pressed
        self.progress = Progress()
        self.shown_turns = SHOWN_TURNS
        self.first = 0  # the turn that the page shows first
        self.cancelled = threading.Event()  # the quantizing under way is to end
        self._stopping = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._waiting = False  # whether what was asked last has not begun yet
        self._stopped: object = None  # a claim for which Stop was pressed before its answer began
        self.silent = False  # what the answer under way would still show is of no interest

    def frame(self, turns: int) -> int:
        """Which of so many turns is shown first: a question, with the last ones after it."""
        self.first = max(0, turns - self.shown_turns) // 2 * 2
        return self.first

    @property
    def stopping(self) -> bool:
        """Whether the answer under way is to end."""
        return self._stopping.is_set()

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""
        return not self._idle.is_set()

    @property
    def awaited(self) -> bool:
        """Whether an answer is under way or about to begin."""
        return self.busy or self._waiting

    def begin(self, claim: object = None) -> Progress:
        """Begin an answer; one that is under way is stopped first.

        Raises OvertakenError where `claim`, what `ask` gave or `calm` was given, is not the latest.
        """
        with self._lock:
            if claim is not None and claim is not self.latest:
                raise OvertakenError
            self.interrupt()
            self._idle.clear()
            self._waiting = False
            self._stopping.clear()
            if claim is not None and claim is self._stopped:
                self._stopping.set()
            self.silent = False
            self.progress = Progress()
        return self.progress

    def end(self) -> None:
        """Note that the answer has ended."""
        self._idle.set()

    def release(self, claim: object) -> None:
        """Note that the answer of `claim` will not begin any more, if it has not."""
        with self._lock:
            self._waiting = self._waiting and claim is not self.latest

    def stop(self) -> None:
        """Let the answer under way, or about to begin, end before its next token."""
        if self._waiting:
            self._stopped = self.latest
        self._stopping.set()

    def interrupt(self) -> None:
        """Stop the answer under way, if any, and wait until it has ended; it shows nothing more."""
        if self._idle.is_set():
            return
        self.silent = True
        self._stopping.set()
        if not self._idle.wait(INTERRUPT_SECONDS):
            self.silent = False  # it still says how far it came
            raise M1Error(tr("The answer before is still being ended; try again in a moment."))

    def ask(self, text: str) -> Asked:
        """Interrupt, and take `text` and the files as the next question.

        The question under way is `before` it if that had no answer yet; its files come back.
        Where it was this very one, because a key was held too long, it is asked once.
        """
        with self._lock:
            before = self._taken_back()
            again = "" if before is None else before.returned
            if before is not None and before.text == text:
                again = before.before
                files, self.files = [*before.files, *self.files], []
            else:
                files, self.files = self.files, [] if before is None else before.files
            asked = Asked(text, files, len(self.conversation.session.turns), again)
            self.latest, self._waiting = asked, True
            return asked

    def calm(self, following: object = None) -> str:
        """Interrupt, and let nothing begin that was asked before; `following`, if given, may.

        Returns the text of the question under way if that had no answer yet; its files come back.
        """
        with self._lock:
            before = self._taken_back()
            if before is not None:
                self.files = [*before.files, *self.files]
            self.latest, self._waiting = following or object(), following is not None
            return "" if before is None else before.returned

    def _taken_back(self) -> Asked | None:
        """Interrupt; returns the question under way if it was taken back without an answer."""
        asked = self.latest if self.awaited else None
        self.interrupt()
        if not isinstance(asked, Asked) or asked.is_answered(self.conversation.session.turns):
            return None
        return asked


class Tabs:
    """All tabs by session; the one unused longest is forgotten when there are too many."""

    def __init__(self, make: Callable[[], Tab]) -> None:
        """Make a new tab by `make`."""
        self._make = make
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str) -> tuple[Tab, bool]:
        """The tab of `session`, and whether it is new here."""
        with self._lock:
            tab = self._tabs.pop(session, None)
            new = tab is None
            tab = tab or self._make()
            self._tabs[session] = tab
            forgotten = [
                name for name, each in self._tabs.items() if not each.awaited and each is not tab
            ][: max(0, len(self._tabs) - MOST_TABS)]
            for name in forgotten:
                del self._tabs[name]
        return tab, new

    def known(self, session: str) -> Tab | None:
        """The tab of `session`, if there is one."""
        with self._lock:
            return self._tabs.get(session)

    def drop(self, session: str) -> None:
        """Forget a tab that was closed, and stop its answer."""
        with self._lock:
            tab = self._tabs.pop(session, None)
        if tab is not None:
            tab.stop()
            tab.cancelled.set()

    def all(self) -> list[Tab]:
        """All that are known at the moment."""
        with self._lock:
            return list(self._tabs.values())
