"""What the page is made of, without a browser: the line, the tabs, the form, the views."""

import threading
from datetime import UTC, datetime
from pathlib import Path

import gradio as gr
import pytest

from m1local.chat import ChatSession, Overflow, Turn
from m1local.engine import Engine
from m1local.errors import M1Error, SamplingError, StorageError
from m1local.tokenizer import Message
from m1local_app import red_flags
from m1local_app.conversation import Conversation
from m1local_app.history import History, StoredConversation
from m1local_app.language import speaking, tr
from m1local_app.web import answers, views
from m1local_app.web.attachments import Attachment
from m1local_app.web.forms import OWN, PRESETS, Form, preset, role, roles
from m1local_app.web.page import spoken
from m1local_app.web.tabs import MOST_TABS, Tab, Tabs
from m1local_app.web.turnstile import Turnstile

EVIL = "<img src=x onerror=alert(1)>\"'&"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint)


@pytest.fixture
def tab(engine: Engine) -> Tab:
    return Tab(Conversation(ChatSession(engine), None, label="tiny", checkpoint=""))


def test_the_line_is_first_come_first_served_and_can_be_left() -> None:
    line = Turnstile()
    with line.ticket() as first:
        with line.ticket() as second, line.ticket() as third:
            assert [each.ahead() for each in (first, second, third)] == [0, 1, 2]
        with line.ticket() as fourth:
            assert fourth.ahead() == 1
    with line.ticket() as fifth:
        assert fifth.ahead() == 0


def test_waiting_ends_when_the_line_moves() -> None:
    line, moved = Turnstile(), threading.Event()

    def stand() -> None:
        with line.ticket() as ticket:
            while ticket.ahead():
                ticket.wait(60)
            moved.set()

    with line.ticket():
        thread = threading.Thread(target=stand)
        thread.start()
        assert not moved.wait(0.1)
    assert moved.wait(30)
    thread.join()


def test_an_interrupted_answer_is_waited_for(tab: Tab) -> None:
    tab.begin()
    timer = threading.Timer(0.1, tab.end)
    timer.start()
    tab.interrupt()
    assert tab.silent
    assert not tab.busy
    timer.join()
    tab.begin()
    assert not tab.stopping
    assert not tab.silent


def test_a_store_that_fails_is_a_notice_and_the_answer_is_shown(
    engine: Engine, tab: Tab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with History.open(tmp_path / "history.db") as store:
        conversation = Conversation(tab.conversation.session, store, label="tiny", checkpoint="")
        tab.conversation = conversation

        def full(*_: object, **__: object) -> int:
            raise StorageError("The disk is full.")

        monkeypatch.setattr(store, "add", full)
        conversation.session.settings = engine.settings(temperature=0.0)
        progress = tab.begin()
        *_, text = answers._text_so_far(conversation.send("hello"), tab, progress)
        assert text == conversation.session.messages[-1].content
        assert any("The disk is full." in notice for notice in progress.notices)


def note(name: str) -> Attachment:
    return Attachment(name, "text", 1)


def test_a_question_sent_twice_is_asked_once_with_its_files(tab: Tab) -> None:
    tab.files = [note("a")]
    first = tab.ask("summarise")
    again = tab.ask("summarise")  # the key was held, and nothing has begun
    assert ([file.name for file in first.files], again.before, tab.files) == (["a"], "", [])
    assert [file.name for file in again.files] == ["a"]
    assert tab.latest is again
    tab.begin()
    tab.end()
    third = tab.ask("summarise")  # it had ended: asked again, without
    assert (third.files, third.before) == ([], "")


def test_another_question_sends_the_first_back_with_its_files(tab: Tab) -> None:
    tab.files = [note("a")]
    tab.ask("summarise")
    tab.files = [note("b")]
    asked = tab.ask("and this")
    assert ([file.name for file in asked.files], asked.before) == (["b"], "summarise")
    assert [file.name for file in tab.files] == ["a"]
    third = tab.ask("and that")
    assert third.before == "summarise\nand this"
    assert tab.calm() == "summarise\nand this\nand that"
    assert {file.name for file in tab.files} == {"a", "b"}


def test_the_tab_unused_longest_is_forgotten_but_none_that_is_answering(engine: Engine) -> None:
    tabs = Tabs(lambda: Tab(Conversation(ChatSession(engine), None, label="", checkpoint="")))
    tabs.of("busy")[0].begin()
    tabs.of("asked")[0].ask("a question that has not begun")
    for number in range(MOST_TABS + 5):
        _, new = tabs.of(str(number))
        assert new
    assert tabs.known("busy") is not None
    assert tabs.known("asked") is not None
    assert tabs.known("0") is None
    assert tabs.known(str(MOST_TABS + 4)) is not None
    tabs.drop("busy")
    assert tabs.known("busy") is None


def test_a_form_says_what_the_settings_say(engine: Engine) -> None:
    settings = engine.settings(temperature=0.5, top_k=3, seed=4)
    form = Form.of(settings, system="be kind", overflow="rolling")
    assert Form.read(form.values) == form
    assert form.settings(engine.defaults) == settings
    assert form.policy is Overflow.ROLLING
    values = list(form.values)
    values[2] = 0
    assert Form.read(values).settings(engine.defaults).sampling.top_k is None


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [(1, None, M1Error), (6, 0, M1Error), (1, -1.0, SamplingError), (3, 2.0, SamplingError)],
)
def test_wrong_values_are_one_error(
    engine: Engine, index: int, value: object, error: type[M1Error]
) -> None:
    values = list(Form.of(engine.defaults, system="", overflow="stop").values)
    values[index] = value
    with pytest.raises(error):
        Form.read(values).settings(engine.defaults)


