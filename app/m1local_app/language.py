"""The language of what the front ends say: English or Chinese.

What it is: `tr`, which looks an English text up in the Chinese catalogue, chinese.toml, and fills
in its {names}; and the choice of the language: --lang, else what the system is set to. What it is
not: gettext with its compiled files, since two languages and one catalogue need none; and not for
the model's answers, which follow the question, or for the errors of the library, which stay
English. tests/test_language.py finds every text that is missing in the catalogue.
"""

import contextlib
import functools
import locale
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

LANGUAGES = ("en", "zh")
OPTION = "--lang"

_chosen = ["en"]  # one for the whole process, as a locale is
_here: ContextVar[str | None] = ContextVar("language", default=None)  # or of one page of several


def tr(text: str, /, **values: object) -> str:
    """`text` in the chosen language, with `values` in the places of its {names}."""
    if language() == "zh":
        text = catalogue().get(text, text)
    return text.format(**values) if values else text


@functools.cache
def catalogue() -> dict[str, str]:
    """The Chinese of every text, by its English."""
    return tomllib.loads(Path(__file__).with_name("chinese.toml").read_text(encoding="utf-8"))


def marked(text: str) -> str:
    """`text` as it is: one that is given to `tr` later, so the catalogue must have it."""
    return text


def series(items: Iterable[str]) -> str:
    """`items` one after the other, as the chosen language separates them."""
    return tr(", ").join(items)


def language() -> str:
    """The chosen language: "en" or "zh"."""
    return _here.get() or _chosen[0]


@contextlib.contextmanager
def speaking(name: str) -> Iterator[None]:
    """Speak `name` within the `with`, in this thread only; not around a `yield`."""
    token = _here.set(name)
    try:
        yield
    finally:
        _here.reset(token)


def choose(name: str) -> None:
    """Speak `name`, "en" or "zh", from now on."""
    if name not in LANGUAGES:
        raise ValueError(f"{name!r} is none of {LANGUAGES}")
    _chosen[0] = name


def take_option(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --lang among `arguments`, wherever it stands, and the others.

    Taken out before the command line is parsed, because its help is in that language.
    """
    chosen: str | None = None
    rest: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if argument == "--":  # what follows is no option
            return chosen, [*rest, argument, *given]
        if name == OPTION:
            chosen = value if equals else next(given, "")
        else:
            rest.append(argument)
    return chosen, rest


def of_system(environment: Mapping[str, str], system: str | None) -> str:
    """The language the environment asks for, else the one the system is set to."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if environment.get(name):
            return "zh" if environment[name].lower().startswith("zh") else "en"
    return "zh" if (system or "").lower().startswith(("zh", "chinese")) else "en"


def choose_of_system() -> None:
    """Speak the language of this machine."""
    choose(of_system(os.environ, locale.getlocale()[0]))
