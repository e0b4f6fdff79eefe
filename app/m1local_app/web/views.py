"""State as what the page shows: messages for the chatbot, and small pieces of HTML.

What it is: functions without side effects; every word that a user or a model wrote is escaped here.
What it is not: Gradio; these are lists and strings.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from m1local.chat import Turn
from m1local_app.answer_view import context_line
from m1local_app.columns import one_line, shortened
from m1local_app.history import Hit, StoredConversation
from m1local_app.language import language, tr
from m1local_app.notices import medical_notice
from m1local_app.red_flags import advice
from m1local_app.web.attachments import Attachment
from m1local_app.web.tabs import Progress, Tab

Message = dict[str, str]
# What begins a tag, unless it is in code, or a line break as models write it in tables.
_TAG = re.compile(
    r"(^[ \t>*+\-\d.)]*```.*?(?:^[ \t>]*```|\Z)|`[^`\n]*`|<br ?/?>)|<(?=[A-Za-z/!?])",
    re.DOTALL | re.MULTILINE,
)
_JOINER = "\N{WORD JOINER}"  # has no width; behind it nothing is a tag
# Drawn here: what a font has for these signs differs in size and place from system to system.
_ICONS = {
    name: f'<svg viewBox="0 0 24 24" aria-hidden="true">{paths}</svg>'
    for name, paths in {
        "side": '<path d="M4 7h16M4 12h16M4 17h16"/>',
        "theme": '<circle cx="12" cy="12" r="8"/>'
        '<path d="M12 4a8 8 0 0 1 0 16z" fill="currentColor"/>',
        "drawer": '<path d="M4 8h8m6 0h2M4 16h2m6 0h8"/><circle cx="15" cy="8" r="2.5"/>'
        '<circle cx="9" cy="16" r="2.5"/>',
    }.items()
}
SNIPPET = 70  # characters of a message around what was searched
LISTED = 200


def bar(label: str) -> str:
    """The line at the top: panels, the model's name, language, colours."""
    other, name = ("en", "English") if language() == "zh" else ("zh", "中文")
    buttons = "".join(
        f'<button type="button" data-do="{do}" aria-label="{escape(text)}" title="{escape(text)}"'
        f"{more}>{sign}</button>"
        for do, text, sign, more in (
            ("theme", tr("Light or dark"), _ICONS["theme"], ""),
            ("drawer", tr("Settings and model"), _ICONS["drawer"], ' aria-expanded="false"'),
        )
    )
    side = escape(tr("Conversations"))
    return (
        f'<header class="m1-bar"><button type="button" data-do="side" aria-label="{side}" '
        f'title="{side}" aria-expanded="true">{_ICONS["side"]}</button><strong>m1local</strong>'
        f'<span class="m1-label">{escape(label)}</span><span class="m1-gap"></span>'
        f'<button type="button" data-do="language" data-to="{other}" lang="{other}">{name}</button>'
        f"{buttons}</header>"
    )


def welcome(label: str, licence: str) -> str:
    """What must be accepted before the page is used: notice, licence, where words are kept."""
    about = tr(
        "The weights of {label} are their maker's, under the licence they came with. For "
        "Baichuan-M1 that is a community licence: free for research and personal use, commercial "
        "use only by written permission.",
        label=label,
    )
    private = tr(
        "Conversations are kept in one file on this machine, and nowhere else. You can delete them "
        "for good at any time."
    )
    parts = [
        ("h1", tr("Before you begin")),
        ("h2", tr("No medical advice")), ("p", medical_notice()),
        ("h2", tr("Licence")), ("p", about),
    ]  # fmt: skip
    rest = [("h2", tr("Privacy")), ("p", private)]
    whole = (
        f"<details><summary>{escape(tr('The licence as it came with the model'))}</summary>"
        f'<pre class="m1-licence" tabindex="0">{escape(licence)}</pre></details>'
    )
    return f'<div class="m1-welcome">{_tags(parts)}{whole if licence else ""}{_tags(rest)}</div>'


def _tags(parts: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for tag, text in parts)


def messages(turns: Iterable[Turn]) -> list[Message]:
    """The conversation for the chatbot, one message for each turn."""
    shown: list[Message] = []
    asked = ""
    for turn in turns:
        role, content = turn.message.role, turn.message.content
        shown.append(answer(asked, content) if role == "assistant" else question(content))
        asked = content if role == "user" else ""
    return shown


def question(text: str) -> Message:
    """A question as a message."""
    return {"role": "user", "content": without_tags(text)}


def without_tags(text: str) -> str:
    """Markdown that looks the same, in which nothing is HTML: a browser would swallow it."""
    return _TAG.sub(lambda found: found[1] or f"<{_JOINER}", text)


def typed(text: str) -> str:
    """What a user means who edited a text that `without_tags` made."""
    return text.replace(f"<{_JOINER}", "<")


def answer(asked: str, text: str) -> Message:
    """An answer as a message; where `asked` holds a word of an emergency, advice stands above."""
    line, text = advice(asked), without_tags(text)
    content = text if line is None else f"> **{line}**\n\n{text}"
    return {"role": "assistant", "content": content}


