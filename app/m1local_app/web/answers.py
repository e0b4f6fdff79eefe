"""An answer on its way to a page: events in, the text so far out, at a pace a browser can follow.

What it is: waiting for one's turn, stopping between two tokens, and the notices that an answer
gives rise to. What it is not: what the page shows of it (views.py).
"""

import time
from collections.abc import Callable, Iterator

from m1local.chat import Turn
from m1local.generate import (
    Event,
    Finished,
    FinishReason,
    PrefillProgress,
    TextDelta,
    TurnsDropped,
)
from m1local.tokenizer import Message
from m1local_app.answer_view import dropped_line
from m1local_app.language import tr
from m1local_app.web.desk import Desk
from m1local_app.web.tabs import Progress, Tab

UPDATE_SECONDS = 0.04  # 25 updates a second; the page draws the whole answer at each
WAIT_SECONDS = 0.25
DRAWING_SHARE = 3  # of the time an update took to be taken, so much is left to the model


def follow(
    desk: Desk, tab: Tab, start: Callable[[], Iterator[Event]], claim: object = None
) -> Iterator[str]:
    """The answer so far, again and again, of the events that `start` makes when it is one's turn.

    Closing it, or `tab.stop()`, ends the work before the next token. Raises OvertakenError where
    `claim` is not the tab's latest any more.
    """
    desk.check_accepted()
    progress = tab.begin(claim)
    try:
        with desk.turnstile.ticket() as ticket:
            while (ahead := ticket.ahead()) and not tab.stopping:
                progress.waiting = ahead
                yield ""
                ticket.wait(WAIT_SECONDS)
            progress.waiting = 0
            if not tab.stopping:
                yield from _text_so_far(start(), tab, progress)
    finally:
        tab.end()


def _text_so_far(events: Iterator[Event], tab: Tab, progress: Progress) -> Iterator[str]:
    text, begun, first = "", time.monotonic(), 0.0
    shown_at, pause = 0.0, UPDATE_SECONDS
    try:
        for event in events:
            if isinstance(event, TextDelta):
                first = first or time.monotonic()
                text += event.text
                progress.tokens += len(event.token_ids)
                progress.used = (progress.used or 0) + len(event.token_ids)
                progress.reading = None
                progress.first_seconds = first - begun
                if (elapsed := time.monotonic() - first) > 0:
                    progress.tokens_per_second = max(0, progress.tokens - 1) / elapsed
            else:
                _note(event, progress)
            now = time.monotonic()
            if now - shown_at >= pause and not isinstance(event, Finished):
                yield text
                shown_at = time.monotonic()
                pause = max(UPDATE_SECONDS, DRAWING_SHARE * (shown_at - now))
            if tab.stopping:
                break
    finally:
        events.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    said = (tab.conversation.news(), tab.conversation.trouble())
    progress.notices += [each for each in said if each]
    yield text


def _note(event: Event, progress: Progress) -> None:
    if isinstance(event, PrefillProgress):
        progress.reading = (event.done_tokens, event.total_tokens)
        progress.used = event.total_tokens
    elif isinstance(event, TurnsDropped):
        progress.notices.append(dropped_line(event).strip("[]"))
    elif isinstance(event, Finished):
        progress.tokens = event.new_tokens
        progress.first_seconds = event.prefill_seconds
        progress.tokens_per_second = event.tokens_per_second
        if (notice := ending_notice(event.reason)) is not None:
            progress.notices.append(notice)


def ending_notice(reason: FinishReason) -> str | None:
    """Why an answer ended, unless it ended by itself."""
    return {
        FinishReason.LENGTH: tr("The answer reached its length limit; the settings allow more."),
        FinishReason.CONTEXT: tr(
            "The context is full: begin a new conversation, or let older turns be left out "
            "(settings)."
        ),
        FinishReason.LOOP: tr("Stopped: the answer repeated itself. Retry asks again."),
    }.get(reason)


def continued(tab: Tab, desk: Desk, text: str) -> Iterator[Event]:
    """A Base model continues `text`; shown as a question and an answer, and kept nowhere."""
    session, answer = tab.conversation.session, ""
    try:
        for event in desk.engine.complete(text, session.settings):
            if isinstance(event, TextDelta):
                answer += event.text
            yield event
    finally:
        if answer:
            session.turns += [Turn(Message("user", text)), Turn(Message("assistant", answer))]
