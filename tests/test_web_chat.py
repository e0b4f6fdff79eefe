"""The conversation on the page, in a real headless Chromium."""

import time
from pathlib import Path

import pytest

from m1local_app.history import StoredMessage
from tests.web_page import MARKS, PATIENCE_SECONDS, Served, SlowEngine, Window, accept

pytestmark = MARKS
STOPPED_SECONDS = 0.3
RETRY = "#chat button[aria-label=Retry]"
UNDO = "#chat button[aria-label=Undo]"
EDIT = "#chat button[aria-label=Edit]"


def path(page: Served) -> list[StoredMessage]:
    latest = page.store.latest()
    return [] if latest is None else page.store.path(latest.id)


def short(window: Window) -> None:
    """From now on an answer ends after a few tokens."""
    field = "#length input"
    if not window.shown(field):
        window.click("[data-do=drawer]")
    window.fill(field, "12")
    window.click("[data-do=drawer]")


def test_an_answer_streams_stops_at_once_and_another_follows(page: Served, window: Window) -> None:
    window.ask("高血压是什么? <i>x</i><script>alert(1)</script>", answers=1)
    assert window.shown("#stop")
    assert not window.shown("#send")
    clicked = window.js("document.querySelector('#stop').click(); return Date.now() / 1000")
    window.until(lambda: window.idle, "the stop button stays")
    page.model.quiet()
    assert page.model.passes[-1] - clicked < STOPPED_SECONDS
    (stopped,) = window.answers
    assert len(stopped) >= 40
    facts = window.texts("#status .m1-facts")[0]
    assert "first token" in facts
    assert "tokens/s" in facts
    assert "/8,192" in facts
    window.ask("and now?", answers=2)
    window.stop()
    assert window.questions[0].replace("\u2060", "") == (
        "高血压是什么? <i>x</i><script>alert(1)</script>"
    )
    assert window.questions[1] == "and now?"
    assert window.js("return document.querySelectorAll('#chat .user script').length") == 0
    assert [message.finish for message in path(page)][1::2] == ["cancelled", "cancelled"]


def test_escape_stops(page: Served, window: Window) -> None:
    window.ask("hello", answers=1)
    window.type("#box textarea", "\ue00c")
    window.until(lambda: window.idle, "Escape did not stop it")
    page.model.quiet()
    assert path(page)[-1].finish == "cancelled"


def test_a_question_asked_during_an_answer_ends_it_and_is_answered(
    page: Served, window: Window
) -> None:
    window.ask("first", answers=1)
    window.type("#box textarea", "second\n")
    window.streaming(2)  # while the second is answered, both are shown
    assert window.questions == ["first", "second"]
    assert window.shown("#stop")
    window.stop()
    assert window.questions == ["first", "second"]
    assert [len(text) >= 40 for text in window.answers] == [True, True]
    messages = path(page)
    assert [message.content for message in messages][::2] == ["first", "second"]
    assert [message.finish for message in messages][1::2] == ["cancelled", "cancelled"]
    assert messages[2].parent == messages[1].id


def test_a_question_asked_while_another_waits_takes_its_turn(page: Served, window: Window) -> None:
    with page.desk.turnstile.ticket():  # somebody else is being answered
        window.type("#box textarea", "first\n")
        window.until(
            lambda: any("Waiting: 1 before" in text for text in window.texts("#status")),
            "no place in the line is shown",
        )
        window.type("#box textarea", "second\n")
        window.until(lambda: window.questions == ["second"], "it was not taken")
        value = "return document.querySelector('#box textarea').value"
        window.until(lambda: window.js(value) == "first", "the first question is gone")
    window.streaming(1)
    window.stop()
    assert window.questions == ["second"]
    assert window.js(value) == "first"


def test_shift_enter_makes_a_line_and_enter_sends_both(page: Served, window: Window) -> None:
    short(window)
    window.type("#box textarea", "one\ue008\n\ue000two\n")
    window.ended(1)
    assert path(page)[0].content == "one\ntwo"


def test_editing_an_earlier_question_asks_it_anew_and_keeps_the_old(
    page: Served, window: Window
) -> None:
    short(window)
    window.send("first", answers=1)
    window.send("second", answers=2)
    window.js(f"document.querySelectorAll('{EDIT}')[0].click()")
    field = "#chat textarea"
    window.until(lambda: window.shown(field), "no field to edit in")
    window.type(field, " changed")
    window.click("#chat button[aria-label=Submit]")
    window.until(lambda: window.idle and len(window.questions) == 1, "it was not asked anew")
    window.ended(1)
    assert path(page)[0].content == "first changed"
    window.until(
        lambda: window.texts(".message-buttons-right .m1-flip span") == ["2/2"],
        "no version to flip",
    )
    window.click(".message-buttons-right .m1-flip button")
    window.until(lambda: window.questions == ["first", "second"], "the old version did not come")
    assert [message.content for message in path(page)][::2] == ["first", "second"]


