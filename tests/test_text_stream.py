"""Stop strings: cut exactly where they begin, and nothing held back that is certain to be shown.

The fuzzed cases are compared with an answer that looks at the whole text after every token.
"""

import random
from collections.abc import Sequence

import pytest

from m1local.text_stream import TextStream
from m1local.tokenizer import IncrementalDecoder

CASES = 5000


def stream_of(pieces: Sequence[bytes], stop: Sequence[str]) -> TextStream:
    """A stream whose token number i has the bytes pieces[i]."""
    return TextStream(IncrementalDecoder(pieces), stop)


def released(pieces: Sequence[str], stop: Sequence[str]) -> list[str]:
    """What each token releases, and last what the end does."""
    stream = stream_of([piece.encode() for piece in pieces], stop)
    return [*(stream.push(i) for i in range(len(pieces))), stream.flush()]


def by_brute_force(pieces: Sequence[str], stop: Sequence[str]) -> list[str]:
    """The same, looking at the whole text after every token."""
    whole, done = "", 0
    shown: list[str] = []
    for number, piece in enumerate(pieces):
        whole += piece
        starts = [at for at in range(len(whole)) if any(whole.startswith(s, at) for s in stop)]
        if starts:
            return [*shown, whole[done : starts[0]], *[""] * (len(pieces) - number)]
        # Certain is what comes before the longest end that may still become a stop string.
        open_ends = [at for at in range(len(whole)) if any(s.startswith(whole[at:]) for s in stop)]
        certain = min(open_ends, default=len(whole))
        shown.append(whole[done:certain])
        done = certain
    return [*shown, whole[done:]]


def random_case(rng: random.Random) -> tuple[list[str], list[str]]:
    """Text of two or three letters, so that stop strings nearly happen all the time."""
    letters = rng.choice(["ab", "ab", "a血b", "🩺a"])
    pieces = ["".join(rng.choices(letters, k=rng.randint(0, 4))) for _ in range(rng.randint(0, 8))]
    stop = ["".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(rng.randint(0, 4))]
    return pieces, stop


def test_random_texts_and_stop_strings_are_cut_as_by_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(CASES):
        pieces, stop = random_case(rng)
        assert released(pieces, stop) == by_brute_force(pieces, stop), (pieces, stop)


def test_one_stop_string_cuts_the_same_however_the_tokens_fall() -> None:
    rng = random.Random(2)
    for _ in range(CASES):
        text = "".join(rng.choices("ab🩺", k=rng.randint(0, 14)))
        stop = "".join(rng.choices("ab🩺", k=rng.randint(1, 4)))
        whole = text.encode()
        cuts = sorted(rng.choices(range(len(whole) + 1), k=rng.randint(0, 5)))  # inside 🩺, too
        pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        stream = stream_of(pieces, [stop])
        shown = "".join(stream.push(i) for i in range(len(pieces))) + stream.flush()
        assert shown == text.partition(stop)[0], (pieces, stop)
        assert stream.stopped == (stop in text)


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["a", "a", "a", "b", "c"], ["aab"], ["", "", "a", "", "", ""]),
        (["aaab"], ["aab"], ["a", ""]),
        (["Hel", "lo\n", "\nUs", "er: hi"], ["\n\nUser:"], ["Hel", "lo", "", "", ""]),
        (["Hel", "lo\n", "\nUs", "ed up"], ["\n\nUser:"], ["Hel", "lo", "", "\n\nUsed up", ""]),
        (["ab", "cd"], ["bcx", "cd"], ["a", "b", ""]),
        (["abcd"], ["bcd", "abc"], ["", ""]),
        (["x", "y"], [], ["x", "y", ""]),
        (["x", "y"], [""], ["x", "y", ""]),
        (["血", "压"], ["压"], ["血", "", ""]),
        (["a", "sto"], ["stop"], ["a", "", "sto"]),
        ([], ["stop"], [""]),
    ],
    ids=[
        "a stop string that begins anew inside itself",
        "the same in one token",
        "across three tokens",
        "a stop string that does not come after all",
        "two that overlap",
        "two in one token, the first in the text counts",
        "none",
        "an empty one is none",
        "Chinese",
        "an end that nearly was one",
        "no token",
    ],
)
def test_a_text_is_released_like_this(
    pieces: list[str], stop: list[str], expected: list[str]
) -> None:
    assert released(pieces, stop) == expected


def test_only_what_may_become_the_stop_string_is_held_back() -> None:
    stream = stream_of([b"No question", b"?", b" No", b" a"], [" No answer"])
    assert stream.push(0) == "No question"
    assert stream.push(1) == "?"
    assert stream.push(2) == ""
    assert stream.push(3) == ""
    assert stream.push(0) == " No aNo question"


def test_after_a_stop_string_nothing_more_is_shown() -> None:
    stream = stream_of([b"stop", b"more"], ["stop"])
    assert not stream.stopped
    assert stream.push(0) == ""
    assert stream.stopped
    assert stream.push(1) == ""
    assert stream.flush() == ""


def test_the_end_of_the_text_releases_what_was_held_back() -> None:
    stream = stream_of([b"almost st"], ["stop"])
    assert stream.push(0) == "almost "
    assert stream.flush() == "st"
    assert stream.flush() == ""
    assert not stream.stopped


def test_a_character_cut_off_at_the_end_is_replaced() -> None:
    stream = stream_of(["a🩺".encode()[:-1]], ["stop"])
    assert stream.push(0) == "a"
    assert stream.flush() == "\ufffd"


def test_a_character_cut_off_at_the_end_may_complete_a_stop_string() -> None:
    stream = stream_of(["a🩺".encode()[:-1]], ["a\ufffd"])
    assert stream.push(0) == ""
    assert stream.flush() == ""
    assert stream.stopped


def test_characters_split_over_tokens_are_found_in_a_stop_string() -> None:
    first, second = "血压".encode()[:4], "血压".encode()[4:]
    stream = stream_of([b"x" + first, second], ["血压"])
    assert stream.push(0) == "x"
    assert stream.push(1) == ""
    assert stream.stopped
