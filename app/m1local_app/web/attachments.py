"""A file that is attached to a question: its text, or why it cannot be one.

What it is: .txt, .md and .pdf to text, with their name made harmless. What it is not: a store; the
text becomes part of the question and the upload is deleted, or an OCR: a scanned PDF has no text.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from m1local.errors import M1Error
from m1local_app.columns import one_line, printable, shortened
from m1local_app.language import tr
from m1local_app.textfile import decoded

SUFFIXES = (".txt", ".md", ".pdf")
MOST_BYTES = 32 << 20
NAME_COLUMNS = 48
UPLOADS = "GRADIO_TEMP_DIR"  # where Gradio keeps uploads (serving.py chooses a private folder)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file's text, what to call it, and how many tokens it is."""

    name: str
    text: str
    tokens: int


def read(path: Path) -> tuple[str, str]:
    """Name and text of an uploaded file, which is deleted; raises M1Error with the reason."""
    name = shortened(one_line(path.name), NAME_COLUMNS)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise M1Error(tr("{name} is larger than 32 MiB; attach a part of it.", name=name))
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise M1Error(tr("{name} is no .txt, .md or .pdf file.", name=name))
        text = _pdf(path, name) if suffix == ".pdf" else _plain(path.read_bytes(), name)
    except OSError as error:
        reason = error.strerror or error
        raise M1Error(tr("{name} cannot be read ({reason}).", name=name, reason=reason)) from error
    finally:
        _forget(path)
    if not text.strip():
        raise M1Error(tr("{name} holds no text.", name=name))
    return name, printable(text).strip()


def _forget(path: Path) -> None:
    """Delete an upload, and the copies that Gradio made of it beside, under whatever names."""
    with contextlib.suppress(OSError):
        content, size = path.read_bytes(), path.stat().st_size
        path.unlink()
        if not (folder := os.environ.get(UPLOADS)):
            return
        for file in Path(folder).rglob("*"):
            if file.is_file() and file.stat().st_size == size and file.read_bytes() == content:
                file.unlink()


def joined(question: str, files: list[Attachment]) -> str:
    """The question, and the files' text below it between lines that name them."""
    parts = [question] if question.strip() else []
    for file in files:
        begin, end = tr("File: {name}", name=file.name), tr("End of {name}", name=file.name)
        parts.append(f"[{begin}]\n{file.text}\n[{end}]")
    return "\n\n".join(parts)


def _plain(content: bytes, name: str) -> str:
    text = decoded(content)
    if text is None:
        raise M1Error(tr("{name} is no text; attach text, Markdown or a PDF.", name=name))
    return text


def _pdf(path: Path, name: str) -> str:
    import logging

    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it prints words of what it reads
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise M1Error(tr("{name} is encrypted; save it without a password first.", name=name))
        pages = [page.extract_text() for page in reader.pages]
    except M1Error:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise M1Error(
            tr("{name} is a damaged PDF, or one of a kind that is not read.", name=name)
        ) from error
    except RecursionError as error:
        raise M1Error(tr("{name} is nested too deep to be read.", name=name)) from error
    text = "\n\n".join(re.sub(r"[ \t]+\n", "\n", page).strip() for page in pages)
    if not text.strip():
        raise M1Error(
            tr("{name} has no text, only pictures of it; run it through OCR first.", name=name)
        )
    return text
