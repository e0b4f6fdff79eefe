"""Settings of the page that outlive it: in the browser, across a restart, in the file."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from m1local import home
from m1local.engine import Engine
from m1local_app import library, notices
from m1local_app.chat_options import EngineOptions
from m1local_app.conversing import _given
from m1local_app.history import History
from m1local_app.web import remembered
from m1local_app.web.desk import Desk
from m1local_app.web.forms import OWN, PRESETS, Form
from tests.web_page import MARKS, Served, SlowEngine, Window

pytestmark = MARKS
CONTEXT_TOKENS, ANSWER_TOKENS = 1024, 12
SYSTEM = "return document.querySelector('#system textarea')?.value"
LENGTH = "return document.querySelector('#length input').value"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint)


def form(engine: Engine) -> Form:
    return Form.of(engine.defaults, system="", overflow="stop")


def test_what_was_chosen_is_there_after_a_reload_and_after_a_restart(
    page: Served, store: History, window: Window, model: SlowEngine, web_home: Path
) -> None:
    prompt = 'Be "brief".\nUse 中文.'
    window.click("[data-do=drawer]")
    window.type("#system textarea", prompt)
    window.fill("#length input", "7")
    window.until(lambda: page.desk.form.system == prompt, "the prompt was not kept")
    window.until(lambda: page.desk.form.max_new_tokens == 7, "the length was not kept")
    window.browser.refresh()  # before anything was sent
    window.until(lambda: window.shown("#box"), "the page never came back")
    window.until(lambda: window.js(SYSTEM) == prompt, "the reload forgot the prompt")
    assert window.js(LENGTH) == "7"
    again = Served(model, web_home, tokens=ANSWER_TOKENS)
    try:
        assert again.desk.form == replace(again.desk.defaults(), system=prompt, max_new_tokens=7)
        window.open(again.url)
        window.until(lambda: window.js(SYSTEM) == prompt, "the restart forgot the prompt")
        window.click("[data-do=drawer]")
        window.click("#reset")
        window.until(lambda: window.js(SYSTEM) == "", "nothing was reset")
        window.until(lambda: window.js(LENGTH) == "12", "the length was not reset")
    finally:
        again.close()
    page.store = History.open(web_home / "history.db")
    page.desk.store = page.store
    assert "[page." not in home.settings().read_text("utf-8")


def test_the_language_that_was_chosen_comes_back(page: Served, window: Window) -> None:
    window.click("[data-do=language]")
    window.until(lambda: window.texts("#send") == ["发送"], "no Chinese came")
    assert window.js("return document.documentElement.lang") == "zh-Hans"
    window.browser.get(page.url)
    window.until(lambda: window.texts("#send") == ["发送"], "it was forgotten")
    window.click("[data-do=language]")
    window.until(lambda: window.texts("#send") == ["Send"], "no English came")
    window.open(page.url)
    assert window.texts("#send") == ["Send"]
    assert window.js("return document.documentElement.lang") == "en"


def test_only_what_differs_is_kept_for_each_checkpoint(m1_home: Path, engine: Engine) -> None:
    usual = form(engine)
    nothing = frozenset[str]()
    chosen = replace(usual, temperature=0.25, seed=3, system='"\\\x7f\n中', overflow="rolling")
    remembered.remember('a "b" [c]', chosen, usual, given=nothing)
    remembered.remember("other", replace(usual, top_k=9), usual, given=nothing)
    found = remembered.recall('a "b" [c]', usual, engine.defaults)
    assert found == replace(chosen, system='"\\\N{REPLACEMENT CHARACTER}\n中')
    assert remembered.recall("third", usual, engine.defaults) == usual
    remembered.remember('a "b" [c]', usual, usual, given=nothing)
    text = home.settings().read_text("utf-8")
    assert "temperature" not in text
    assert '[page."other"]\ntop_k = 9\n' in text


@pytest.mark.parametrize(
    "text",
    ["", "nonsense [", "page = 3", "page.tiny = 3", "[page.tiny]\ntemperature = 'hot'",
     "[page.tiny]\ntemperature = nan", "[page.tiny]\ntop_p = 7", "[page.tiny]\noverflow = 'no'",
     "[page.tiny]\nmax_new_tokens = 0", "[page.tiny]\nseed = 1.5", "\0"],
)  # fmt: skip
def test_a_file_that_makes_no_sense_changes_nothing(
    m1_home: Path, engine: Engine, text: str
) -> None:
    m1_home.mkdir()
    home.settings().write_text(text)
    assert remembered.recall("tiny", form(engine), engine.defaults) == form(engine)


def test_a_file_with_a_mistake_is_not_lost(m1_home: Path, engine: Engine) -> None:
    usual = form(engine)
    warm = replace(usual, temperature=0.25)
    remembered.remember("other", warm, usual, given=frozenset())
    text = home.settings().read_text(encoding="utf-8")
    home.settings().write_text(text, encoding="utf-8-sig")  # as Notepad writes it
    remembered.remember("tiny", warm, usual, given=frozenset())
    assert remembered.recall("other", usual, engine.defaults) == warm
    home.settings().write_text(broken := f"{text}\nmistake = [")
    remembered.remember("tiny", warm, usual, given=frozenset())
    assert remembered.recall("tiny", usual, engine.defaults) == warm
    assert home.settings().with_name("settings.toml.unreadable").read_text() == broken


def test_what_was_accepted_and_chosen_is_of_one_checkpoint_whatever_its_name(
    engine: Engine, m1_home: Path, tmp_path: Path
) -> None:
    def desk(folder: str) -> Desk:
        settings = engine.settings()
        return Desk(engine, tmp_path / folder / "m1", "m1", settings, store)

    with History.open(m1_home / "history.db") as store:
        notices.accept("m1")  # as it was recorded at first, by the name alone
        home.settings().write_text("[page.m1]\ntop_k = 9\n")
        one, other = desk("one"), desk("other")
        assert (one.accepted, other.accepted) == (True, False)
        assert one.form.top_k == 9 != other.form.top_k
        assert desk("one").accepted
        one.choose(replace(one.form, top_k=7))
        other.choose(replace(other.form, top_k=8))
        notices.accept(other.checkpoint)
        assert [desk(name).form.top_k for name in ("one", "other")] == [7, 8]
        assert [desk(name).accepted for name in ("one", "other", "third")] == [True, True, False]


def test_the_demo_is_known_by_its_name_wherever_it_is_installed() -> None:
    assert library.identity(home.DEMO) == library.DEMO_NAME
    assert library.identity(Path("x/m1-tiny")) == str(Path("x/m1-tiny").absolute())


def test_the_command_line_wins_and_leaves_what_was_chosen_before(
    m1_home: Path, engine: Engine
) -> None:
    usual = form(engine)
    remembered.remember("tiny", replace(usual, temperature=0.25), usual, given=frozenset())
    options = EngineOptions(temperature=0.5, system="be kind", overflow="rolling")
    given = _given(options)
    assert given == {"temperature", "system", "overflow"}
    now = replace(usual, temperature=0.5)
    remembered.remember("tiny", replace(now, top_k=9), now, given=given)
    assert remembered.recall("tiny", usual, engine.defaults) == replace(
        usual, temperature=0.25, top_k=9
    )


def test_where_nothing_is_kept_settings_are_not_either(
    m1_home: Path, engine: Engine, tiny_checkpoint: Path
) -> None:
    from m1local_app.web.desk import Desk

    desk = Desk(engine, tiny_checkpoint, "tiny", engine.defaults, None)
    desk.choose(replace(desk.form, system="a patient's words"))
    assert not home.settings().exists()


def has_role(window: Window, role: str) -> bool:
    return bool(window.js("return document.querySelector('#preset input').value") == role)


def test_the_role_of_one_s_own_text_leaves_what_is_written(page: Served, window: Window) -> None:
    window.click("[data-do=drawer]")
    window.type("#system textarea", "Be kind.")
    window.until(lambda: page.desk.form.system == "Be kind.", "the prompt was not kept")
    for role in (PRESETS[1][0], OWN):
        window.type("#preset input", f"\ue009a\ue000{role}\n")
        window.until(partial(has_role, window, role), "no role was chosen")
        window.until(lambda: window.js(SYSTEM) == PRESETS[1][1], "another prompt is there")
    window.browser.refresh()
    window.until(lambda: window.js(SYSTEM) == PRESETS[1][1], "the reload forgot it")
