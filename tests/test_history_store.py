"""The store of conversations: what is kept, in which order, and which path is shown."""

import math
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from m1local.errors import M1Error
from m1local_app.history import History, StoredMessage, database


@pytest.fixture
def store(m1_home: Path) -> Iterator[History]:
    with History.open() as history:
        yield history


def asked(store: History, *texts: str, title: str = "") -> tuple[int, list[int]]:
    """A conversation of `texts`, question and answer in turn; its id and those of the messages."""
    conversation = store.begin(title=title)
    ids: list[int] = []
    for number, text in enumerate(texts):
        parent = ids[-1] if ids else None
        if number % 2:
            ids.append(store.add(conversation, "assistant", text, parent=parent, finish="stop"))
        else:
            ids.append(store.add(conversation, "user", text, parent=parent))
    return conversation, ids


def contents(messages: list[StoredMessage]) -> list[str]:
    return [message.content for message in messages]


def test_a_message_comes_back_as_it_was_given(store: History) -> None:
    conversation = store.begin(system="Be brief.", title="Eyes")
    question = store.add(conversation, "user", "What is 青光眼?\n", parent=None)
    parameters = {"temperature": 0.3, "top_k": None, "stop": ("a", "b"), "seed": 2**62}
    answer = store.add(
        conversation, "assistant", "A disease.", parent=question, parameters=parameters,
        model="demo (int4)", checkpoint="ab12", token_ids=[5, 133119], finish="length",
    )  # fmt: skip
    first, second = store.path(conversation)
    assert (first.id, first.parent, first.role) == (question, None, "user")
    assert (first.content, first.token_ids, first.parameters) == ("What is 青光眼?\n", (), {})
    assert (second.id, second.parent, second.role) == (answer, question, "assistant")
    assert second.parameters == parameters | {"stop": ["a", "b"]}
    assert (second.model, second.checkpoint) == ("demo (int4)", "ab12")
    assert (second.token_ids, second.finish) == ((5, 133119), "length")
    assert second.conversation_id == conversation
    assert abs(datetime.now(UTC) - second.created) < timedelta(minutes=1)
    assert store.conversation(conversation).system == "Be brief."


def test_what_json_and_sqlite_cannot_hold_is_kept_as_text(store: History) -> None:
    conversation, (question,) = asked(store, "half \ud83d and \0 nothing")
    parameters = {"bias": ((3, -math.inf),), "path": Path("x"), "ids": frozenset({2, 1})}
    store.add(conversation, "assistant", "", parent=question, parameters=parameters)
    first, second = store.path(conversation)
    assert first.content == "half ? and \N{REPLACEMENT CHARACTER} nothing"
    assert second.parameters == {"bias": [[3, "-inf"]], "path": "x", "ids": [1, 2]}


def test_a_growing_answer_is_replaced_until_it_is_whole(store: History) -> None:
    conversation, (question,) = asked(store, "q")
    answer = store.add(conversation, "assistant", "", parent=question)
    store.update(answer, content="half", token_ids=[1], finish=None)
    assert (store.path(conversation)[1].content, store.path(conversation)[1].finish) == (
        "half",
        None,
    )
    store.update(answer, content="half and whole", token_ids=[1, 2], finish="stop")
    last = store.path(conversation)[1]
    assert (last.content, last.token_ids, last.finish) == ("half and whole", (1, 2), "stop")


def test_an_edited_question_is_a_version_beside_the_old_one(store: History) -> None:
    conversation, (first, old_answer) = asked(store, "old", "old answer")
    second = store.add(conversation, "user", "new", parent=None)
    assert contents(store.path(conversation)) == ["new"]
    assert [one.id for one in store.versions(second)] == [first, second]
    assert contents(store.versions(old_answer)) == ["old answer"]
    store.show_version(first)
    assert contents(store.path(conversation)) == ["old", "old answer"]
    assert contents(store.messages(conversation)) == ["old", "old answer", "new"]


def test_versions_of_another_conversations_first_question_are_not_mixed_up(store: History) -> None:
    asked(store, "one")
    _, (other,) = asked(store, "two")
    assert contents(store.versions(other)) == ["two"]


def test_showing_a_version_shows_what_was_added_last_below_it(store: History) -> None:
    conversation, (question, first, again) = asked(store, "q", "a1", "q2")
    store.add(conversation, "assistant", "a2", parent=again)
    store.add(conversation, "user", "q2, edited", parent=first)
    second = store.add(conversation, "assistant", "b1", parent=question)
    assert contents(store.path(conversation)) == ["q", "b1"]
    store.show_version(first)
    assert contents(store.path(conversation)) == ["q", "a1", "q2, edited"]
    store.show_version(second)
    assert contents(store.path(conversation)) == ["q", "b1"]


