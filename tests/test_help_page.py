"""The help and what is said of a wrong command line: in 80 columns, and in the chosen language."""

import itertools
import re
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from m1local_app.cli import cli
from m1local_app.columns import breaks, width
from m1local_app.help_page import said
from m1local_app.language import choose

TOP = get_command(cli).commands  # type: ignore[attr-defined]
COMMANDS = [(name,) for name in TOP] + [("history", name) for name in TOP["history"].commands]
COMMAND_LINE = re.compile(r"`[^`]*`|root(?: [a-z]+)*")
ENGLISH = re.compile(r"\b[a-z']+,? [a-z]+,? [a-z]+\b|Usage|Options|COMMAND|default:|required")


def shown(*arguments: str, columns: int = 80) -> str:
    result = CliRunner().invoke(cli, [*arguments, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.output


def options(arguments: tuple[str, ...]) -> list[Any]:
    command = get_command(cli)
    for name in arguments:
        command = command.commands[name]  # type: ignore[attr-defined]
    return command.params


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80])
def test_no_option_is_broken_and_its_help_has_half_of_the_line(
    arguments: tuple[str, ...], columns: int
) -> None:
    lines = shown(*arguments, columns=columns).splitlines()
    assert max(map(width, lines)) <= columns
    words = {word.rstrip(",") for line in lines for word in line.split()}
    for option in options(arguments):
        if option.param_type_name == "option":
            assert {*option.opts, *option.secondary_opts} <= words, option
    rows = [line for line in lines if re.match(r"│ -", line)]
    starts = {re.match(r"│ .*?  +", line).end() for line in rows}  # type: ignore[union-attr]
    assert max(starts) <= columns / 2 + 1, rows


@pytest.mark.parametrize("arguments", [(), ("history",), *COMMANDS], ids=" ".join)
def test_the_help_is_chinese_altogether(arguments: tuple[str, ...]) -> None:
    text = shown(*arguments, "--lang", "zh")
    prose = "\n".join(line for line in text.splitlines() if "m1 " not in line)
    assert not ENGLISH.search(COMMAND_LINE.sub("", prose)), text
    assert "用法：" in text
    assert "显示此帮助并退出。" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bench", "-r", "x"), "'--repetitions' / '-r' 的值无效：须为整数。"),
        (("bench", "-r", "0"), "的值无效：不得小于 1。"),
        (("bench", "-o", "x"), "'x' 不在可选值之列："),
        (("benk",), "没有命令 'benk'，是否指 'bench'？"),
        (("bench", "--foo"), "没有选项 --foo。"),
        (("bench", "--repetitins", "3"), "没有选项 --repetitins（可能是：--repetitions）。"),
        (("quantize",), "缺少参数 'source'。"),
        (("eval",), "缺少参数 'measure'，可选：ppl, kld。"),
        (("bench", "-r"), "选项 '-r' 需要一个值"),
        (("quantize", "--overwrite=3"), "选项 '--overwrite' 不带值"),
        (("bench", "a", "b"), "多余的参数：b。"),
        (("history", "purge", "--older-than", "x"), "的值无效：'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_command_line_is_told_in_chinese(arguments: tuple[str, ...], expected: str) -> None:
    result = CliRunner().invoke(cli, [*arguments, "--lang", "zh"])
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not ENGLISH.search(COMMAND_LINE.sub("", result.stderr)), result.stderr
    assert "。。" not in result.stderr


def test_what_typer_says_is_not_changed_in_english_or_where_it_is_not_known() -> None:
    known = "Invalid value for 'N': Input should be less than or equal to 3"
    assert said(known) == known
    choose("zh")
    assert said("Something new") == "Something new"
    assert said("Invalid value for 'N': something new") == "'N' 的值无效：something new"


@pytest.mark.parametrize(
    ("text", "columns", "parts"),
    [
        ("one two three", 8, ["one two ", "three"]),
        ("one two", 7, ["one two"]),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
        ("放得下auto多少", 8, ["放得下", "auto多少"]),
        ("多少，还有（甲）", 6, ["多少，", "还有", "（甲）"]),
        ("一二，", 4, ["一", "二，"]),
        ("", 4, [""]),
    ],
)
def test_a_line_breaks_between_words_and_chinese_characters(
    text: str, columns: int, parts: list[str]
) -> None:
    ends = [0, *breaks(text, columns), len(text)]
    assert [text[start:stop] for start, stop in itertools.pairwise(ends)] == parts


def test_examples_stand_on_a_line_each() -> None:
    lines = [line.strip() for line in shown("quantize").splitlines()]
    first = lines.index("Examples:") + 1
    assert lines[first] == "m1 quantize ./Baichuan-M1-14B-Instruct ./m1-int4 --recipe int4"
    assert lines[first + 1].startswith(
        "m1 quantize ./Baichuan-M1-14B-Instruct ./m1-8gb --recipe fit"
    )
    assert "·" not in shown("quantize", "--lang", "zh")
