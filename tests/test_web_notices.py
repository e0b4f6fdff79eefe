"""What the page says besides answers: why one ended, what is left out, what stands above it."""

from pathlib import Path

import pytest

from m1local.loop_guard import LoopGuard
from m1local_app.history import History
from tests.test_attachments import write_pdf
from tests.web_page import MARKS, Served, Window, keep

pytestmark = MARKS
CONTEXT_TOKENS, ANSWER_TOKENS = 256, 200


def note(window: Window, part: str) -> str:
    """The notice that says `part`, once it is there."""

    def found() -> str | None:
        return next((text for text in window.texts(".m1-notice") if part in text), None)

    text = window.until(found, f"no notice says {part!r}")
    assert isinstance(text, str)
    return text


def settings(window: Window) -> None:
    if not window.shown("#drawer"):
        window.click("[data-do=drawer]")


def test_a_full_context_is_said_and_the_meter_shows_it(window: Window) -> None:
    window.type("#box textarea", "one two three four five six seven eight nine ten eleven\n")
    window.ended(1)
    window.type("#box textarea", "and on\n")
    note(window, "The context is full")
    window.until(lambda: window.idle, "the stop button stays")
    assert window.shown(".m1-meter.m1-nearly")


def test_left_out_turns_are_said(page: Served, window: Window, store: History) -> None:
    settings(window)
    window.type("#overflow input", "\ue009a\ue000Leave out the oldest\n")
    window.fill("#length input", "60")
    for number in range(1, 5):
        window.send(f"question number {number} of some length, so that it fills", answers=number)
        if any("older messages" in text for text in window.texts(".m1-notice")):
            break
    assert "the model no longer sees" in note(window, "older messages")
    assert "[" not in note(window, "older messages")


def test_an_answer_that_repeats_itself_is_stopped_and_that_is_said(
    window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoopGuard, "push", lambda guard, token_id: True)
    window.type("#box textarea", "hello\n")
    assert "Retry asks again" in note(window, "repeated itself")
    window.until(lambda: window.idle, "the stop button stays")


def test_advice_in_an_emergency_does_not_wait_for_the_first_word(
    page: Served, window: Window
) -> None:
    with page.desk.turnstile.ticket():  # somebody else is being answered
        window.type("#box textarea", "I have chest pain\n")
        window.until(lambda: window.texts("#chat .bot blockquote"), "no advice came")
        assert "emergency number" in window.texts("#chat .bot blockquote")[0]
        assert any("Waiting: 1 before" in text for text in window.texts("#status"))
    window.ended(1)
    assert len(window.texts("#chat .bot blockquote")) == 1


def test_advice_comes_with_an_error_too(window: Window) -> None:
    window.js(
        "const b = document.querySelector('#box textarea');"
        "b.value = 'chest pain '.repeat(900); b.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    window.click("#send")
    window.until(lambda: window.texts(".m1-error"), "no error was shown")
    assert "emergency number" in note(window, "emergency")


def test_a_pdf_is_attached_and_one_without_text_is_refused(
    window: Window, store: History, tmp_path: Path
) -> None:
    write_pdf(tmp_path / "report.pdf", "Pressure 24 mmHg")
    write_pdf(tmp_path / "scan.pdf", "")
    window.upload(tmp_path / "scan.pdf")
    window.until(lambda: "OCR" in "".join(window.texts(".m1-error")), "it was not refused")
    window.upload(tmp_path / "report.pdf")
    window.until(lambda: window.texts(".m1-chip"), "it was not attached")
    assert "tokens" in window.texts(".m1-chip small")[0]
    window.until(lambda: not window.texts(".m1-error"), "the old error stays")
    window.send("What is the pressure?", answers=1)
    latest = store.latest()
    assert latest is not None
    assert "[File: report.pdf]\nPressure 24 mmHg" in store.path(latest.id)[0].content


def test_a_new_conversation_has_the_prompt_that_was_chosen_not_that_of_the_one_left(
    page: Served, window: Window, store: History
) -> None:
    old = keep(store, "old", "one")
    store.set_system(old, "Speak like a pirate.")
    window.open(f"{page.url}?c={old}")
    settings(window)
    value = "return document.querySelector('#system textarea').value"
    window.until(lambda: window.js(value) == "Speak like a pirate.", "it was not opened")
    window.click("#new")
    window.until(lambda: window.js(value) == "", "the old prompt stays")
    window.fill("#length input", "4")
    window.send("new", answers=1)
    latest = store.latest()
    assert latest is not None
    assert (latest.system, store.conversation(old).system) == ("", "Speak like a pirate.")
