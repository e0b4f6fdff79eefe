"""A conversation and what the store keeps of it: always the same path, and nothing is lost."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from m1local.chat import ChatSession
from m1local.engine import Engine
from m1local.errors import ContextLengthError, M1Error, StorageError
from m1local.generate import Event, TextDelta
from m1local_app import conversation as module
from m1local_app.conversation import CANCELLED, Conversation
from m1local_app.history import History
from m1local_app.history.records import storable

CHECKPOINT = "c" * 64


def begin(engine: Engine, store: History | None, checkpoint: str = CHECKPOINT) -> Conversation:
    session = ChatSession(engine, settings=engine.settings(max_new_tokens=12, temperature=2.0))
    return Conversation(session, store, label="tiny", checkpoint=checkpoint)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[History]:
    with History.open(tmp_path / "history.db") as opened:
        yield opened


@pytest.fixture
def conversation(engine: Engine, store: History) -> Conversation:
    return begin(engine, store)


def answer(events: Iterator[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def stored(conversation: Conversation) -> list[str]:
    assert conversation.store is not None
    assert conversation.id is not None
    return [message.content for message in conversation.store.path(conversation.id)]


def said(conversation: Conversation) -> list[str]:
    """As it can be stored: random weights say a NUL now and then."""
    return [storable(message.content) for message in conversation.session.messages]


def test_what_is_said_is_stored_with_how_it_was_made(
    conversation: Conversation, store: History
) -> None:
    text = answer(conversation.send("hello"))
    assert conversation.id is not None
    question, reply = store.path(conversation.id)
    assert (question.role, question.content) == ("user", "hello")
    assert (reply.content, reply.model, reply.checkpoint) == (storable(text), "tiny", CHECKPOINT)
    assert reply.finish == "length"
    assert reply.parameters["temperature"] == 2.0
    assert reply.parameters["max_new_tokens"] == 12
    assert isinstance(reply.parameters["seed"], int)
    assert reply.token_ids == tuple(conversation.session.turns[-1].token_ids)


def test_going_back_keeps_every_version(conversation: Conversation, store: History) -> None:
    answer(conversation.send("one"))
    answer(conversation.send("two"))
    answer(conversation.retry())
    assert stored(conversation) == said(conversation)
    answer(conversation.edit(0, "other"))
    assert stored(conversation) == said(conversation)
    assert said(conversation)[0] == "other"
    conversation.undo()
    assert stored(conversation) == said(conversation) == []
    answer(conversation.send("three"))
    assert stored(conversation) == said(conversation)
    assert conversation.id is not None
    texts = [message.content for message in store.messages(conversation.id)]
    assert {"one", "two", "other", "three"} <= set(texts)
    assert len(texts) == 9
    assert len(store.conversations()) == 1


def test_an_abandoned_answer_is_kept_as_far_as_it_came(
    conversation: Conversation, store: History
) -> None:
    events = conversation.send("hello")
    text = ""
    while not text:
        event = next(events)
        text += event.text if isinstance(event, TextDelta) else ""
    events.close()  # type: ignore[attr-defined]
    assert conversation.id is not None
    assert stored(conversation) == said(conversation) == ["hello", storable(text)]
    assert store.path(conversation.id)[-1].finish == CANCELLED
    answer(conversation.send("again"))
    assert stored(conversation) == said(conversation)


def test_a_question_without_any_answer_is_taken_back(
    conversation: Conversation, store: History
) -> None:
    answer(conversation.send("one"))
    before = said(conversation)
    events = conversation.send("two")
    list(islice(events, 1))
    events.close()  # type: ignore[attr-defined]
    assert stored(conversation) == said(conversation) == before
    with pytest.raises(ContextLengthError):
        answer(conversation.send("far too long " * 500))
    assert stored(conversation) == said(conversation) == before
    assert store.user_texts() == ["one"]


@pytest.mark.parametrize("turn", [0, 2])
def test_an_edit_without_any_answer_leaves_the_shown_path(
    conversation: Conversation, store: History, turn: int
) -> None:
    for question in ("one", "two", "three"):
        answer(conversation.send(question))
    before = said(conversation)
    events = conversation.edit(turn, "other")
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert stored(conversation) == said(conversation) == before
    answer(conversation.send("four"))
    assert stored(conversation) == said(conversation)


@pytest.mark.parametrize("broken", ["add", "update", "discard"])
def test_a_store_that_fails_is_said_once_and_the_answer_goes_on(
    conversation: Conversation, store: History, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    answer(conversation.send("one"))

    def fail(*_: object, **__: object) -> int:
        raise StorageError("The disk is full.")

    monkeypatch.setattr(store, broken, fail)
    for question in ("two", "three"):
        events = conversation.send(question)
        if broken == "discard":
            next(events)
            events.close()  # type: ignore[attr-defined]
        else:
            assert answer(events)
    trouble = conversation.trouble()
    assert "not kept any more: The disk is full." in trouble
    assert conversation.trouble() == ""
    assert len(said(conversation)) == (2 if broken == "discard" else 6)
    monkeypatch.undo()
    answer(conversation.retry())
    conversation.undo()
    conversation.set_system("x")
    conversation.clear()
    answer(conversation.send("four"))
    assert stored(conversation) == said(conversation)


def test_a_conversation_purged_by_another_process_goes_on_unkept(
    conversation: Conversation, store: History
) -> None:
    answer(conversation.send("one"))
    assert conversation.id is not None
    store.purge(conversation_id=conversation.id)
    assert answer(conversation.send("two"))
    assert "not kept any more" in conversation.trouble()
    assert len(said(conversation)) == 4


def test_each_answer_says_under_which_system_prompt_it_was_made(
    conversation: Conversation, store: History
) -> None:
    conversation.set_system("You are a vet.")
    answer(conversation.send("one"))
    conversation.set_system("You are a pirate.")
    answer(conversation.send("two"))
    assert conversation.id is not None
    answers = [one for one in store.path(conversation.id) if one.role == "assistant"]
    prompts = [one.parameters["system"] for one in answers]
    assert prompts == ["You are a vet.", "You are a pirate."]


def test_an_answer_is_written_while_it_comes(
    conversation: Conversation, store: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    text = ""
    for event in conversation.send("hello"):
        if isinstance(event, TextDelta):
            text += event.text
            assert stored(conversation)[-1] == text
            assert conversation.id is not None
            assert store.path(conversation.id)[-1].finish is None


def test_it_goes_on_with_the_same_tokens(
    engine: Engine, conversation: Conversation, store: History
) -> None:
    conversation.set_system("be kind")
    answer(conversation.send("hello"))
    conversation.rename("greeting")
    assert conversation.id is not None
    again = begin(engine, store)
    assert again.open(conversation.id) == ""
    assert again.session.turns[1].token_ids == conversation.session.turns[1].token_ids
    assert (again.session.system, again.title) == ("be kind", "greeting")
    answer(again.send("more"))
    assert stored(again) == said(again)
    other = begin(engine, store, checkpoint="d" * 64)  # whose tokens may mean something else
    other.open(conversation.id)
    assert all(not turn.token_ids for turn in other.session.turns)


def test_a_question_whose_answer_never_began_is_asked_again(
    engine: Engine, conversation: Conversation, store: History
) -> None:
    answer(conversation.send("one"))
    assert conversation.id is not None
    store.add(conversation.id, "user", "two", parent=store.path(conversation.id)[-1].id)
    again = begin(engine, store)
    assert again.open(conversation.id) == "two"
    assert len(again.session.turns) == 2
    answer(again.send("two"))
    assert stored(again) == said(again)


def test_the_system_prompt_changes_in_the_store_too(
    conversation: Conversation, store: History
) -> None:
    answer(conversation.send("hello"))
    conversation.set_system("be short")
    assert conversation.id is not None
    assert store.conversation(conversation.id).system == "be short"


def test_clear_begins_another(conversation: Conversation, store: History) -> None:
    conversation.rename("first")
    answer(conversation.send("one"))
    conversation.clear()
    assert conversation.title == ""
    answer(conversation.send("two"))
    assert [found.title for found in store.conversations()] == ["two", "first"]


def test_without_a_store_all_is_the_same(engine: Engine) -> None:
    conversation = begin(engine, None)
    conversation.rename("nowhere")
    answer(conversation.send("one"))
    answer(conversation.retry())
    conversation.set_system("x")
    assert conversation.undo() == "one"
    assert conversation.title == "nowhere"
    with pytest.raises(M1Error, match="--no-history"):
        conversation.open(1)


def test_versions_are_counted_and_flipped(conversation: Conversation, store: History) -> None:
    answer(conversation.send("one"))
    assert conversation.versions() == {}
    answer(conversation.retry())
    second = said(conversation)
    assert conversation.versions() == {1: (2, 2)}
    assert conversation.flip(1, -1) == ""
    assert conversation.versions() == {1: (1, 2)}
    assert said(conversation)[0] == "one"
    assert stored(conversation) == said(conversation)
    answer(conversation.send("two"))
    conversation.flip(1, 1)
    assert said(conversation) == second
    conversation.flip(1, 1)  # at the end nothing happens
    assert said(conversation) == second
    conversation.flip(1, -1)
    assert len(said(conversation)) == 4  # with what followed
    answer(conversation.edit(0, "other"))
    assert conversation.versions() == {0: (2, 2)}
    conversation.flip(0, -1)
    assert said(conversation)[0] == "one"
    answer(conversation.send("three"))
    assert stored(conversation) == said(conversation)
    assert conversation.flip(9, 1) == ""