def test_presets_come_in_the_page_s_language() -> None:
    assert preset(PRESETS[0][0]) == ""
    assert preset("nonsense") is preset(OWN) is None
    for name, text in PRESETS[1:]:
        assert preset(name) == text
        with speaking("zh"):
            chinese = preset(tr(name))
            assert chinese
            assert chinese != text


def test_a_system_prompt_is_shown_as_its_role_in_either_language() -> None:
    assert role("") == PRESETS[0][0]
    assert role("You are a parrot.") == OWN == roles()[-1]
    english = {text: name for name, text in PRESETS if text}
    with speaking("zh"):
        chinese = {tr(text): name for text, name in english.items()}
        assert role("You are a parrot.") == tr(OWN) == roles()[-1] != OWN
        assert {role(text): name for text, name in english.items()} == {
            tr(name): name for name in english.values()
        }
    assert {role(text): name for text, name in (english | chinese).items()} == {
        name: name for name in english.values()
    }


def test_what_was_written_by_others_is_escaped_everywhere(tab: Tab) -> None:
    now = datetime.now(UTC)
    one = StoredConversation(id=3, title=EVIL, system="", created=now, changed=now, messages=2)
    tab.progress.error = EVIL
    tab.progress.notices.append(EVIL)
    for html in (
        views.conversations([one], 3),
        views.binned([one]),
        views.attached([Attachment(EVIL, "x", 1)]),
        views.status(tab, capacity=100),
    ):
        assert "<img" not in html
        assert "&lt;img" in html


def test_nothing_in_a_message_is_html_and_nothing_is_swallowed() -> None:
    for text in (
        "a <b>c</b>",
        "x <script>",
        "<!-- no",
        "5 <a and",
        "< 5",
        "`<b>` <br> ```\n<i>\n```",
    ):
        shown = views.without_tags(text)
        assert views.typed(shown) == text
        assert shown.replace("\N{WORD JOINER}", "") == text
    for text in ("a <b>c</b>", "a ``` b <b>c</b>", "a\n x ``` <b>"):
        assert "<b" not in views.without_tags(text)
    for text in ("```\n<b>\n```", "- ```html\n  <b>\n  ```", "> ```\n> <b>\n> ```", "```\n<b>"):
        assert views.without_tags(text) == text
    assert views.without_tags("`<b>` <br> < 5") == "`<b>` <br> < 5"


def test_advice_stands_above_the_answer_to_that_question_only() -> None:
    turns = [
        Turn(Message("user", "chest pain")),
        Turn(Message("assistant", "a")),
        Turn(Message("user", "thanks")),
        Turn(Message("assistant", "b")),
    ]
    contents = [message["content"] for message in views.messages(turns)]
    assert contents[1] == f"> **{red_flags.URGENT_ADVICE}**\n\na"
    assert contents[3] == "b"


def test_a_handler_speaks_its_page_s_language_in_every_step() -> None:
    steps = spoken("zh", lambda: tr("Send"))
    assert steps() == "发送"

    def handler() -> object:
        yield tr("Send")
        yield tr("Stop")

    said = []
    for text in spoken("zh", handler)():
        said += [text, tr("Send")]
    assert said == ["发送", "Send", "停止", "Send"]


def test_what_a_handler_has_no_place_for_is_said_as_text() -> None:
    def handler() -> object:
        raise M1Error("<b> is still being ended")

    def steps() -> object:
        yield "so far"
        handler()

    with pytest.raises(gr.Error, match="&lt;b&gt; is still being ended") as told:
        spoken("en", handler)()
    assert not told.value.print_exception
    made = spoken("en", steps)()
    assert next(made) == "so far"
    with pytest.raises(gr.Error, match="still being ended"):
        next(made)
