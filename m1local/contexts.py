"""The contexts of several conversations with one model.

What it is: who holds which context. As many are kept as half of the free memory has room for; then
the one that was not used for longest is handed on, and its conversation reads itself again when it
comes back. What it is not: a copy of anything on the disk.
"""

from collections import OrderedDict

from m1local.context import Context
from m1local.memory import room

MOST_CONTEXTS = 8
FREE_SHARE = 2  # a further context may take half of what is free


class ContextPool:
    """Contexts of one size, by the key of the conversation that uses them."""

    def __init__(self, first: Context, spared: int = 0) -> None:
        """Hand out `first`, and more like it while memory allows.

        `spared` bytes are left for what reading a prompt and a captured step take later.
        """
        self._spared = spared
        self._unused = [first]
        self._held: OrderedDict[int, Context] = OrderedDict()  # the one used last at the end
        self.capacity = first.capacity

    def of(self, key: int) -> Context:
        """The context of conversation `key`, perhaps empty."""
        context = self._held.pop(key, None) or self._another()
        self._held[key] = context
        return context

    def _another(self) -> Context:
        if self._unused:
            return self._unused.pop()
        oldest = next(iter(self._held))
        context = self._held[oldest]
        left = (room(context.device) - self._spared) // FREE_SHARE
        if len(self._held) < MOST_CONTEXTS and context.cache.nbytes <= left:
            return context.another()
        return self._held.pop(oldest)
