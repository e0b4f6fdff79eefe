"""Text files that a user names: questions, system prompts, schemas, notes to ask about.

What it is: one way to read them, with every mistake as one line. What it is not: other formats; a
PDF or a DOCX is converted first.
"""

from pathlib import Path

from m1local.errors import M1Error
from m1local_app.language import tr

MOST_BYTES = 10 << 20


def read_text_file(path: Path) -> str:
    """The text of a file; raises M1Error where it is none, or too long for any context."""
    path = path.expanduser()
    try:
        if path.stat().st_size > MOST_BYTES:
            raise M1Error(tr("{path} is larger than any context; cut it down.", path=path))
        return path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        reason = error.strerror or str(error)
        raise M1Error(tr("{path} cannot be read: {reason}.", path=path, reason=reason)) from error
    except UnicodeDecodeError as error:
        raise M1Error(tr("{path} is no text in UTF-8; convert it first.", path=path)) from error
