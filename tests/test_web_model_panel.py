"""The model panel in a real headless Chromium: quantizing, its place in the line, changing."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m1local import home
from m1local_app import notices
from m1local_quantize import pipeline
from tests.conftest import TINY, write_checkpoint
from tests.web_page import MARKS, Served, SlowEngine, Window, accept

pytestmark = MARKS


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A page of this test's own, since it changes the model."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    accept(tmp_path, monkeypatch)
    served = Served(SlowEngine(tmp_path / "model"), tmp_path)
    yield served
    served.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An original to be quantized."""
    wide = TINY | {"max_position_embeddings": 8192}
    write_checkpoint(tmp_path / "original", wide, endless=True)
    return tmp_path / "original"


@pytest.fixture
def panel(page: Served, opened: Window, source: Path) -> Iterator[Window]:
    """The page with the panel unfolded and the folder named."""
    opened.open(page.url)
    opened.click("[data-do=drawer]")
    opened.unfold("#model-panel")
    opened.until(lambda: opened.texts("#model dd"), "no facts came")
    opened.type("#source input, #source textarea", str(source))
    yield opened
    opened.assert_private_and_quiet()


def says(window: Window, text: str) -> None:
    """Wait until the panel says `text`."""
    window.until(lambda: text in "".join(window.texts("#work")), f"nobody says {text!r}")


def test_quantizing_waits_for_its_turn_and_the_result_is_talked_to(
    page: Served, panel: Window, tmp_path: Path
) -> None:
    panel.ask("hello", answers=1)
    panel.click("#quantize")
    says(panel, "Waiting: 1 before")
    assert not list((tmp_path / "models").glob("*"))
    panel.click("#stop")
    says(panel, "Done: original-int4")
    (made,) = home.models().iterdir()
    before = page.desk.label
    panel.click("#switch")
    panel.until(lambda: panel.shown("#welcome"), "nobody asks to accept the other model's licence")
    assert made.name in panel.texts("#welcome")[0]
    assert not panel.shown("#shell")
    panel.click("#welcome > button, #welcome button.primary")
    panel.until(lambda: panel.shown("#box textarea"), "the page never came back")
    assert panel.texts(".m1-label") == [made.name]
    assert page.desk.label != before
    assert notices.is_accepted(page.desk.checkpoint)
    says(panel, f"Now talking to {made.name}")
    assert "int4" in panel.texts("#model")[0]
    panel.send("and now?", answers=2)
    latest = page.store.latest()
    assert latest is not None
    models = [message.model for message in page.store.path(latest.id)]
    assert models[1::2] == [before, made.name]


def test_quantizing_can_be_stopped_and_goes_on_later(
    page: Served, panel: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, begun, ended = pipeline.quantize_checkpoint, [0], [0]

    def slow(*given: Any, **named: Any) -> Iterator[Any]:
        begun[0] += 1
        try:
            for event in whole(*given, **named):
                time.sleep(0.3 if begun[0] == 1 else 0)
                yield event
        finally:
            ended[0] += 1

    monkeypatch.setattr(pipeline, "quantize_checkpoint", slow)
    panel.click("#quantize")
    panel.until(lambda: panel.texts("#work progress"), "no progress is drawn")
    says(panel, "Nobody is answered meanwhile")
    assert not panel.shown("#quantize")
    panel.type("#box textarea", "hello?\n")
    panel.until(lambda: "Waiting: 1 before" in "".join(panel.texts("#status")), "it did not wait")
    panel.click("#cancel")
    says(panel, "What was done is kept")
    assert ended == [1]
    panel.streaming(1)
    panel.stop()
    (part,) = home.models().iterdir()
    assert not (part / "m1local.json").exists()
    panel.click("#quantize")
    says(panel, "Done: original-int4")
    assert (part / "m1local.json").is_file()


def test_closing_the_page_ends_its_quantizing(
    page: Served, panel: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    def endless(*_: Any, **__: Any) -> Iterator[object]:
        try:
            while True:
                time.sleep(0.05)
                yield object()
        finally:
            ended.append(True)

    monkeypatch.setattr(pipeline, "quantize_checkpoint", endless)
    panel.click("#quantize")
    panel.until(lambda: panel.texts("#work progress"), "no progress is drawn")
    panel.browser.get("about:blank")
    panel.until(lambda: ended, "it goes on though nobody looks")
    with page.desk.turnstile.ticket() as ticket:
        panel.until(lambda: ticket.ahead() == 0, "the line does not move")
    panel.browser.get_log("browser")  # of the connection that was cut


def test_what_cannot_be_quantized_is_said(panel: Window) -> None:
    panel.type("#source input, #source textarea", "/nowhere")
    panel.click("#quantize")
    panel.until(lambda: panel.texts("#work .m1-error"), "nothing was said")
    assert "There is no folder" in panel.texts("#work .m1-error")[0]
    panel.until(lambda: panel.shown("#quantize"), "it cannot be tried again")
