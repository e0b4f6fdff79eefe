"""The language of the front ends: how it is chosen, and that nothing said is missing in Chinese."""

import ast
import string
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from m1local_app.cli import cli
from m1local_app.language import catalogue, choose, language, of_system, take_option, tr
from tests.conftest import ROOT

APP = ROOT / "app/m1local_app"
LATER = (  # say help texts, and texts that were marked
    "help_page.py",
    "doctor.py",
    "slash.py",
    "red_flags.py",
    "forms.py",
    "parts.py",
    "serving.py",
    "timings.py",
)


def said() -> set[str]:
    """Every text given to tr() or marked() in the application's sources."""
    texts: set[str] = set()
    for path in APP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tr", "marked"):
                constant = isinstance(node.args[0], ast.Constant)
                assert constant or path.name in LATER, f"{path}: {ast.unparse(node)}"
                texts |= {str(node.args[0].value)} if constant else set()  # type: ignore[attr-defined]
    return texts


def help_texts(command: Any) -> Iterator[str]:
    """Every help text of a command, its options and the commands below it."""
    for shown in (command, *command.params):
        for attribute in ("help", "short_help", "epilog", "rich_help_panel"):
            text = getattr(shown, attribute, None)
            if isinstance(text, str) and text:
                yield text
    for below in getattr(command, "commands", {}).values():
        yield from help_texts(below)


def fields(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def test_every_text_is_there_in_chinese_and_none_is_left_over() -> None:
    texts = said() | set(help_texts(get_command(cli)))
    assert texts - catalogue().keys() == set()
    assert catalogue().keys() - texts == set()


def test_both_languages_fill_in_the_same_names() -> None:
    for english, chinese in catalogue().items():
        assert fields(english) == fields(chinese), english


@pytest.fixture
def chinese() -> None:
    choose("zh")


def test_a_text_is_said_in_the_chosen_language_and_filled_in(
    chinese: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalogue(), "{n} words", "{n} 个词")
    assert tr("{n} words", n=3) == "3 个词"
    choose("en")
    assert tr("{n} words", n=3) == "3 words"
    assert language() == "en"
    with pytest.raises(ValueError, match="none of"):
        choose("fr")


@pytest.mark.parametrize(
    ("arguments", "expected", "rest"),
    [
        (["chat", "--lang", "zh", "-p", "x"], "zh", ["chat", "-p", "x"]),
        (["--lang=en", "chat"], "en", ["chat"]),
        (["chat", "--lang", "fr"], "fr", ["chat"]),
        (["chat", "--lang"], "", ["chat"]),
        (["chat", "--", "--lang", "zh"], None, ["chat", "--", "--lang", "zh"]),
        (["chat"], None, ["chat"]),
    ],
)
def test_the_option_is_taken_from_wherever_it_stands(
    arguments: list[str], expected: str | None, rest: list[str]
) -> None:
    assert take_option(arguments) == (expected, rest)


@pytest.mark.parametrize(
    ("environment", "system", "expected"),
    [
        ({"LANG": "en_US.UTF-8"}, "zh_CN", "en"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "zh_CN", "en"),
        ({"LC_ALL": "", "LANG": "zh_TW"}, "en_US", "zh"),
        ({}, "Chinese (Simplified)_China", "zh"),
        ({}, "de_DE", "en"),
        ({}, None, "en"),
    ],
)
def test_the_environment_comes_before_the_system(
    environment: dict[str, str], system: str | None, expected: str
) -> None:
    assert of_system(environment, system) == expected


def test_help_and_errors_are_in_the_chosen_language() -> None:
    runner = CliRunner()
    assert "医学" in runner.invoke(cli, ["--lang", "zh", "--help"]).output
    shown = runner.invoke(cli, ["chat", "--lang=zh", "--help"]).output
    assert "对话" in shown
    assert "…" not in shown  # Typer cuts lines without spaces off
    refused = runner.invoke(cli, ["chat", "--lang", "zh", "--temp", "-1"])
    assert refused.stderr.startswith("错误：")
    wrong = runner.invoke(cli, ["chat", "--lang", "fr"])
    assert wrong.exit_code == 2
    assert "must be en or zh" in wrong.stderr
