"""What a user must be told once: the licence of each source, and that a model is no doctor.

What it is: the texts, and a record of when each was shown, or accepted on the page
(M1_HOME/licences.json). What it is not: the NOTICE in a checkpoint (m1local_quantize.notice), or
how a user is asked.
"""

import json
import time
from pathlib import Path

from m1local import home
from m1local_app.boundary import stderr_console
from m1local_app.language import tr

MEDICAL = "medical notice"
# What could not be written down, by where: it counts for this process.
_UNRECORDED: dict[Path, dict[str, str]] = {}
ACCEPTED = "accepted on the page"


def show_licence_once(source: str) -> None:
    """Print the licence note of `source` on stderr unless it was shown before."""
    _show_once(
        source,
        tr(
            "Licence: the weights of {source} are their maker's, under the licence they came with. "
            "For Baichuan-M1 that is a community licence: free for research and personal use, "
            "commercial use only by written permission. Answers are no medical advice.",
            source=source,
        ),
    )


def show_medical_notice_once() -> None:
    """Print on stderr that answers are no medical advice, unless that was shown before."""
    _show_once(MEDICAL, medical_notice())


def medical_notice() -> str:
    """What a user of a medical language model must know."""
    return tr(
        "Medical notice: answers are made by a language model. They can be wrong, incomplete or "
        "dangerous, and are no medical advice. Ask a doctor before you act on them; in an "
        "emergency call your local emergency number. Everything stays on this machine."
    )


def accept(source: str) -> None:
    """Record that the licence of `source` and the medical notice were accepted on the page.

    `source` is what library.identity says of a checkpoint.
    """
    _record(ACCEPTED)
    _record(f"{ACCEPTED}: {source}")


def is_accepted(source: str) -> bool:
    """Whether both were accepted before."""
    shown = _shown()
    return ACCEPTED in shown and f"{ACCEPTED}: {source}" in shown


def adopt(label: str, source: str) -> None:
    """Let `source` have what was accepted under `label` alone, as it was recorded at first.

    The first checkpoint of that name has it; another is asked about.
    """
    shown, old, new = _shown(), f"{ACCEPTED}: {label}", f"{ACCEPTED}: {source}"
    if old in shown and new not in shown:
        shown[new] = shown.pop(old)
        _write(shown)


def _show_once(key: str, text: str) -> None:
    if key in _shown():
        return
    stderr_console().print(text)
    _record(key)


def _shown() -> dict[str, str]:
    try:
        kept = dict(json.loads(home.licences().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        kept = {}
    return kept | _UNRECORDED.get(home.licences(), {})


def _record(key: str) -> None:
    shown = _shown()
    shown[key] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _write(shown)


def _write(shown: dict[str, str]) -> None:
    path = home.licences()
    try:
        home.replace_text(path, json.dumps(shown, indent=1) + "\n")
    except OSError:  # it is shown again next time; that stops nobody's work
        _UNRECORDED[path] = shown
