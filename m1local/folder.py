"""A checkpoint's folder: its small JSON files, and names that must not lead out of it.

What it is: the two things everything that reads a folder needs, without torch. What it is not: a
reader of weights (m1local/shards.py).
"""

import json
from pathlib import Path
from typing import Any

from m1local.errors import CheckpointError, ConfigError

UNFINISHED = "m1local.unfinished"  # lies in a checkpoint's folder until its manifest does


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file; raises `ConfigError` when it is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path.parent / UNFINISHED).is_file():
            raise ConfigError(
                f"{path.parent} is unfinished: quantizing it was cut off. The same `m1 quantize` "
                "goes on with it."
            ) from None
        raise ConfigError(
            f"{path.parent} has no {path.name}; is it the folder of a Baichuan-M1 checkpoint?"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: endless numbers
        raise ConfigError(f"{path} is no valid JSON ({error}); fetch the file again.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected a JSON object.")
    return raw


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` in `folder`; raises CheckpointError when it leads elsewhere."""
    # A single name on every system: no folder, drive, network share or line break in it.
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\:"):
        raise CheckpointError(
            f"{folder} names the file {name!r}, which does not lie in it; do not use this folder."
        )
    return folder / name
