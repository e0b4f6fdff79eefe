"""Text as it is generated, with stop strings taken out.

What it is: the one place that joins tokens to text and looks for stop strings. It holds back what
may still become a stop string, and nothing more. What it is not: about stop *tokens*, which never
reach it.
"""

from collections.abc import Iterable

from m1local.tokenizer import IncrementalDecoder


class TextStream:
    """Push token ids, get the text that is certain to be shown."""

    def __init__(self, decoder: IncrementalDecoder, stop: Iterable[str] = ()) -> None:
        """Decode with `decoder`; end before the first of the strings in `stop`."""
        self._decoder = decoder
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, at the end of generation."""
        text = self._release(self._decoder.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - hold
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
