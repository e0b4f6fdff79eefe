"""Two programs in one conversation: nothing is lost, and each follows what the other has added."""

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.generate import TextDelta
from m1local_app import conversation as module
from m1local_app.conversation import Conversation
from m1local_app.history import History
from m1local_app.history.records import storable
from tests.conftest import lend_library, write_checkpoint
from tests.test_conversation import answer, begin, said, stored


@pytest.fixture
def conversation(engine: Engine, store: History) -> Conversation:
    return begin(engine, store)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[History]:
    with History.open(tmp_path / "history.db") as opened:
        yield opened


@pytest.fixture
def elsewhere(engine: Engine, store: History, tmp_path: Path) -> Iterator[Conversation]:
    """Another program's, which opens the file for itself."""
    with History.open(tmp_path / "history.db") as opened:
        yield begin(engine, opened)


def meet(conversation: Conversation, elsewhere: Conversation) -> None:
    """Begin a conversation that the other program goes on with."""
    answer(conversation.send("one"))
    assert conversation.id is not None
    elsewhere.open(conversation.id)


def test_two_programs_in_one_conversation_follow_each_other(
    conversation: Conversation, elsewhere: Conversation
) -> None:
    meet(conversation, elsewhere)
    for number, one in enumerate([elsewhere, conversation, conversation, elsewhere]):
        answer(one.send(f"more {number}"))
        assert stored(one) == said(one)
        assert ("went on elsewhere" in one.news()) == (number in (1, 3))
        assert one.news() == ""
    assert said(elsewhere)[::2] == ["one", "more 0", "more 1", "more 2", "more 3"]
    assert elsewhere.versions() == {}
    assert elsewhere.session.turns[1].token_ids == conversation.session.turns[1].token_ids


def test_what_was_said_elsewhere_is_not_gone_back_behind_unseen(
    conversation: Conversation, elsewhere: Conversation, store: History
) -> None:
    answer(conversation.send("one"))
    assert conversation.id is not None
    for step in (
        lambda one: answer(one.retry()), lambda one: one.undo(),
        lambda one: answer(one.edit(0, "other")),
    ):  # fmt: skip
        elsewhere.open(conversation.id)
        answer(elsewhere.send("two"))
        before = stored(elsewhere)
        with pytest.raises(M1Error, match="stands here as it does there now"):
            step(conversation)
        assert stored(conversation) == said(conversation) == before
    conversation.undo()  # now it is meant
    assert stored(conversation) == before[:-2]
    assert len(store.messages(conversation.id)) == len(before)


