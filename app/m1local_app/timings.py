"""Where the time of a start goes: `--timings`.

What it is: the seconds since the process began, parted by what was done in them, and their table.
What it is not: a profiler, or the speed of answers (answer_view.py).
"""

import time

import psutil

from m1local_app.columns import aligned
from m1local_app.language import marked, tr

NAMES = {
    "command": marked("Python and the command"),
    "torch": marked("torch and the options"),
    "checkpoint": marked("checkpoint, found or made"),
    "library": marked("compiled library, found or made"),
    "tokenizer": marked("tokenizer"),
    "context": marked("room for the context"),
    "weights": marked("weights, mapped or moved"),
    "conversation": marked("conversation and history"),
}


class Timings:
    """Seconds by what they were spent on, in its order; what came before this is the command's."""

    def __init__(self) -> None:
        """Begin to count; the process began earlier, to a hundredth of a second."""
        self.steps = [("command", max(time.time() - psutil.Process().create_time(), 0.0))]
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        """What went on since the last call was `name`, one of NAMES."""
        now = time.perf_counter()
        self.steps.append((name, now - self._last))
        self._last = now

    def table(self) -> str:
        """A line for each step, and their sum."""
        rows = [(tr(NAMES[name]), seconds) for name, seconds in self.steps]
        rows.append((tr("from the start of the process"), sum(seconds for _, seconds in rows)))
        figures = [f"{seconds:.2f} s" for _, seconds in rows]
        longest = max(map(len, figures))
        return aligned(
            [(text, figure.rjust(longest)) for (text, _), figure in zip(rows, figures, strict=True)]
        )
