"""Where a user's things are kept: M1_HOME, or the platform's data directory.

What it is: paths, and how a small file is replaced, without torch. What it is not: a configuration;
M1_HOME is the only environment variable of this project.
"""

import os
import threading
from pathlib import Path

from platformdirs import user_data_path

from m1local.errors import StorageError

DEMO = Path(__file__).parent / "m1-tiny"  # the built-in demo model


def home() -> Path:
    """The folder of everything kept for the user; not created here."""
    chosen = os.environ.get("M1_HOME")
    if not chosen:
        return user_data_path("m1local", appauthor=False)
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise StorageError(f"M1_HOME is {chosen!r}, whose ~ names no user; change it.") from error


def models() -> Path:
    """Where checkpoints made by `m1 run` are kept."""
    return home() / "models"


def sources() -> Path:
    """Where original checkpoints fetched from the hub are kept."""
    return home() / "sources"


def sensitivities() -> Path:
    """What the recipe fit measured, by source and text."""
    return home() / "sensitivities"


def licences() -> Path:
    """Which licence notes were shown, and when."""
    return home() / "licences.json"


def native() -> Path:
    """What was compiled on this machine for it."""
    return home() / "native"


def settings() -> Path:
    """What was chosen on the page, by checkpoint."""
    return home() / "settings.toml"


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`: a reader, or a cut, finds what was there before or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    unfinished = path.with_name(f"{path.name}.{writer}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