def status(tab: Tab, *, capacity: int) -> str:
    """The line below the chat: what is going on, how fast, how full; then notices and errors."""
    progress = tab.progress
    used = 0 if progress.used is None else progress.used
    share = min(1.0, used / capacity)
    level = " m1-nearly" if share >= 0.85 else ""
    context = escape(context_line(used, capacity))
    meter = (
        f'<span class="m1-meter{level}" role="img" aria-label="{context}" title="{context}">'
        f'<span style="width:{share:.1%}"></span></span>'
    )
    notes = "".join(f'<p class="m1-notice">{escape(each)}</p>' for each in progress.notices)
    if progress.error:
        notes += f'<p class="m1-error" role="alert">{escape(one_line(progress.error))}</p>'
    facts = "".join(f"<span>{escape(fact)}</span>" for fact in _facts(progress, tab.busy))
    return (
        f'<div class="m1-notes" aria-live="polite">{notes}</div>'
        f'<div class="m1-facts">{facts}<span class="m1-context">{meter}{context}</span></div>'
    )


def waiting_line(ahead: int) -> str:
    """One's place in the line."""
    return tr("Waiting: {count} before this one. One model answers one at a time.", count=ahead)


def _facts(progress: Progress, busy: bool) -> list[str]:
    if progress.waiting:
        return [waiting_line(progress.waiting)]
    if progress.reading is not None and busy:
        done, total = progress.reading
        return [tr("reading {done:,} of {total:,} tokens", done=done, total=total)]
    if progress.first_seconds is None:
        return [tr("thinking") if busy else tr("ready")]
    return [
        tr("first token {seconds:.2f} s", seconds=progress.first_seconds),
        tr("{speed:.1f} tokens/s", speed=progress.tokens_per_second),
        tr("{count:,} tokens", count=progress.tokens),
    ]


def conversations(known: Sequence[StoredConversation], current: int | None) -> str:
    """The list of conversations, as buttons; the open one is marked."""
    if not known:
        return f'<p class="m1-none">{escape(tr("Nothing is kept yet."))}</p>'
    rows = (_row(one, current, _when(one.changed)) for one in known[:LISTED])
    return f'<ul class="m1-list">{"".join(rows)}</ul>'


def hits(found: Sequence[Hit], wanted: str, current: int | None) -> str:
    """What a search found: each conversation once, with the words around the first find."""
    if not found:
        return f'<p class="m1-none">{escape(tr("Nothing was found."))}</p>'
    first: dict[int, Hit] = {}
    for hit in found:
        first.setdefault(hit.conversation.id, hit)
    rows = (
        _row(hit.conversation, current, _snippet(hit.message.content, wanted))
        for hit in first.values()
    )
    return f'<ul class="m1-list">{"".join(rows)}</ul>'


def binned(known: Sequence[StoredConversation]) -> str:
    """What lies in the bin, each with a button that takes it out."""
    if not known:
        return f'<p class="m1-none">{escape(tr("The bin is empty."))}</p>'
    rows = (
        f"<li><span>{escape(_title(one))}</span>"
        f'<button type="button" data-restore="{one.id}">{escape(tr("Restore"))}</button></li>'
        for one in known[:LISTED]
    )
    return f'<ul class="m1-list m1-bin">{"".join(rows)}</ul>'


def deleted(conversation_id: int | None) -> str:
    """The line that takes a deletion back."""
    if conversation_id is None:
        return ""
    return (
        f'<p class="m1-undo" role="status">{escape(tr("Deleted."))} '
        f'<button type="button" data-restore="{conversation_id}">{escape(tr("Undo"))}'
        "</button></p>"
    )


def attached(files: Sequence[Attachment]) -> str:
    """The files that go with the next question, each with a button that leaves it out."""
    chips = "".join(
        f'<span class="m1-chip">{escape(file.name)} <small>'
        f"{escape(tr('{count:,} tokens', count=file.tokens))}</small>"
        f'<button type="button" data-detach="{index}" '
        f'aria-label="{escape(tr("Leave out {name}", name=file.name))}">×</button></span>'
        for index, file in enumerate(files)
    )
    return f'<div class="m1-chips">{chips}</div>' if chips else ""


def versions(shown: dict[int, tuple[int, int]]) -> str:
    """Data for the page's script, which puts ‹ 2/3 › below the messages that have versions."""
    data = {
        "turns": {str(index): [at, count] for index, (at, count) in shown.items()},
        "before": tr("Version before"),
        "after": tr("Version after"),
    }
    return f'<div data-versions="{escape(json.dumps(data))}"></div>'


def _row(one: StoredConversation, current: int | None, detail: str) -> str:
    here = ' aria-current="true"' if one.id == current else ""
    return (
        f'<li><button type="button" data-open="{one.id}"{here}><span>{escape(_title(one))}</span>'
        f"<small>{escape(detail)}</small></button></li>"
    )


def _title(one: StoredConversation) -> str:
    return one_line(one.title) or tr("Untitled")


def _when(changed: datetime) -> str:
    local = changed.astimezone()
    today = datetime.now(UTC).astimezone().date() == local.date()
    return local.strftime("%H:%M" if today else "%Y-%m-%d")


def _snippet(content: str, wanted: str) -> str:
    text = one_line(content)
    words = wanted.split()
    at = text.casefold().find(words[0].casefold()) if words else 0
    start = max(0, at - SNIPPET // 3)
    return ("…" if start else "") + shortened(text[start:], SNIPPET)