def test_the_head_can_go_back_and_to_nothing(store: History) -> None:
    conversation, (question, *_) = asked(store, "q", "a", "q2")
    store.set_head(conversation, question)
    assert contents(store.path(conversation)) == ["q"]
    assert store.conversation(conversation).messages == 1
    store.set_head(conversation, None)
    assert store.path(conversation) == []
    assert store.conversation(conversation).messages == 0
    assert [one.id for one in store.conversations()] == [conversation]
    assert len(store.messages(conversation)) == 3


def test_a_discarded_question_is_gone_and_what_was_shown_before_is_shown(store: History) -> None:
    conversation, (*_, answer, question) = asked(store, "q", "a", "q2")
    assert not store.discard(answer, head=None)  # something follows
    assert contents(store.path(conversation)) == ["q", "a", "q2"]
    assert store.discard(question, head=answer)
    assert contents(store.path(conversation)) == ["q", "a"]
    assert len(store.messages(conversation)) == 2


def test_discarding_an_edit_shows_the_longer_path_again(store: History) -> None:
    conversation, (*_, last) = asked(store, "q", "a", "q2", "a2")
    edited = store.add(conversation, "user", "other", parent=None)
    assert contents(store.path(conversation)) == ["other"]
    assert store.discard(edited, head=last)
    assert contents(store.path(conversation)) == ["q", "a", "q2", "a2"]


def test_discarding_moves_nobody_from_what_is_shown_by_now(store: History) -> None:
    conversation, (question,) = asked(store, "q")
    store.add(conversation, "user", "another program's", parent=None)
    assert store.discard(question, head=None)
    assert contents(store.path(conversation)) == ["another program's"]


def test_a_conversation_without_messages_is_not_listed(store: History) -> None:
    conversation = store.begin()
    assert store.conversations() == []
    assert store.latest() is None
    store.discard(store.add(conversation, "user", "q", parent=None), head=None)
    assert store.conversations() == []
    assert store.conversation(conversation).messages == 0


def test_a_message_goes_only_after_one_of_its_own_conversation(store: History) -> None:
    one, (message,) = asked(store, "q")
    other = store.begin()
    with pytest.raises(ValueError, match="not of conversation"):
        store.add(other, "assistant", "a", parent=message)
    with pytest.raises(ValueError, match="not of conversation"):
        store.set_head(other, message)
    with pytest.raises(sqlite3.IntegrityError):
        store.add(one, "system", "a", parent=message)  # type: ignore[arg-type]
    assert len(store.messages(one)) == 1


def test_what_is_gone_is_said_to_be_gone(store: History) -> None:
    conversation, (message,) = asked(store, "q")
    store.purge(conversation_id=conversation)
    with pytest.raises(M1Error, match="no longer in the history"):
        store.update(message, content="x", token_ids=(), finish=None)
    with pytest.raises(M1Error, match="no conversation 1"):
        store.add(conversation, "user", "q", parent=None)
    for call in (store.conversation, store.delete, store.restore):
        with pytest.raises(M1Error, match="no conversation 1"):
            call(conversation)
    assert store.begin() == 2, "an id is never used again"


def test_the_title_is_the_first_question_unless_one_was_given(store: History) -> None:
    conversation, _ = asked(store, "  What\nis   glaucoma?\x1b ", "a", "And then?")
    assert store.conversation(conversation).title == "What is glaucoma?\N{REPLACEMENT CHARACTER}"
    chinese, _ = asked(store, "高血压" * 30)
    assert store.conversation(chinese).title == "高血压" * 9 + "高血" + "…"  # 59 columns
    store.rename(chinese, " 高血压\n ")
    assert store.conversation(chinese).title == "高血压"
    store.rename(chinese, "")
    assert store.conversation(chinese).title.endswith("…")


def test_the_latest_is_the_one_changed_last(store: History) -> None:
    first, (message,) = asked(store, "first")
    second, _ = asked(store, "second")
    assert [one.id for one in store.conversations()] == [second, first]
    store.update(message, content="first, changed", token_ids=(), finish=None)
    latest = store.latest()
    assert latest is not None
    assert latest.id == first
    store.rename(second, "a name changes nothing in the order")
    assert [one.id for one in store.conversations()] == [first, second]
    store.set_system(second, "new")
    assert [one.id for one in store.conversations(limit=1)] == [second]
    assert store.conversation(second).system == "new"


