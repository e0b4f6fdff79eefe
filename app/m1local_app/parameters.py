"""The parameters of an answer by name, as `/set` and `/show parameters` know them.

What it is: text to a value of the settings and back. What it is not: their ranges, which
m1local.sampling checks, or the command line's options.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from m1local.errors import M1Error
from m1local_app.language import tr

if TYPE_CHECKING:
    from m1local.generate import GenerationSettings

Parse = Callable[[str], object]


def _switch(text: str) -> bool:
    return {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}[text]


def _maybe(parse: Parse) -> Parse:
    return lambda text: None if text in ("none", "off") else parse(text)


# By llama.cpp's flag: the attribute, how its text is read, and whether it belongs to sampling.
NAMES: Mapping[str, tuple[str, Parse, bool]] = {
    "temp": ("temperature", float, True),
    "top-k": ("top_k", _maybe(int), True),
    "top-p": ("top_p", float, True),
    "min-p": ("min_p", float, True),
    "repeat-penalty": ("repetition_penalty", float, True),
    "repeat-last-n": ("repeat_last_n", int, True),
    "presence-penalty": ("presence_penalty", float, True),
    "frequency-penalty": ("frequency_penalty", float, True),
    "dry-multiplier": ("dry_multiplier", float, True),
    "dry-base": ("dry_base", float, True),
    "dry-allowed-length": ("dry_allowed_length", int, True),
    "dry-penalty-last-n": ("dry_penalty_last_n", int, True),
    "seed": ("seed", _maybe(int), True),
    "predict": ("max_new_tokens", int, False),
    "loop-guard": ("loop_guard", _switch, False),
    "lookup": ("lookup", _switch, False),
    "stop": ("stop", lambda text: () if text == "none" else (text,), False),
}
ALIASES = {
    "temperature": "temp",
    "num-predict": "predict",
    "max-tokens": "predict",
    "repetition-penalty": "repeat-penalty",
    "reverse-prompt": "stop",
}


def changed(settings: "GenerationSettings", name: str, value: str) -> "GenerationSettings":
    """`settings` with one parameter read from text; raises M1Error for a wrong name or value."""
    flag = name.lower().replace("_", "-").removeprefix("--")
    flag = ALIASES.get(flag, flag)
    if flag not in NAMES:
        known = ", ".join(NAMES)
        raise M1Error(
            tr("There is no parameter {name}; there are {known}.", name=name, known=known)
        )
    attribute, parse, of_sampling = NAMES[flag]
    try:
        parsed = parse(value)
    except (ValueError, KeyError) as error:
        raise M1Error(tr("{value!r} is no value of {name}.", value=value, name=flag)) from error
    if flag == "predict" and not (isinstance(parsed, int) and parsed > 0):
        raise M1Error(tr("{value!r} is no value of {name}.", value=value, name=flag))
    if of_sampling:
        sampling = replace(settings.sampling, **{attribute: parsed})  # type: ignore[arg-type]
        return replace(settings, sampling=sampling)
    return replace(settings, **{attribute: parsed})  # type: ignore[arg-type]  # as above


def listed(settings: "GenerationSettings") -> str:
    """All parameters as aligned lines."""
    width = max(map(len, NAMES))
    lines = []
    for flag, (attribute, _, of_sampling) in NAMES.items():
        value = getattr(settings.sampling if of_sampling else settings, attribute)
        lines.append(f"{flag:<{width}}  {_shown(value)}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
