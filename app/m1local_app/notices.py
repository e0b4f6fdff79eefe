"""What a user must be told once: the licence of each source, and that a model is no doctor.

What it is: the texts, and a record of when each was shown (M1_HOME/licences.json). What it is not:
the NOTICE in a checkpoint (m1local_quantize.notice), or a question that must be answered.
"""

import contextlib
import json
import time

from rich.console import Console

from m1local import home
from m1local_app.language import tr

MEDICAL = "medical notice"


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


def _show_once(key: str, text: str) -> None:
    path = home.licences()
    try:
        shown = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        shown = {}
    if key in shown:
        return
    Console(stderr=True, highlight=False).print(text, markup=False)
    shown[key] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # Where nothing can be recorded it is shown again next time; that stops nobody's work.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
