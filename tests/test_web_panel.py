"""The page's side panel, settings, files and look, in a real headless Chromium."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from m1local_app.history import History
from tests.web_page import LABEL, MARKS, Served, Window, keep

pytestmark = MARKS
CONTEXT_TOKENS, ANSWER_TOKENS = 1024, 12


def test_conversations_are_listed_found_opened_and_renamed(
    page: Served, store: History, window: Window
) -> None:
    keep(store, "What is <b>glaucoma</b>?", "A disease of the eye.")
    chinese = keep(store, "高血压是什么?", "血压长期升高。")
    window.open(page.url)
    window.until(lambda: len(window.texts("#list button")) == 2, "they are not listed")
    assert "<b>glaucoma</b>" in window.texts("#list button span")[1]
    window.type("#search input, #search textarea", "升高")
    window.until(lambda: len(window.texts("#list button")) == 1, "it was not found")
    assert "升高" in window.texts("#list small")[0]
    window.click("#list button")
    window.until(lambda: window.questions == ["高血压是什么?"], "it was not opened")
    assert window.answers == ["血压长期升高。"]
    window.unfold("#this")
    window.type("#title input, #title textarea", "\ue009a\ue000血压 <i>x</i>\n")
    window.until(lambda: store.conversation(chinese).title == "血压 <i>x</i>", "not renamed")
    window.until(lambda: "血压 <i>x</i>" in window.texts("#list span"), "the list is old")
    window.click("#new")
    window.until(lambda: window.questions == [], "no new conversation")


def test_deleting_can_be_taken_back_and_purging_cannot(
    page: Served, store: History, window: Window
) -> None:
    kept = keep(store, "delete me", "yes")
    window.open(f"{page.url}?c={kept}")
    window.until(lambda: window.questions == ["delete me"], "it was not opened")
    window.unfold("#this")
    window.click("#delete")
    window.until(lambda: store.conversations() == [], "it was not deleted")
    window.until(lambda: window.shown("#deleted button"), "it cannot be taken back")
    window.click("#deleted button")
    window.until(lambda: window.questions == ["delete me"], "it did not come back")
    assert len(store.conversations()) == 1
    window.click("#delete")
    window.until(lambda: store.conversations() == [], "it was not deleted")
    window.unfold("#bin-panel")
    window.until(lambda: window.texts("#bin span") == ["delete me"], "it is not in the bin")
    keep(store, "another", "one")
    window.click("#purge")
    window.until(lambda: window.texts(".m1-error"), "nothing was asked")
    assert len(store.conversations(binned=True)) == 1
    window.click("#purge-sure input")
    window.click("#purge")
    window.until(lambda: not store.conversations(binned=True), "nothing was purged")
    window.until(lambda: store.conversations() == [], "the listed one stays")
    assert b"delete me" not in (page.desk.folder.parent / "history.db").read_bytes()


def test_a_conversation_is_saved_in_three_formats(
    page: Served, store: History, window: Window
) -> None:
    kept = keep(store, "save me <script>", "saved")
    window.open(f"{page.url}?c={kept}")
    window.until(lambda: len(window.questions) == 1, "it was not opened")
    window.unfold("#this")
    for name, suffix in (("markdown", "md"), ("html", "html"), ("json", "json")):
        window.click(f"#export-{name}")
        file = window.downloads / f"m1-{kept}.{suffix}"
        window.until(file.is_file, f"no {file.name} came")
        assert "save me" in window.until(partial(file.read_text, "utf-8"), "it is empty")
    assert "save me <script>" not in (window.downloads / f"m1-{kept}.html").read_text("utf-8")
    assert json.loads((window.downloads / f"m1-{kept}.json").read_text("utf-8"))["id"] == kept
    assert not list(page.desk.folder.parent.rglob("*.html"))


def test_settings_and_presets_make_the_answer_and_are_reset(
    page: Served, store: History, window: Window
) -> None:
    window.click("[data-do=drawer]")
    role = "return document.querySelector('#preset input').value"
    assert window.js(role) == "General"
    window.type("#preset input", "\ue009a\ue000Explain\n")
    value = "return document.querySelector('#system textarea').value"
    window.until(lambda: "patient" in window.js(value), "the preset wrote nothing")
    assert window.js(role) == "Explain to a patient"
    window.type("#system textarea", " And rhyme.")
    window.until(lambda: "Own text" in window.js(role), "the role is still the preset's")
    window.fill("#seed input", "7")
    window.send("hello", answers=1)
    latest = store.latest()
    assert latest is not None
    assert "patient" in latest.system
    assert store.path(latest.id)[-1].parameters["seed"] == 7
    assert "length limit" in window.texts(".m1-notice")[0]
    window.click("#reset")
    window.until(lambda: window.js(value) == "", "nothing was reset")
    window.until(lambda: window.js(role) == "General", "the role was not reset")
    window.fill("#length input", "0")
    window.type("#box textarea", "and now?\n")
    window.until(lambda: window.texts(".m1-error"), "a wrong value was taken")


def test_a_file_is_attached_with_its_tokens_or_refused_with_a_reason(
    store: History, window: Window, tmp_path: Path
) -> None:
    name = "<img src=x onerror=alert(1)> 报告.md"
    (tmp_path / name).write_text("blood pressure 140 <C_A> fine", encoding="utf-8")
    (tmp_path / "large.txt").write_text("hello " * 3000)
    (tmp_path / "blob.txt").write_bytes(b"\0\1\2" * 9)
    window.upload(tmp_path / "large.txt")
    window.until(lambda: window.texts(".m1-error"), "it was not refused")
    assert "are left of the context" in window.texts(".m1-error")[0]
    window.upload(tmp_path / "blob.txt")
    window.until(lambda: "is no text" in "".join(window.texts(".m1-error")), "it was not refused")
    window.upload(tmp_path / name)
    window.until(lambda: window.texts(".m1-chip"), "it was not attached")
    assert "tokens" in window.texts(".m1-chip small")[0]
    assert window.js("return document.querySelectorAll('#chips img, #chat img').length") == 0
    window.click(".m1-chip button")
    window.until(lambda: not window.texts(".m1-chip"), "it stays")
    window.upload(tmp_path / name)
    window.until(lambda: window.texts(".m1-chip"), "it was not attached again")
    window.send("What does it say?", answers=1)
    latest = store.latest()
    assert latest is not None
    asked = store.path(latest.id)[0].content
    assert asked.startswith("What does it say?")
    assert "blood pressure 140 <C_A> fine" in asked
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    kept = [path for path in uploads.rglob("*") if path.is_file()]
    assert not [path for path in kept if b"blood pressure" in path.read_bytes()]
    assert not window.texts(".m1-chip")


def test_both_languages_are_pages_that_change_into_each_other(
    page: Served, store: History, window: Window
) -> None:
    kept = keep(store, "stay", "yes")
    window.open(f"{page.url}?c={kept}")
    window.click("[data-do=language]")
    window.until(lambda: window.texts("#send") == ["发送"], "no Chinese came")
    window.until(lambda: window.questions == ["stay"], "the conversation was lost")
    window.send("你好", answers=2)
    assert "词元/秒" in window.texts(".m1-facts")[0]
    window.click("[data-do=language]")
    window.until(lambda: window.texts("#send") == ["Send"], "no English came")


def test_the_colours_that_were_chosen_are_remembered(window: Window, page: Served) -> None:
    script = "return document.body.classList.contains('dark')"
    before = window.js(script)
    window.click("[data-do=theme]")
    assert window.js(script) != before
    window.open(page.url)
    assert window.js(script) != before
    window.click("[data-do=theme]")


def test_a_phone_shows_everything_without_scrolling_sideways(
    page: Served, window: Window, store: History
) -> None:
    long = (
        "| a | b |\n|---|---|\n| " + "word " * 40 + "| " + "x" * 200 + " |\n\n`" + "y" * 300 + "`"
    )
    kept = keep(store, "w" * 200, long)
    metrics: dict[str, Any] = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    window.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        window.open(f"{page.url}?c={kept}")
        window.until(lambda: len(window.answers) == 1, "it was not opened")
        assert not window.shown("#side")
        wide = "return document.documentElement.scrollWidth"
        assert window.js(wide) <= 390
        for panel in ("side", "drawer"):
            window.click(f"[data-do={panel}]")
            window.until(partial(window.shown, f"#{panel}"), "it did not open")
            assert window.js(wide) <= 390
        assert not window.shown("#side")  # one at a time
        window.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
        window.until(lambda: not window.shown("#drawer"), "Escape did not close it")
        send = window.js("const r = document.querySelector('#send').getBoundingClientRect();"
                         "return [r.right, r.bottom]")  # fmt: skip
        assert send[0] <= 390
        assert send[1] <= 800
    finally:
        window.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_of_a_long_conversation_the_end_is_shown_and_more_on_demand(
    page: Served, store: History, window: Window
) -> None:
    identifier, parent = store.begin(), None
    for number in range(30):
        parent = store.add(identifier, "user", f"question {number}", parent=parent)
        parent = store.add(identifier, "assistant", f"answer {number}", parent=parent)
    page.desk.form = replace(page.desk.form, overflow="rolling")
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.questions) == 20, "the end is not shown")
    assert window.questions[0] == "question 10"
    window.js("document.querySelectorAll('#chat button[aria-label=Edit]')[0].click()")
    window.type("#chat textarea", " changed")
    window.click("#chat button[aria-label=Submit]")
    window.until(lambda: store.path(identifier)[-2].content == "question 10 changed", "not it")
    window.until(lambda: window.idle and window.shown("#earlier") is False, "all can be shown")
    window.until(lambda: "question 10 changed" in window.questions, "it is not shown")
    window.until(lambda: window.texts(".m1-flip span") == ["2/2"], "no version to flip")
    window.click(".m1-flip button")
    window.until(lambda: window.questions[-1:] == ["question 29"], "it did not flip")
    window.click("#earlier")
    window.until(lambda: len(window.questions) == 30, "no earlier ones came")


def test_the_model_panel_says_what_one_talks_to(window: Window) -> None:
    window.click("[data-do=drawer]")
    window.unfold("#model-panel")
    window.until(lambda: window.texts("#model dd"), "no facts came")
    assert LABEL in window.texts("#model dd")
    text = window.texts("#model")[0]
    facts = "parameters", "memory used", "memory planned", "processor", "C library", "licence"
    for fact in facts:
        assert fact in text
