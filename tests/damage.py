"""Ways to damage a file, and the one way an error may look: for the tests of bad input."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from m1local.errors import M1Error


@contextmanager
def refused(kind: type[M1Error], match: str) -> Iterator[None]:
    """The block raises `kind` with a message of one line that matches."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def overwrite(path: Path, start: int, content: bytes) -> None:
    """Write `content` over what is at `start`."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


def truncate(path: Path, nbytes: int) -> None:
    """Cut the file off after `nbytes`."""
    with path.open("r+b") as file:
        file.truncate(nbytes)
