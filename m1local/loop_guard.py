"""Noticing an answer that repeats itself without end.

What it is: a watch on the tokens of one answer. It reports a loop when the answer's end is one
sequence over and over: at least `LEAST_TOKENS` long, and at least `LEAST_REPEATS` times. What it is
not: a judge of style; a phrase that comes back in between, a table's ruler or a list of numbers is
no loop, and nothing is taken out of an answer.
"""

import numpy as np

LONGEST_PERIOD = 256  # tokens: a paragraph
LEAST_REPEATS = 4
LEAST_TOKENS = 80


class LoopGuard:
    """Push the answer's tokens one after the other."""

    def __init__(self) -> None:
        """Watch a fresh answer."""
        self._recent = np.full(LONGEST_PERIOD, -1, dtype=np.int64)  # the last token first
        self._equal = np.zeros(LONGEST_PERIOD, dtype=np.int64)
        periods = np.arange(1, LONGEST_PERIOD + 1)
        # A repeated sequence of p tokens is n long when the last n - p equal those p before them.
        self._enough = np.maximum(LEAST_TOKENS, LEAST_REPEATS * periods) - periods

    def push(self, token_id: int) -> bool:
        """Whether the answer loops now that `token_id` came."""
        self._equal = np.where(self._recent == token_id, self._equal + 1, 0)
        self._recent = np.roll(self._recent, 1)
        self._recent[0] = token_id
        return bool((self._equal >= self._enough).any())
