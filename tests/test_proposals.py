"""What prompt lookup proposes, and when it stops because that does not pay."""

import random

import pytest

from m1local import lookup
from m1local.lookup import Pace, Proposer


@pytest.mark.parametrize(
    ("tokens", "most", "proposed"),
    [
        ([], 3, []),
        ([5], 3, []),
        ([5, 5], 3, []),  # one token before is too little to go by
        ([5, 5, 5], 3, [5, 5, 5]),
        ([1, 2, 3, 4, 9, 8, 1, 2], 3, [3, 4, 9]),
        ([1, 2, 3, 4, 9, 8, 1, 2], 1, [3]),
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # it goes round
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),  # the latest place
        ([0, 1, 2, 7, 1, 2, 8, 0, 1, 2], 1, [7]),  # where more is the same
        ([9, 0, 1, 2, 7, 5, 0, 1, 2, 8, 9, 0, 1, 2], 1, [7]),
        ([3, 9, 0, 1, 2, 7, 4, 9, 0, 1, 2, 8, 3, 9, 0, 1, 2], 1, [8]),  # four are enough
        ([1, 2, 3, 4, 5, 6], 3, []),
    ],
)
def test_what_followed_before_is_proposed(
    tokens: list[int], most: int, proposed: list[int]
) -> None:
    assert Proposer(tokens).propose(most) == proposed
    grown = Proposer([])
    for token_id in tokens:
        grown.push(token_id)
    assert grown.propose(most) == proposed


def test_a_proposal_is_what_a_plain_search_finds() -> None:
    draw = random.Random(0)
    for _ in range(300):
        tokens = draw.choices(range(draw.randint(1, 4)), k=draw.randint(0, 30))
        expected: list[int] = []
        for length in (2, 3, 4):
            for at in range(len(tokens) - length):
                if tokens[at : at + length] == tokens[-length:]:
                    rest = tokens[at + length :]
                    expected = (rest * 4)[:4]
        assert Proposer(tokens).propose(4) == expected


def passes(pace: Pace, count: int, seconds: float) -> None:
    for _ in range(count):
        pace.passed(seconds)


def test_a_pass_alone_is_measured_first() -> None:
    pace = Pace()
    for _ in range(lookup.ENOUGH):
        assert not pace.pays
        pace.passed(1)
    assert pace.pays


def test_proposals_go_on_while_they_pay() -> None:
    pace = Pace()
    passes(pace, lookup.ENOUGH, 1)
    for gained in (2, 1, 3, 1, 2, 2) * 5:
        assert pace.pays
        pace.proposed(gained, 1.5)


def test_where_they_do_not_pay_they_rest_and_are_tried_again_ever_later() -> None:
    pace, rests = Pace(), list[int]()
    passes(pace, lookup.ENOUGH, 1)
    for _ in range(8):
        while pace.pays:
            pace.proposed(1, 1.2)
        rest = 0
        while not pace.pays:
            pace.passed(1)
            rest += 1
        rests.append(rest)
    assert rests == [16, 32, 64, 128, 256, 256, 256, 256]
    for _ in range(10):
        assert pace.pays
        pace.proposed(3, 1.2)
    while pace.pays:
        pace.proposed(1, 9)
    passes(pace, lookup.FIRST_PAUSE, 1)
    assert pace.pays, "after it paid once more, the first rest is a short one"


def test_one_pass_that_took_long_decides_nothing() -> None:
    pace = Pace()
    passes(pace, lookup.ENOUGH + 2, 1)
    pace.passed(500)
    for _ in range(10):
        pace.proposed(1, 2)
    assert not pace.pays
