"""The language of what the front ends say: English or Chinese.

What it is: `tr`, which looks an English text up in the Chinese catalogue (chinese.py) and fills in
its {names}; and the choice of the language: --lang, else what the system is set to. What it is not:
gettext with its compiled files, since two languages and one catalogue need none; and not for the
model's answers, which follow the question. A text that is missing in the catalogue stays English;
tests/test_language.py finds every such text.
"""

import locale
import os
import sys
from collections.abc import Mapping, Sequence

from m1local_app.chinese import CATALOGUE

LANGUAGES = ("en", "zh")
OPTION = "--lang"

_chosen = ["en"]  # one for the whole process, as a locale is


def tr(text: str, /, **values: object) -> str:
    """`text` in the chosen language, with `values` in the places of its {names}."""
    if _chosen[0] == "zh":
        text = CATALOGUE.get(text, text)
    return text.format(**values) if values else text


def language() -> str:
    """The chosen language: "en" or "zh"."""
    return _chosen[0]


def choose(name: str) -> None:
    """Speak `name`, "en" or "zh", from now on."""
    if name not in LANGUAGES:
        raise ValueError(f"{name!r} is none of {LANGUAGES}")
    _chosen[0] = name


def preferred(arguments: Sequence[str], environment: Mapping[str, str], system: str | None) -> str:
    """The language that --lang among `arguments` names, else the environment, else the system's.

    Looked up before the command line is parsed, because its help texts are in that language.
    """
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == OPTION:
            value = value or "".join(arguments[at + 1 : at + 2])
            if value in LANGUAGES:
                return value
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if environment.get(name):
            return "zh" if environment[name].lower().startswith("zh") else "en"
    return "zh" if (system or "").lower().startswith(("zh", "chinese")) else "en"


def choose_preferred() -> None:
    """Speak the language this process was started for."""
    choose(preferred(sys.argv[1:], os.environ, locale.getlocale()[0]))
