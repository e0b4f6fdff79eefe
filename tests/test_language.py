"""The language of the front ends: how it is chosen, and that nothing said is missing in Chinese."""

import ast
import string

import pytest

from m1local_app.chinese import CATALOGUE
from m1local_app.language import choose, language, preferred, tr
from tests.conftest import ROOT

APP = ROOT / "app/m1local_app"


def said() -> set[str]:
    """Every text given to tr() in the application's sources."""
    texts: set[str] = set()
    for path in APP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tr":
                assert isinstance(node.args[0], ast.Constant), f"{path}: {ast.unparse(node)}"
                texts.add(str(node.args[0].value))
    return texts


def fields(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def test_every_text_is_there_in_chinese_and_none_is_left_over() -> None:
    assert said() - CATALOGUE.keys() == set()
    assert CATALOGUE.keys() - said() == set()


def test_both_languages_fill_in_the_same_names() -> None:
    for english, chinese in CATALOGUE.items():
        assert fields(english) == fields(chinese), english


@pytest.fixture
def chinese() -> None:
    choose("zh")


def test_a_text_is_said_in_the_chosen_language_and_filled_in(
    chinese: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "{n} words", "{n} 个词")
    assert tr("{n} words", n=3) == "3 个词"
    choose("en")
    assert tr("{n} words", n=3) == "3 words"
    assert language() == "en"
    with pytest.raises(ValueError, match="none of"):
        choose("fr")


@pytest.mark.parametrize(
    ("arguments", "environment", "system", "expected"),
    [
        (["chat", "--lang", "zh"], {"LANG": "en_US.UTF-8"}, "en_US", "zh"),
        (["--lang=en", "chat"], {"LANG": "zh_CN.UTF-8"}, "zh_CN", "en"),
        (["--lang", "fr"], {"LANG": "zh_CN.UTF-8"}, None, "zh"),
        (["--lang"], {}, None, "en"),
        ([], {"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "zh_CN", "en"),
        ([], {"LC_ALL": "", "LANG": "zh_TW"}, "en_US", "zh"),
        ([], {}, "Chinese (Simplified)_China", "zh"),
        ([], {}, "de_DE", "en"),
    ],
)
def test_the_flag_comes_before_the_environment_before_the_system(
    arguments: list[str], environment: dict[str, str], system: str | None, expected: str
) -> None:
    assert preferred(arguments, environment, system) == expected
