"""One call to the hub while something is published: tried again, and its faults in a user's words.

What it is: what is done when the connection fails or the hub refuses. What it is not: the calls
(publish.py), or a transfer that can be watched (transfer.py).
"""

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from m1local.errors import HubError
from m1local_quantize import transfer
from m1local_quantize.transfer import is_connection

LOG_IN = "log in with `hf auth login` and a token that may write, and run the same command again."
# Files go to a storage of its own where the package hf-xet is installed; not every mirror has it.
XET_HINT = " If HF_ENDPOINT is a mirror without Xet storage, set HF_HUB_DISABLE_XET=1."
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TriedAgain:
    """The connection failed; it is tried again after some seconds."""

    reason: str
    seconds: float


def outcome(steps: Generator[TriedAgain, None, T]) -> T:
    """The result, whatever was tried again."""
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            result: T = ended.value
            return result


def insist(repository: str, call: Callable[[], T]) -> Generator[TriedAgain, None, T]:
    """The result of `call`, tried again while the connection is at fault; raises HubError."""
    for attempt in range(transfer.ATTEMPTS):
        try:
            return _quietly(call)
        except Exception as error:
            cause = _cause(error)
            if cause is None:
                raise
            reason = " ".join(str(cause).split())[:200] or type(cause).__name__
            refusal = _refusal(repository, cause, reason)
            if refusal is not None:
                raise refusal from error
            if attempt == transfer.ATTEMPTS - 1:
                hint = XET_HINT if "xet" in reason.casefold() else ""
                raise HubError(
                    f"{repository} could not be reached ({reason}). What was sent is kept; the "
                    f"same command goes on from there.{hint}"
                ) from error
        seconds = transfer.WAIT_SECONDS * 2**attempt
        yield TriedAgain(reason, seconds)
        time.sleep(seconds)
    raise AssertionError("unreachable")


def _quietly(call: Callable[[], T]) -> T:
    """`call` without the library's own bars and warnings."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, by their documents
        disable_progress_bars,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with disable_progress_bars():
        return call()


def _cause(error: Exception) -> Exception | None:
    """What of the network or the hub is behind `error`, or None where nothing is.

    The library wraps what went wrong while a file was sent in a RuntimeError, and says in a
    ValueError what it does not understand of an answer.
    """
    inner = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(inner, Exception):
        return _cause(inner)
    return error if is_connection(error) or isinstance(error, RuntimeError | ValueError) else None


def _refusal(repository: str, error: Exception, reason: str) -> HubError | None:
    """The user's words for what trying again would not mend; None for the rest."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return HubError(f"The hub does not know you, or not any more: {LOG_IN}")
    if status in (403, 404):
        owner = repository.partition("/")[0]
        return HubError(
            f"You may not write to {repository}: take a token that may write to {owner} (`hf auth "
            "login`), or another name."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, which forbids to publish anything; unset it.")
    if isinstance(error, ValueError) or (status is not None and status < 500 and status != 429):
        return HubError(
            f"The hub refuses {repository} ({reason}). What was sent is kept; the same command "
            "goes on from there."
        )
    return None
