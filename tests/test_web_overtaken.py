"""What is pressed in the moment between a question and its answer, without a browser.

The handlers' steps are taken one by one here, in the order in which they might meet.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.generate import TextDelta
from m1local_app.history import History
from tests.conftest import write_checkpoint
from tests.web_page import MARKS, Request, accept

pytestmark = MARKS


class Pressed:
    """The handlers of a page with one answered question, and what its box and buttons show."""

    def __init__(self, handlers: Any) -> None:
        self.handlers = handlers
        self.parts = handlers._parts
        self.tab = handlers._desk.tab("one")
        self.form = handlers._desk.form.values
        self.shown: dict[Any, Any] = {}

    def take(self, step: dict[Any, Any]) -> None:
        self.shown |= step

    def finish(self, steps: Iterator[Any]) -> None:
        for step in steps:
            self.take(step)

    def sent(self, text: str, *, steps: int) -> Iterator[Any]:
        """`text` was sent, and the page got so many of its updates yet."""
        made = self.handlers.send(text, "", Request(), *self.form)
        for _ in range(steps):
            self.take(next(made))
        return iter(made)

    @property
    def box(self) -> str:
        return str(self.shown[self.parts.box])

    @property
    def questions(self) -> list[str]:
        messages = self.tab.conversation.session.messages
        return [message.content for message in messages if message.role == "user"]

    @property
    def is_idle(self) -> bool:
        stop, send = self.shown[self.parts.stop], self.shown[self.parts.send]
        return send["visible"] is True and stop["visible"] is False


@pytest.fixture
def pressed(m1_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pressed]:
    gradio = pytest.importorskip("gradio", reason="the page needs gradio")
    from m1local_app import notices
    from m1local_app.web import parts as layout
    from m1local_app.web.desk import Desk
    from m1local_app.web.models import Models

    accept(m1_home, monkeypatch)
    write_checkpoint(tmp_path / "tiny")
    engine = Engine.load(tmp_path / "tiny")
    with History.open() as store:
        settings = engine.settings(temperature=0.0, max_new_tokens=4)
        desk = Desk(engine, tmp_path / "tiny", "tiny", settings, store)
        notices.accept(desk.checkpoint)
        with gradio.Blocks(analytics_enabled=False):
            parts = layout.build(desk)
        page = Pressed(Models(desk, parts))
        page.finish(page.sent("first", steps=0))
        assert page.questions == ["first"]
        yield page


def test_a_retry_brings_a_question_that_has_not_begun_back(pressed: Pressed) -> None:
    from m1local_app.web.attachments import Attachment

    pressed.tab.files = [Attachment("a", "text", 1)]
    second = pressed.sent("second", steps=1)
    retried = pressed.handlers.retry("", Request(), *pressed.form)
    for _ in range(2):
        pressed.take(next(retried))
    pressed.finish(second)  # it finds that it came too late
    pressed.finish(retried)
    assert pressed.box == "second"
    assert [file.name for file in pressed.tab.files] == ["a"]
    assert pressed.questions == ["first"]
    assert pressed.tab.conversation.versions() == {1: (2, 2)}
    assert pressed.is_idle


def test_an_edit_does_too(pressed: Pressed) -> None:
    second = pressed.sent("second", steps=1)
    edited = SimpleNamespace(index=0, value="other")
    pressed.finish(pressed.handlers.edit("", Request(), edited, *pressed.form))
    pressed.finish(second)
    assert pressed.box == "second"
    assert pressed.questions == ["other"]
    assert pressed.is_idle


def test_a_question_after_a_retry_that_has_not_begun_is_answered(pressed: Pressed) -> None:
    retried = pressed.handlers.retry("", Request(), *pressed.form)
    pressed.take(next(retried))
    second = pressed.sent("second", steps=1)
    pressed.finish(retried)
    pressed.finish(second)
    assert pressed.questions == ["first", "second"]
    assert pressed.tab.conversation.versions() == {}
    assert pressed.is_idle


def press(name: str, *given: Any) -> Callable[[Pressed], dict[Any, Any]]:
    def pressing(page: Pressed) -> dict[Any, Any]:
        shown: dict[Any, Any] = getattr(page.handlers, name)(*given[:-1], Request(), *given[-1])
        return shown

    return pressing


@pytest.mark.parametrize(
    ("button", "left"),
    [
        (press("undo", "", []), ["first"]),  # the last question is the one under way
        (press("flip", "", [SimpleNamespace(index=1, step=1)]), ["first"]),
        (press("new", "", []), []),
        (press("open", "", [SimpleNamespace(open=1)]), ["first"]),
        (press("open", "", [SimpleNamespace(open=99)]), ["first"]),  # there is none
    ],
    ids=["undo", "flip", "new", "open", "open in vain"],
)
def test_every_button_brings_it_back_and_leaves_the_page_idle(
    pressed: Pressed, button: Callable[[Pressed], dict[Any, Any]], left: list[str]
) -> None:
    second = pressed.sent("second", steps=1)
    after = button(pressed)
    pressed.take(after)
    pressed.finish(second)  # its updates may come after those of the button
    assert pressed.box == "second"
    assert pressed.questions == left
    assert pressed.is_idle


@pytest.mark.parametrize("name", ["undo", "delete"])
def test_a_button_that_can_do_nothing_leaves_no_stopped_answer_on_the_page(
    pressed: Pressed, name: str
) -> None:
    pressed.take(pressed.handlers.new("", Request()))
    second = pressed.sent("second", steps=1)
    pressed.take(getattr(pressed.handlers, name)("", Request()))
    assert pressed.is_idle
    assert pressed.box == "second"
    pressed.finish(second)
    assert pressed.questions == []


def test_a_purge_without_the_tick_stops_nothing(pressed: Pressed) -> None:
    second = pressed.sent("second", steps=1)
    pressed.take(pressed.handlers.purge(False, "", Request()))
    pressed.finish(second)
    assert pressed.questions == ["first", "second"]


def test_all_questions_that_have_not_begun_come_back(pressed: Pressed) -> None:
    sent = [pressed.sent(text, steps=1) for text in ("second", "third")]
    assert pressed.box == "second"
    pressed.take(pressed.handlers.undo("", Request()))
    for steps in sent:
        pressed.finish(steps)
    assert pressed.box == "second\nthird"
    assert pressed.questions == ["first"]
    assert pressed.is_idle


def test_an_edited_question_comes_back_too(pressed: Pressed) -> None:
    other = SimpleNamespace(index=0, value="o")
    edited = pressed.handlers.edit("", Request(), other, *pressed.form)
    pressed.take(next(edited))
    pressed.take(pressed.handlers.undo("", Request()))
    pressed.finish(edited)
    assert pressed.box == "o"
    assert pressed.questions == ["first"]
    assert pressed.is_idle


def test_stop_before_the_answer_begins_is_obeyed(pressed: Pressed) -> None:
    second = pressed.sent("second", steps=1)
    pressed.handlers.stop(Request())
    pressed.finish(second)
    assert pressed.box == "second"
    assert pressed.questions == ["first"]
    assert pressed.is_idle
    pressed.finish(pressed.sent("third", steps=0))  # of that one alone
    assert pressed.questions == ["first", "third"]


def test_an_answer_that_is_refused_before_it_begins_leaves_nothing_waiting(
    pressed: Pressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m1local_app.web.attachments import Attachment

    def refuse() -> None:
        raise M1Error("Licence and medical notice are not accepted")

    pressed.tab.files = [Attachment("a", "text", 1)]
    with monkeypatch.context() as patch:
        patch.setattr(type(pressed.handlers._desk), "check_accepted", lambda desk: refuse())
        pressed.finish(pressed.sent("second", steps=0))
    assert not pressed.tab.awaited
    assert pressed.box == "second"
    assert pressed.is_idle
    pressed.take(pressed.handlers.undo("", Request()))
    assert [file.name for file in pressed.tab.files] == ["a"]


def test_a_text_of_a_base_model_that_has_no_word_yet_stands_nowhere(pressed: Pressed) -> None:
    from m1local_app.web import answers

    steps: Any = answers.continued(pressed.tab, pressed.handlers._desk, "once upon a time")
    assert not isinstance(next(steps), TextDelta)
    steps.close()
    assert pressed.questions == ["first"]
    steps = answers.continued(pressed.tab, pressed.handlers._desk, "once upon a time")
    while not isinstance(next(steps), TextDelta):
        pass
    steps.close()
    assert pressed.questions == ["first", "once upon a time"]


def test_a_page_that_is_left_leaves_nothing_waiting(pressed: Pressed) -> None:
    second: Any = pressed.handlers.send("second", "", Request(), *pressed.form)
    next(second)
    assert pressed.tab.awaited
    second.close()
    assert not pressed.tab.awaited


def test_what_shows_the_whole_hides_no_stop_button_of_a_question(pressed: Pressed) -> None:
    second = pressed.sent("second", steps=1)
    assert pressed.handlers.earlier("", Request()) == {}
    pressed.take(pressed.handlers._whole(pressed.tab))  # of a button pressed just before
    assert not pressed.is_idle
    pressed.finish(second)
    assert pressed.is_idle
    assert pressed.questions == ["first", "second"]


def test_deleting_brings_question_and_files_back_and_purging_neither(pressed: Pressed) -> None:
    from m1local_app.web.attachments import Attachment

    for press_, left in ((pressed.handlers.delete, "second"), (purge(pressed), "")):
        pressed.take({pressed.parts.box: ""})
        pressed.tab.files = [Attachment("a", "text", 1)]
        second = pressed.sent("second", steps=1)
        pressed.take(press_("", Request()))
        pressed.finish(second)
        assert (pressed.box, len(pressed.tab.files)) == (left, len(left) // len("second"))
        assert pressed.is_idle


def purge(pressed: Pressed) -> Callable[..., dict[Any, Any]]:
    return lambda *given: dict(pressed.handlers.purge(True, *given))


def test_an_answer_that_has_just_ended_shows_nothing_over_the_next_question(
    pressed: Pressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, asked = pressed.tab.end, list[Iterator[Any]]()

    def end() -> None:
        ended()
        if not asked:
            asked.append(pressed.sent("second", steps=1))

    monkeypatch.setattr(pressed.tab, "end", end)
    pressed.finish(pressed.handlers.retry("", Request(), *pressed.form))
    assert "second" in str(pressed.shown[pressed.parts.chat][-1])
    assert not pressed.is_idle
    pressed.finish(asked[0])
    assert pressed.questions == ["first", "second"]
    assert pressed.is_idle


def test_presses_from_many_threads_ask_every_question_once_or_bring_it_back(
    pressed: Pressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [f"question {number}" for number in range(24)]
    asked, take = list[Any](), pressed.tab.ask

    def noted(text: str) -> Any:
        asked.append(take(text))
        return asked[-1]

    monkeypatch.setattr(pressed.tab, "ask", noted)

    def ask(text: str) -> None:
        pressed.finish(pressed.handlers.send(text, "", Request(), *pressed.form))

    threads = [threading.Thread(target=ask, args=(text,)) for text in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    answered = [text for text in pressed.questions if text in wanted]
    back = {text for each in asked for text in each.before.splitlines()}
    back |= set() if pressed.tab.latest.text in answered else {pressed.tab.latest.text}
    assert set(answered) | back == set(wanted)
    assert not set(answered) & back
    assert len(answered) == len(set(answered))
    assert not pressed.tab.awaited
