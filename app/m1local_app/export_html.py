"""A conversation as one HTML page that needs nothing else and runs nothing.

What it is: the transcript with the Markdown of its answers drawn, and a policy that forbids every
script and every load. What it is not: a page that links. Links and pictures stay the text they
were written as, so that opening or printing the page tells nobody.
"""

import base64
import hashlib
from html import escape
from typing import TYPE_CHECKING

from m1local_app.columns import printable
from m1local_app.language import language, tr
from m1local_app.transcript import Transcript, answer_facts, notice, time_text

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

LANGUAGE_TAGS = {"en": "en", "zh": "zh-Hans"}
REFUSED = ["link", "image", "autolink", "reference"]  # what reaches out of the page
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5;
  font-family: system-ui, "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 0; }
.notice { border: 2px solid; border-radius: .3rem; padding: .6rem 1rem; font-weight: 600; }
.answer :is(h1, h2, h3) { font-size: 1rem; margin: 1rem 0 0; }
.text { overflow-wrap: anywhere; }
.written { white-space: pre-wrap; }
.question { border-inline-start: .25rem solid #4a7fb5; padding-inline-start: .75rem; }
.facts, time { font-size: .8rem; opacity: .75; overflow-wrap: anywhere; }
.facts { list-style: none; padding: 0; }
pre { overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; }
th, td { border: 1px solid #8888; padding: .2rem .5rem; }
.right { text-align: right; } .center { text-align: center; } .left { text-align: left; }
@media print { body { max-width: none; margin: 0; font-size: 10.5pt; } h2 { break-after: avoid; }
  pre, table, .notice, .facts { break-inside: avoid; } }
"""


def html(transcript: Transcript) -> str:
    """The transcript as a page of its own."""
    title = _text(transcript.conversation.title)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    lines = [
        "<!doctype html>",
        f'<html lang="{LANGUAGE_TAGS[language()]}">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="referrer" content="no-referrer">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        f'<p class="notice">{_text(notice())}</p>',
        _facts(transcript.facts()),
        *_messages(transcript),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def drawn(text: str) -> str:
    """Markdown as HTML that holds no link, no picture and no markup of the text's own."""
    parser = _parser()
    tokens = parser.parse(printable(text))
    for token in tokens:
        style = token.attrs.pop("style", None)  # the page's policy knows classes only
        if style is not None:
            token.attrs["class"] = str(style).removeprefix("text-align:")
    return str(parser.renderer.render(tokens, parser.options, {}))


def _parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False})
    return parser.enable(["table", "strikethrough"]).disable(REFUSED)


def _messages(transcript: Transcript) -> list[str]:
    lines: list[str] = []
    if transcript.conversation.system:
        system = _text(transcript.conversation.system)
        lines += [f"<h2>{_text(tr('System prompt'))}</h2>", _written(system)]
    for name, message in transcript.numbered():
        time = time_text(message.created)
        lines += [f"<h2>{_text(name)}</h2>", f'<time datetime="{time}">{time}</time>']
        if message.role == "user":
            lines.append(_written(_text(message.content), "question"))
        else:
            lines.append(f'<div class="text answer" dir="auto">\n{drawn(message.content)}</div>')
            lines.append(_facts(answer_facts(message)))
    return lines


def _written(escaped: str, kind: str = "system") -> str:
    """A text as it was typed."""
    return f'<div class="text written {kind}" dir="auto">{escaped}</div>'


def _facts(facts: list[tuple[str, str]]) -> str:
    items = "\n".join(f"<li>{_text(name)}: {_text(value)}</li>" for name, value in facts)
    return f'<ul class="facts">\n{items}\n</ul>'


def _text(text: str) -> str:
    return escape(printable(text))
