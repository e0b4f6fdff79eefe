"""Prompt lookup: tokens that came before are proposed, and read together with the one that is due.

What it is: the last few tokens are looked for in prompt and answer; what followed them there is
fed to the model in the same pass, whose logits then serve as many draws as the proposal is right.
Every token is drawn by the ordinary sampler from its own logits, in order, so a seed gives the
tokens, and the samplers the distribution, that they give without. What it is not: another model
that drafts, or a promise of equal bits: a product of several rows may sum in another order than
that of one (differences of 1e-6), so where two tokens are nearly as likely, either may come. The
compiled products of int3 to int8 sum up to four rows as they sum one; so at most three tokens are
proposed.
Source of the idea: prompt lookup decoding, a speculative decoding (arXiv 2211.17192) without a
draft model.
"""

import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor

from m1local.cache import RAW_TOKENS
from m1local.context import Context

LONGEST, SHORTEST = 4, 2  # tokens that are looked for
MOST = 3  # tokens that are proposed: four rows cost 1.3 times one (int4, AVX-512), eight 3.5
assert MOST < RAW_TOKENS  # so that the cache can take all of them back
MEASURED = 8  # passes of each kind that are remembered
ENOUGH = 3  # passes of each kind that must have been seen
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # passes without proposals after they did not pay


class Proposer:
    """The tokens of a conversation, and what may come next if it repeats itself."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        """Begin with the prompt."""
        self._token_ids = array("q", token_ids)

    def push(self, token_id: int) -> None:
        """Go on after `token_id`."""
        self._token_ids.append(token_id)

    def propose(self, most: int) -> list[int]:
        """The `most` tokens, 1 or more, that followed where the last ones came before; or none.

        More of the last tokens are looked for first, and the latest place counts. Where the end is
        reached, the proposal goes round: so what repeats in a circle is proposed.
        """
        seen = np.frombuffer(self._token_ids, dtype=np.int64)
        for length in range(min(LONGEST, len(seen) - 1), SHORTEST - 1, -1):
            begins = len(seen) - length  # how many places there are; the last tokens are none
            found = np.ones(begins, dtype=bool)
            for i in range(length):
                found &= seen[i : i + begins] == seen[begins + i]
            places = np.flatnonzero(found)
            if len(places):
                at = int(places[-1]) + length
                followed: list[int] = seen[at : at + most].tolist()
                return [followed[i % len(followed)] for i in range(most)]
        return []


class Pace:
    """Whether proposals pay: tokens per second with them against those without, as measured."""

    def __init__(self) -> None:
        """Begin in good hope."""
        self._alone: deque[float] = deque(maxlen=MEASURED)  # seconds of a pass of one token
        self._together: deque[tuple[int, float]] = deque(maxlen=MEASURED)  # tokens, seconds
        self._waiting, self._pause = 0, FIRST_PAUSE

    @property
    def pays(self) -> bool:
        """Whether the next pass may hold a proposal."""
        return len(self._alone) >= ENOUGH and not self._waiting

    def passed(self, seconds: float) -> None:
        """A pass of one token has taken so long."""
        self._alone.append(seconds)
        self._waiting = max(0, self._waiting - 1)

    def proposed(self, gained: int, seconds: float) -> None:
        """A pass with a proposal has given so many tokens, and taken so long."""
        self._together.append((gained, seconds))
        if len(self._together) < ENOUGH:
            return
        tokens, taken = (sum(column) for column in zip(*self._together, strict=True))
        if taken <= tokens * statistics.median(self._alone):
            self._pause = FIRST_PAUSE
            return
        self._waiting, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._together.clear()


class LookAhead:
    """Feeds an answer's tokens to a context, together with what may follow them.

    The context may hold tokens that nobody has drawn, until `settle` takes them back.
    """

    pace = Pace

    def __init__(
        self,
        context: Context,
        prompt: Sequence[int],
        *,
        lookup: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Go on after `prompt`; without `lookup`, or where a decoder serves, token by token."""
        self._context, self._clock = context, clock
        self._looks = lookup and context.decoder is None
        self._proposer, self._pace = Proposer(prompt), self.pace()
        self._ahead: deque[tuple[int, Tensor]] = deque()  # read, not drawn: tokens and their logits
        self._gained, self._seconds = 0, 0.0  # of the last pass with a proposal; 0: settled
        self.accepted = 0  # tokens that were proposed and then drawn

    @property
    def room(self) -> int:
        """How many more tokens fit behind those that were drawn."""
        return self._context.room + len(self._ahead)

    def feed(self, token_id: int, most: int) -> Tensor:
        """Go on after `token_id`; returns the next one's logits (V,).

        No more than `most` tokens will be drawn after it.
        """
        self._proposer.push(token_id)
        if self._ahead and self._ahead[0][0] == token_id:
            self.accepted += 1
            self._gained += 1
            return self._ahead.popleft()[1]
        self.settle()
        proposal = self._propose(most - 1)
        begun = self._clock()
        if not proposal:
            last = self._context.feed([token_id])
            self._pace.passed(self._clock() - begun)
            return last
        logits = self._context.feed_all([token_id, *proposal])
        self._gained, self._seconds = 1, self._clock() - begun
        self._ahead.extend(zip(proposal, logits[1:], strict=True))
        return logits[0]

    def settle(self) -> None:
        """Let the context hold what was drawn and fed, and nothing else."""
        if self._gained:
            self._pace.proposed(self._gained, self._seconds)
            self._gained = 0
        if self._ahead:
            self._context.take_back(len(self._ahead))
            self._ahead.clear()

    def _propose(self, most: int) -> list[int]:
        context = self._context
        if not self._looks:
            return []
        fits = min(MOST, most, context.room - 1, context.cache.max_chunk - 1)
        return self._proposer.propose(fits) if fits > 0 and self._pace.pays else []
