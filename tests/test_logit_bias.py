"""`--logit-bias` as it is written on the command line."""

import math

import pytest

from m1local.errors import SamplingError
from m1local_app.chat_options import parse_bias


@pytest.mark.parametrize(
    ("text", "expected"),
    [("15043+1.5", (15043, 1.5)), ("7-2", (7, -2.0)), ("15043-inf", (15043, -math.inf))],
)
def test_a_token_and_its_bias(text: str, expected: tuple[int, float]) -> None:
    assert parse_bias(text) == expected


@pytest.mark.parametrize("text", ["15043", "7", "", "+1", "a+1", "7+", "7+b"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(SamplingError, match="write TOKEN"):
        parse_bias(text)