def test_a_question_waits_until_another_program_s_is_answered(
    conversation: Conversation, elsewhere: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet(conversation, elsewhere)
    events = conversation.send("two")
    for _ in range(8):  # its question is stored, and then a beginning of its answer
        next(events)
        with pytest.raises(M1Error, match="ask again when that has ended"):
            answer(elsewhere.send("three"))
        assert elsewhere.trouble() == ""
        assert len(said(elsewhere)) == 2
    answer(events)
    answer(elsewhere.send("three"))
    assert stored(elsewhere)[::2] == ["one", "two", "three"]
    events = conversation.send("four")
    next(events)
    monkeypatch.setattr(module, "SILENT", timedelta(0))  # that program was killed
    assert answer(elsewhere.send("five"))
    assert stored(elsewhere)[::2] == ["one", "two", "three", "five"]
    events.close()  # type: ignore[attr-defined]


def test_a_question_asked_in_the_same_moment_follows_too(
    conversation: Conversation, elsewhere: Conversation, store: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    meet(conversation, elsewhere)
    add, late = store.add, list[str]()

    def just_after(*given: Any, **named: Any) -> int:
        if not late:
            late.append(answer(elsewhere.send("theirs")))
        return add(*given, **named)

    monkeypatch.setattr(store, "add", just_after)
    answer(conversation.send("mine"))
    assert stored(conversation) == said(conversation)
    assert said(conversation)[::2] == ["one", "theirs", "mine"]
    assert conversation.trouble() == ""


def test_two_programs_that_begin_a_conversation_by_one_name_share_it(
    conversation: Conversation, elsewhere: Conversation, store: History
) -> None:
    for one in (conversation, elsewhere):
        one.begin_as("ward 3")
    answer(conversation.send("one"))
    answer(elsewhere.send("two"))
    assert said(elsewhere)[::2] == ["one", "two"]
    assert [found.title for found in store.conversations()] == ["ward 3"]
    for one in (conversation, elsewhere):
        one.clear()
        one.rename("ward 3")  # as /save says it: a title, and no name of a session
        answer(one.send("three"))
    assert len(store.conversations()) == 3


def test_where_another_program_went_another_way_both_are_kept(
    conversation: Conversation, elsewhere: Conversation
) -> None:
    meet(conversation, elsewhere)
    answer(elsewhere.retry())
    seen = said(conversation)
    answer(conversation.send("two"))
    assert stored(conversation)[:2] == seen
    assert conversation.versions() == {1: (1, 2)}


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_two_terminals_in_one_conversation_follow_each_other(m1_home: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyte", reason="the terminal emulator is missing: pip install -e .[dev]")
    from tests.screen import Screen

    lend_library(m1_home)
    write_checkpoint(tmp_path / "model", endless=True)
    command = ["chat", str(tmp_path / "model"), "-n", "20", "--session", "ward 3"]
    one, two = (Screen(command, {"M1_HOME": str(m1_home)}) for _ in range(2))
    for screen in (one, two):
        screen.wait_for(r"(?m)^>>>")
        screen.settle()
    one.type("first\r")
    one.wait_for("its limit")
    two.type("second\r")
    two.wait_for("went on elsewhere; the answer follows")
    one.type("/undo\r")
    one.wait_for("Nothing was changed; do that again")
    one.type("third\r")
    one.wait_for("its limit", times=2)
    assert "elsewhere; the answer" not in one.text()  # it was said already
    with History.open() as history:
        (found,) = history.conversations()
        assert [each.content for each in history.path(found.id)][::2] == [
            "first", "second", "third",
        ]  # fmt: skip
    one.close()
    two.close()


def test_an_answer_that_was_coming_when_it_was_opened_is_followed_as_a_whole(
    conversation: Conversation, elsewhere: Conversation
) -> None:
    events = conversation.send("one")
    while not isinstance(next(events), TextDelta):
        pass
    assert conversation.id is not None
    elsewhere.open(conversation.id)
    beginning = said(elsewhere)[1]
    whole = answer(events)
    answer(elsewhere.send("two"))
    assert said(elsewhere)[1].endswith(storable(whole))
    assert len(said(elsewhere)[1]) > len(beginning)
    assert stored(elsewhere) == said(elsewhere)


def test_a_long_prompt_is_no_dead_program(
    conversation: Conversation, store: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    seen = list[datetime]()
    touch = store.touch

    def touched(conversation_id: int) -> None:
        touch(conversation_id)
        seen.append(store.conversation(conversation_id).changed)

    monkeypatch.setattr(store, "touch", touched)
    answer(conversation.send("a question " * 20))
    assert len(seen) > 1
    assert sorted(set(seen)) == sorted(seen)


def test_a_refused_question_leaves_the_system_prompt(
    conversation: Conversation, elsewhere: Conversation
) -> None:
    meet(conversation, elsewhere)
    conversation.set_system("Be brief.")
    events = conversation.send("two")
    next(events)
    before = elsewhere.session.system
    with pytest.raises(M1Error, match="ask again"):
        answer(elsewhere.send("three"))
    assert elsewhere.session.system == before != "Be brief."
    answer(events)
    answer(elsewhere.send("three"))
    assert elsewhere.session.system == "Be brief."
