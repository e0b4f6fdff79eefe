"""What was chosen on the page, for the next start: M1_HOME/settings.toml.

What it is: of each checkpoint the values that differ from its own, in a file a person can read and
change. What it is not: the conversations (history/), or anything of one browser, such as colours.
"""

import contextlib
import json
import math
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m1local import home
from m1local.errors import M1Error
from m1local.generate import GenerationSettings
from m1local_app.columns import printable
from m1local_app.web.forms import Form

HEAD = "# Chosen on the page of m1local. Delete a line to go back to the checkpoint's own value.\n"
TABLE = "page"


def recall(checkpoint: str, form: Form, settings: GenerationSettings) -> Form:
    """`form` with what was chosen before for `checkpoint`; as it is where that is bad.

    A checkpoint is known here by what library.identity says.
    """
    chosen = _tables().get(checkpoint, {})
    values = [
        chosen[name] if name in chosen and _fits(chosen[name], value) else value
        for name, value in asdict(form).items()
    ]
    try:  # somebody may have written into the file
        changed = Form.read(values)
        changed.settings(settings)
        _ = changed.policy
    except (M1Error, ValueError):
        return form
    return changed


def remember(checkpoint: str, form: Form, defaults: Form, *, given: frozenset[str]) -> None:
    """Keep what of `form` differs from `defaults`, for `checkpoint`.

    What the command line has `given` for this once leaves alone what was chosen before.
    """
    usual, tables = asdict(defaults), _tables()
    before = tables.pop(checkpoint, {})
    chosen = {name: value for name, value in before.items() if name in given}
    chosen |= {name: value for name, value in asdict(form).items() if value != usual[name]}
    if chosen:
        tables[checkpoint] = chosen
    _write(tables)


def adopt(label: str, checkpoint: str) -> None:
    """Let `checkpoint` have what was chosen under `label` alone, as it was kept at first."""
    tables = _tables()
    if label in tables and checkpoint not in tables:
        tables[checkpoint] = tables.pop(label)
        _write(tables)


def _write(tables: dict[str, dict[str, Any]]) -> None:
    text = HEAD + "".join(_table(name, table) for name, table in sorted(tables.items()))
    path = home.settings()
    # Where nothing can be kept the page works all the same; it begins with the usual next time.
    with contextlib.suppress(OSError):
        _set_aside(path)
        home.replace_text(path, text)


def _set_aside(path: Path) -> None:
    """Keep a file that is no TOML, perhaps for a letter, under another name."""
    try:
        tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return
    except ValueError:
        path.replace(path.with_name(f"{path.name}.unreadable"))


def _tables() -> dict[str, dict[str, Any]]:
    try:
        read = tomllib.loads(home.settings().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    tables = read.get(TABLE, {})
    if not isinstance(tables, dict):
        return {}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def _fits(value: object, usual: object) -> bool:
    """Whether `value` from the file can stand where `usual` stands; a seed is usually none."""
    if isinstance(usual, str):
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if isinstance(usual, float):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, int)


def _table(name: str, table: dict[str, Any]) -> str:
    lines = (f"{key} = {_value(value)}" for key, value in table.items() if _is_scalar(value))
    return "\n".join(["", f"[{TABLE}.{_value(name)}]", *lines, ""])


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _value(value: object) -> str:
    """As TOML writes it, which for strings and numbers is as JSON does."""
    return json.dumps(printable(value) if isinstance(value, str) else value, ensure_ascii=False)