def test_a_retry_keeps_the_old_answer_as_a_version_to_flip_to(page: Served, window: Window) -> None:
    short(window)
    window.send("hello", answers=1)
    first = path(page)[-1]
    window.click(RETRY)
    window.until(lambda: window.texts(".m1-flip span") == ["2/2"], "no version to flip")
    second = path(page)[-1]
    assert second.id != first.id
    window.click(".m1-flip button[data-flip='-1']")
    window.until(lambda: window.texts(".m1-flip span") == ["1/2"], "it did not flip")
    assert path(page)[-1].id == first.id
    window.click(".m1-flip button[data-flip='1']")
    window.until(lambda: window.texts(".m1-flip span") == ["2/2"], "it did not flip back")
    assert path(page)[-1].id == second.id


def test_undo_brings_the_question_back(page: Served, window: Window) -> None:
    short(window)
    window.send("take me back", answers=1)
    window.click(UNDO)
    window.until(lambda: window.questions == [], "the question stays")
    assert window.js("return document.querySelector('#box textarea').value") == "take me back"
    assert path(page) == []


def test_a_reload_shows_the_same_conversation_and_it_goes_on(page: Served, window: Window) -> None:
    short(window)
    window.send("remember me", answers=1)
    window.until(lambda: "?c=" in window.browser.current_url, "the address names nothing")
    window.browser.refresh()
    window.until(lambda: window.questions == ["remember me"], "the reload forgot it")
    assert len(window.answers) == 1
    window.send("more", answers=2)
    assert [message.content for message in path(page)][::2] == ["remember me", "more"]


def test_two_tabs_do_not_mix_and_the_second_waits_in_line(page: Served, window: Window) -> None:
    window.ask("in the first tab", answers=1)
    first = window.browser.current_window_handle
    window.browser.switch_to.new_window("tab")
    window.open(page.url)
    window.type("#box textarea", "in the second tab\n")
    window.until(
        lambda: any("Waiting: 1 before" in text for text in window.texts("#status")),
        "no place in the line is shown",
    )
    assert window.answers == []
    second = window.browser.current_window_handle
    window.browser.switch_to.window(first)
    window.stop()
    assert window.questions == ["in the first tab"]
    window.browser.switch_to.window(second)
    window.streaming(1)
    window.stop()
    assert window.questions == ["in the second tab"]
    firsts = [page.store.path(one.id)[0].content for one in page.store.conversations(limit=2)]
    assert sorted(firsts) == ["in the first tab", "in the second tab"]
    # A third one waits like them, and a place in the line is left by Stop, too.
    window.browser.switch_to.window(first)
    window.ask("the first one again", answers=2)
    window.browser.switch_to.new_window("tab")
    window.open(page.url)
    window.type("#box textarea", "in the third tab\n")
    window.until(
        lambda: any("Waiting: 1 before" in text for text in window.texts("#status")),
        "no place in the line is shown",
    )
    window.stop()
    assert window.js("return document.querySelector('#box textarea').value") == "in the third tab"
    assert window.questions == []
    window.browser.close()
    window.browser.switch_to.window(first)
    window.stop()
    assert window.questions == ["in the first tab", "the first one again"]
    window.browser.switch_to.window(second)
    assert window.questions == ["in the second tab"]
    # Closing a tab stops its answer.
    window.ask("again", answers=2)
    window.browser.close()
    window.browser.switch_to.window(first)
    page.model.quiet()


def test_words_of_an_emergency_put_advice_above_the_answer(page: Served, window: Window) -> None:
    window.ask("我胸痛", answers=1)
    window.stop()
    assert "emergency number" in window.texts("#chat .bot blockquote")[0]
    window.ask("什么是青光眼", answers=2)
    window.stop()
    assert len(window.texts("#chat .bot blockquote")) == 1


def test_an_error_is_one_line_and_the_question_comes_back(page: Served, window: Window) -> None:
    window.js(
        "const b = document.querySelector('#box textarea');"
        "b.value = 'hello '.repeat(9000); b.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    window.click("#send")
    window.until(lambda: window.texts(".m1-error"), "no error was shown")
    (line,) = window.texts(".m1-error")
    assert line.startswith("This does not fit")
    assert "Traceback" not in line
    value = "return document.querySelector('#box textarea').value.length"
    window.until(lambda: window.js(value) > 50000, "the question is gone")
    window.until(lambda: window.idle, "the stop button stays")


def test_after_a_restart_of_the_server_the_page_goes_on(
    web_home: Path,
    page: Served,
    model: SlowEngine,
    window: Window,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept(web_home, monkeypatch)
    window.ask("before the restart", answers=1)
    window.stop()
    window.until(lambda: "?c=" in window.browser.current_url, "the address names nothing")
    address, port = window.browser.current_url, page.port
    window.assert_private_and_quiet()
    page.blocks.close()
    again = Served(model, web_home, port=port)
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        window.browser.get("about:blank")
        window.browser.get_log("browser")  # of the server that went away
        window.browser.get(address)
        window.until(lambda: window.questions == ["before the restart"], "it was forgotten")
        window.ask("after it", answers=2)
        window.stop()
        assert [message.content for message in path(again)][::2] == window.questions
        assert time.monotonic() < until
    finally:
        window.browser.get("about:blank")  # a page still there would report that it closes
        again.close()
