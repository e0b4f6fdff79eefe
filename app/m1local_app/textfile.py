"""Text files that a user names: questions, system prompts, schemas, notes to ask about.

What it is: one way to read them and what is piped, with every mistake as one line. What it is not:
other formats; a PDF or a DOCX is converted first.
"""

import contextlib
from pathlib import Path

from m1local.errors import M1Error
from m1local_app.language import tr

MOST_BYTES = 10 << 20


def read_text_file(path: Path) -> str:
    """The text of a file; raises M1Error where it is none, or too long for any context."""
    path = at_home(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise M1Error(tr("{path} is larger than any context; cut it down.", path=path))
        text = decoded(path.read_bytes())
    except (OSError, ValueError) as error:  # a NUL in the name is the latter
        reason = getattr(error, "strerror", None) or str(error)
        raise M1Error(tr("{path} cannot be read: {reason}.", path=path, reason=reason)) from error
    if text is None:
        raise M1Error(tr("{path} is no text in UTF-8, UTF-16 or GB18030.", path=path))
    return text.strip()


def at_home(path: Path) -> Path:
    """`path` with ~ as the user's folder; as it is where there is no such user."""
    with contextlib.suppress(RuntimeError):
        return path.expanduser()
    return path


def decoded(content: bytes) -> str | None:
    """Text in UTF-8, in UTF-16 with its mark, or in GB18030 as Chinese Windows writes it; or None.

    A line's end is a newline, as in every text here.
    """
    encodings = ["utf-8-sig", "gb18030"]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif b"\0" in content:
        encodings = []
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            return "\n".join(content.decode(encoding).replace("\r\n", "\n").split("\r"))
    return None