def test_the_order_holds_when_the_clock_stands_still(
    store: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m1local_app.history.queries.now", lambda: 0)
    first, (message,) = asked(store, "first")
    second, _ = asked(store, "second")
    store.set_head(first, message)
    assert [one.id for one in store.conversations()] == [first, second]


def test_a_conversation_is_found_by_number_title_or_part_of_it(store: History) -> None:
    eyes, _ = asked(store, "q", title="Eyes")
    asked(store, "q", title="Eyes and ears")
    noses, _ = asked(store, "q", title="About NOSES")
    year, _ = asked(store, "q", title="2024")
    for name, expected in (
        (str(eyes), eyes), ("Eyes", eyes), ("eyes", eyes), ("about", noses), ("nose", noses),
        (" noses ", noses), ("2024", year),
    ):  # fmt: skip
        assert store.find(name, parts=True).id == expected, name
    with pytest.raises(M1Error, match=r"1 \(Eyes\).*number") as raised:
        store.find("eye", parts=True)
    assert "2 (Eyes and ears)" in str(raised.value)
    for name in ("throat", "", "%", "9" * 30):
        with pytest.raises(M1Error, match="No conversation is called"):
            store.find(name)
    with pytest.raises(M1Error, match="no conversation 77"):
        store.find("77")
    for name in ("about", "nose"):
        with pytest.raises(M1Error, match="No conversation is called"):
            store.find(name)


def test_digits_are_never_a_part_of_a_title(store: History) -> None:
    asked(store, "q", title="Mr Lee 57")
    for name in ("57", "7"):
        with pytest.raises(M1Error, match="no conversation"):
            store.find(name, parts=True)


def test_what_is_in_the_bin_is_hidden_until_restored(store: History) -> None:
    conversation, (message,) = asked(store, "glaucoma", title="Eyes")
    store.delete(conversation)
    assert store.conversations() == []
    assert store.search("glaucoma") == []
    assert store.user_texts() == []
    assert [one.id for one in store.conversations(binned=True)] == [conversation]
    with pytest.raises(M1Error, match="m1 history restore 1"):
        store.conversation(conversation)
    with pytest.raises(M1Error, match="m1 history restore 1"):
        store.find("1")
    with pytest.raises(M1Error, match="No conversation is called"):
        store.find("Eyes")
    answer = store.add(conversation, "assistant", "a chat that still runs", parent=message)
    assert store.conversations() == []
    store.add(conversation, "user", "and is gone on with", parent=answer)
    assert [one.id for one in store.conversations()] == [conversation]
    store.delete(conversation)
    store.restore(conversation)
    assert store.conversation(conversation).messages == 3
    assert store.conversations(binned=True) == []


@pytest.mark.parametrize("number", [0, -1, 2**63, 10**30])
def test_a_number_that_no_conversation_can_have(store: History, number: int) -> None:
    with pytest.raises(M1Error, match=f"no conversation {number}"):
        store.conversation(number)


def test_earlier_questions_come_oldest_first_and_the_last_of_them(store: History) -> None:
    asked(store, "1", "a", "2")
    asked(store, "3")
    assert store.user_texts() == ["1", "2", "3"]
    assert store.user_texts(2) == ["2", "3"]


def test_a_long_conversation_is_read_and_deleted_whole(store: History) -> None:
    conversation, _ = asked(store, *(str(number) for number in range(1500)))
    assert contents(store.path(conversation)) == [str(number) for number in range(1500)]
    assert store.conversation(conversation).messages == 1500
    assert store.purge(conversation_id=conversation) == 1


def test_several_threads_write_through_one_history(store: History) -> None:
    errors: list[BaseException] = []

    def write(name: str) -> None:
        try:
            conversation = store.begin(title=name)
            parent = None
            for number in range(25):
                parent = store.add(conversation, "user", f"{name}{number}", parent=parent)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for name in "abcd":
        path = store.path(store.find(name).id)
        assert contents(path) == [f"{name}{number}" for number in range(25)]


def test_an_error_in_the_middle_of_a_change_leaves_nothing_of_it(
    store: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, (question,) = asked(store, "q")

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr("m1local_app.history.queries.show", fail)
        with pytest.raises(RuntimeError):
            store.add(conversation, "assistant", "a", parent=question)
    assert contents(store.messages(conversation)) == ["q"]
    store.add(conversation, "assistant", "b", parent=question)
    assert contents(store.path(conversation)) == ["q", "b"]


def test_an_older_file_is_brought_up_to_date(
    m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.open() as old:
        asked(old, "kept")
    newer = (*database.MIGRATIONS, ("ALTER TABLE conversation ADD COLUMN colour TEXT",))
    monkeypatch.setattr(database, "MIGRATIONS", newer)
    with History.open() as store:
        assert store.user_texts() == ["kept"]
    connection = sqlite3.connect(m1_home / "history.db")
    assert connection.execute("SELECT colour FROM conversation").fetchall() == [(None,)]
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()
