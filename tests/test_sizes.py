"""Sizes as they are written on the command line."""

from pathlib import Path

import pytest
import typer

from m1local_app import options


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7GiB", 7 << 30), ("8GB", 8 * 10**9), ("8g", 8 * 10**9), ("1.5 MiB", 3 << 19), ("900B", 900)],
)
def test_sizes_are_read_as_they_are_written(text: str, expected: int) -> None:
    assert options.parse_size(text) == expected


@pytest.mark.parametrize("text", ["9" * 400 + "B", "", "8", "GB", "-1GB", "7XB", "7 GiB of memory"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"is (no size; write|more than any)"):
        options.parse_size(text)


def test_a_speed_is_above_nothing() -> None:
    assert options.parse_speed("360GB/s") == 360 * 10**9
    with pytest.raises(typer.BadParameter, match="is no speed"):
        options.parse_speed("0GB/s")


def test_a_path_is_given_as_a_shell_takes_it() -> None:
    assert options.quoted(Path("a b")) in ("'a b'", '"a b"')
    assert options.quoted(Path("ab")) == "ab"
