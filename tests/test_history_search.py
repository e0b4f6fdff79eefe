"""Search in the history: Chinese, short words, several words, and nothing typed is ever syntax."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from m1local_app.history import History

TEXTS = (
    "What is glaucoma? Glaucoma is a disease of the eye.",
    "高血压是一种常见的慢性病。",
    "糖尿病患者的血糖控制",
    "The ECG shows 100% of nothing_special; Éclair.",
    'He said "stop NEAR(me)" AND left* (now) -fast ^x {a b}: c+d',
)


@pytest.fixture
def store(m1_home: Path) -> Iterator[History]:
    with History.open() as history:
        for text in TEXTS:
            history.add(history.begin(), "user", text, parent=None)
        yield history


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("glaucoma", [0]),
        ("GLAUCOMA", [0]),
        ("aucom", [0]),
        ("eye glaucoma", [0]),
        ("eye diabetes", []),
        ("血压", [1]),
        ("高血压", [1]),
        ("血", [2, 1]),
        ("血 糖尿病", [2]),
        ("血　慢性", [1]),  # an ideographic space
        ("病", [2, 1]),
        ("ec", [3]),
        ("EC", [3]),
        ("ÉC", [3]),
        ("EC is", []),
        ("éc", [3]),
        ("ÉCLAIR", [3]),
        ("100%", [3]),
        ("0%", [3]),
        ("%", [3]),
        ("_", [3]),
        ("nothing_", [3]),
        ("", []),
        (" \n\0\t", []),
        ("eye\0glaucoma", [0]),
    ],
)
def test_all_words_must_be_in_a_message(store: History, words: str, found: list[int]) -> None:
    assert [hit.message.content for hit in store.search(words)] == [TEXTS[i] for i in found]


@pytest.mark.parametrize(
    "words",
    [
        '"stop', '"', '""', 'me)"', "NEAR(me)", "left*", "AND", "(now)", "-fast", "^x", "{a", "b}:",
        "c+d", "content : stop", "'", ";", "\\",
    ],
)  # fmt: skip
def test_nothing_typed_is_syntax(store: History, words: str) -> None:
    expected = [
        text
        for text in reversed(TEXTS)
        if all(word.casefold() in text.casefold() for word in words.split())
    ]
    assert [hit.message.content for hit in store.search(words)] == expected


@pytest.mark.parametrize("length", [2, 3])
def test_a_whole_text_is_looked_for_without_an_error(store: History, length: int) -> None:
    words = " ".join(f"{number:0{length}d}"[-length:] for number in range(10**length)) * 3
    assert store.search(words + " word" * 3000) == []


@pytest.mark.parametrize("word", ["血", "glau"])
def test_a_hit_names_its_conversation_and_the_newest_come_first(store: History, word: str) -> None:
    conversation = store.begin(title="Later")
    first = store.add(conversation, "user", "血 glaucoma 1", parent=None)
    store.add(conversation, "assistant", "血 glaucoma 2", parent=first, finish="stop")
    hits = store.search(word, limit=2)
    assert [hit.message.content for hit in hits] == ["血 glaucoma 2", "血 glaucoma 1"]
    assert [hit.conversation.title for hit in hits] == ["Later", "Later"]
    assert hits[0].conversation == store.conversation(conversation)
    assert len(store.search(word)) > 2


@pytest.mark.parametrize("words", [("xy", "ab"), ("oldword", "newword")])
def test_an_updated_answer_is_found_by_its_new_words_only(
    store: History, words: tuple[str, str]
) -> None:
    old, new = words
    answer = store.add(store.begin(), "assistant", old, parent=None)
    assert len(store.search(old)) == 1
    store.update(answer, content=new, token_ids=(), finish=None)
    assert store.search(old) == []
    assert [hit.message.id for hit in store.search(new)] == [answer]
    store.discard(answer, head=None)
    assert store.search(new) == []


def test_versions_that_are_not_shown_are_found_too(store: History) -> None:
    conversation = store.begin()
    store.add(conversation, "user", "first version", parent=None)
    store.add(conversation, "user", "second version", parent=None)
    assert len(store.search("version")) == 2


def test_what_is_purged_is_not_found_and_the_rest_still_is(store: History) -> None:
    store.delete(store.search("glaucoma")[0].conversation.id)
    assert store.purge() == 1
    assert store.search("glaucoma") == []
    assert len(store.search("高血压")) == 1
    assert len(store.search("血")) == 2
