"""Exported conversations: what stands in them, that nothing in them acts, and how they are written.

The conversation's texts try to be what they must not become: headings, markup, scripts, loads.
"""

import base64
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from m1local.errors import M1Error
from m1local_app.export import write_export
from m1local_app.export_markdown import quoted
from m1local_app.history import History
from m1local_app.language import choose

HOSTILE = """\
# A heading

<script>alert(1)</script> <img src="http://tracker.invalid/a.png" onerror="x()">

![picture](http://tracker.invalid/b.png) [a link](http://tracker.invalid/c "title")
<http://tracker.invalid/d> [reference][r] [bad](javascript:alert(1))

[r]: http://tracker.invalid/e

| name | dose |
| --- | ---: |
| **青光眼** | ~~5~~ |

```html
<b onclick="x()">code</b>
```
\x1b[31mred\x1b[0m and \u202eturned &amp; &lt;i&gt;
"""
PARAMETERS = {
    "temperature": 0.3,
    "sampling": {"top_k": 5, "seed": 42},
    "stop": ["a"],
    "top_p": None,
}


@pytest.fixture
def store(m1_home: Path) -> Iterator[History]:
    with History.open() as history:
        conversation = history.begin(system="Be <brief>.\n## No heading", title="Eyes <i>&_*")
        old = history.add(conversation, "user", "the old version", parent=None)
        history.add(conversation, "assistant", "old answer", parent=old, finish="stop")
        question = history.add(conversation, "user", "What is\n<b>glaucoma</b>?", parent=None)
        first = history.add(
            conversation, "assistant", HOSTILE, parent=question, parameters=PARAMETERS,
            model="demo `int4`", checkpoint="ab12cd", token_ids=[1, 2], finish="stop",
        )  # fmt: skip
        second = history.add(conversation, "user", "And?\n## Answer 7", parent=first)
        history.add(conversation, "assistant", "It is cut", parent=second)
        yield history


def exported(store: History, path: Path) -> str:
    write_export(store, 1, path)
    return path.read_text(encoding="utf-8")


def test_markdown_says_everything_and_quotes_every_text(store: History, tmp_path: Path) -> None:
    text = exported(store, tmp_path / "eyes.md")
    assert text.startswith(
        "# Eyes \\<i\\>\\&\\_\\*\n\n> This text was written by a language model."
    )
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[1:] == [
        "## System prompt", "## Question 1", "## Answer 1", "## Question 2", "## Answer 2",
    ]  # fmt: skip
    for line in (
        "> Be \\<brief>.", "> ## No heading", "> What is", "> # A heading", "> ## Answer 7",
        "- Model: demo \\`int4\\`", "- Checkpoint: ab12cd", "- Seed: 42", "- Ended: by itself",
        '- Parameters: temperature 0.3, top\\_k 5, stop \\["a"\\]', "- Seed: not recorded",
        "- Ended: UNFINISHED: it was interrupted, or is still being written",
        "- Left out: messages of other versions: 2; an export as .json holds them",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "old version" not in text
    assert len(re.findall(r"^(?:- \w+: )?\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", text, re.M)) == 3 + 4
    assert "\x1b" not in text
    assert "\u202e" not in text


def _acting(text: str) -> list[str]:
    """What a viewer of Markdown would run, hide or load."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    every = [one for token in tokens for one in (token, *(token.children or ()))]
    return [one.content for one in every if one.type in ("html_block", "html_inline", "image")]


def test_markdown_holds_no_html_and_no_pictures_outside_code(
    store: History, tmp_path: Path
) -> None:
    text = exported(store, tmp_path / "eyes.md")
    assert _acting(text) == []
    assert '> <b onclick="x()">code</b>' in text.splitlines()
    assert "<http://tracker.invalid/d>" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b, <5 mg, x<y and `<i>` <http://a.b> [c](<d e>)", None),
        ("    <b>\n\n```\n<script>\n```\n\n\\![no picture] \\<b>", None),
        # Defined by another text of the file, or by a footnote.
        ("![x][r] `![y](z)`", "\\![x][r] `![y](z)`"),
        (
            "[^1]: <img src=x>\n\n[^2]: ![p](http://t)",
            "[^1]: \\<img src=x>\n\n[^2]: \\![p](http://t)",
        ),
        ("- <img src=x>\n- ![p](http://t)", "- \\<img src=x>\n- \\![p](http://t)"),
        ("> 1. <u>\n\n# a <b>b</b> #", "> 1. \\<u>\n\n# a \\<b>b\\</b> #"),
        ("|`<b>`|<b>|\n|-|-|\n|<i>|<b>|", "|`<b>`|\\<b>|\n|-|-|\n|\\<i>|\\<b>|"),
        ("|a \\| \\\\<i>|\n|-|", "|a \\| \\\\&lt;i>|\n|-|"),
        ("<script\n<!-- <i>\n<?php", "\\<script\n\\<!-- \\<i>\n\\<?php"),
        ("[![a](b)](c) ![r][q]\n\n[q]: d", "[\\![a](b)](c) \\![r][q]\n\n[q]: d"),
        ('<b title="`"> `<script>`', '\\<b title="\\`"> `<script>`'),
    ],
)
def test_what_acts_is_escaped_and_the_rest_is_as_it_was(text: str, expected: str | None) -> None:
    lines = (text if expected is None else expected).split("\n")
    assert quoted(text) == "\n".join(f"> {line}".rstrip() for line in lines)
    assert _acting(quoted(text)) == []


@settings(deadline=None)
@given(st.text(alphabet=list("<>`![]()\\|-b/\"' \t\n#&:"), max_size=40))
def test_nothing_made_up_gets_through(text: str) -> None:
    assert _acting(quoted(text)) == []


def test_json_holds_all_versions_and_the_texts_as_they_were(store: History, tmp_path: Path) -> None:
    text = exported(store, tmp_path / "eyes.JSON")
    assert "\x1b" not in text
    assert "\u202e" not in text
    value = json.loads(text)
    assert value["title"] == "Eyes <i>&_*"
    assert value["system"] == "Be <brief>.\n## No heading"
    assert "not medical advice" in value["notice"]
    assert value["shown"] == [3, 4, 5, 6]
    assert [message["parent"] for message in value["messages"]] == [None, 1, None, 3, 4, 5]
    answer = value["messages"][3]
    assert answer["content"] == HOSTILE
    assert answer["parameters"] == PARAMETERS
    assert (answer["model"], answer["checkpoint"]) == ("demo `int4`", "ab12cd")
    assert (answer["token_ids"], answer["finish"]) == ([1, 2], "stop")
    assert value["messages"][5]["finish"] is None
    for time in (value["created"], value["exported"], answer["created"]):
        assert datetime.fromisoformat(time).utcoffset() is not None


class _Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_loads_nothing_and_runs_nothing(store: History, tmp_path: Path) -> None:
    text = exported(store, tmp_path / "eyes.html")
    page = _Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "a", "link", "iframe", "object", "form", "i", "b", "base"}
    attributes = {name for _, attributes in page.tags for name in attributes}
    assert attributes <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "dir", "datetime",
    }  # fmt: skip
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert "unsafe" not in policy


def test_html_shows_what_was_said(store: History, tmp_path: Path) -> None:
    text = exported(store, tmp_path / "eyes.html")
    page = _Page(text)
    assert ("html", {"lang": "en"}) in page.tags
    assert "<title>Eyes &lt;i&gt;&amp;_*</title>" in text
    for part in (
        "not medical advice", "Be <brief>.\n## No heading", "What is\n<b>glaucoma</b>?",
        "<script>alert(1)</script>", "![picture](http://tracker.invalid/b.png)",
        '[a link](http://tracker.invalid/c "title")', "<http://tracker.invalid/d>",
        "[r]: http://tracker.invalid/e", '<b onclick="x()">code</b>', "[31mred",
        "Model: demo `int4`", "Checkpoint: ab12cd", "Seed: 42", "top_k 5", "by itself",
        "UNFINISHED", "messages of other versions: 2",
    ):  # fmt: skip
        assert part in page.text, part
    assert "<strong>青光眼</strong>" in text
    assert "<s>5</s>" in text
    assert '<td class="right">' in text
    assert "@media print" in text
    assert "old version" not in text
    assert not re.search("[\x1b\u202e]", text)


@pytest.mark.parametrize("suffix", [".md", ".html", ".json"])
def test_the_notice_is_in_the_chosen_language(store: History, tmp_path: Path, suffix: str) -> None:
    english = (
        "This text was written by a language model. It is not medical advice; ask a doctor or a "
        "pharmacist before you act on it."
    )
    choose("zh")
    text = exported(store, tmp_path / f"eyes{suffix}")
    assert "医疗建议" in text
    assert english not in text
    assert ('lang="zh-Hans"' in text) == (suffix == ".html")


@pytest.mark.parametrize(
    ("finish", "words"),
    [("stop", "by itself"), ("length", "limit of tokens"), ("context", "context was full"),
     ("loop", "repeated itself"), ("new\nreason", "new reason"), (None, "UNFINISHED")],
)  # fmt: skip
def test_how_an_answer_ended_is_said(
    store: History, tmp_path: Path, finish: str | None, words: str
) -> None:
    store.update(6, content="It is cut", token_ids=(), finish=finish)
    assert words in exported(store, tmp_path / "eyes.md").splitlines()[-1]


@pytest.mark.parametrize("name", ["eyes", "eyes.txt", "eyes.pdf"])
def test_another_suffix_names_the_three(store: History, tmp_path: Path, name: str) -> None:
    with pytest.raises(M1Error, match=r"\.md, \.html or \.json"):
        write_export(store, 1, tmp_path / name)
    assert list(tmp_path.glob("eyes*")) == []


def test_a_file_is_replaced_only_where_that_is_wanted(store: History, tmp_path: Path) -> None:
    path = tmp_path / "eyes.md"
    path.write_text("mine")
    with pytest.raises(M1Error, match=r"eyes\.md is there already.*--overwrite"):
        write_export(store, 1, path)
    assert path.read_text() == "mine"
    write_export(store, 1, path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("# Eyes")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["eyes.md"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none/eyes.md", "No such file"), ("file/eyes.md", "cannot be written"), ("dir.md", "folder")],
)
def test_a_place_that_takes_no_file_is_one_line(
    store: History, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.md").mkdir()
    with pytest.raises(M1Error, match=message) as raised:
        write_export(store, 1, tmp_path / name, overwrite=True)
    assert name.replace("/", os.sep) in str(raised.value)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    store: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "eyes.md").write_text("mine")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(M1Error, match="No space left"):
        write_export(store, 1, folder / "eyes.md", overwrite=True)
    assert [file.name for file in folder.iterdir()] == ["eyes.md"]
    assert (folder / "eyes.md").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_only_the_owner_may_read_an_export(store: History, tmp_path: Path) -> None:
    write_export(store, 1, tmp_path / "eyes.md")
    assert stat.S_IMODE((tmp_path / "eyes.md").stat().st_mode) == 0o600


def test_a_conversation_that_is_not_there_writes_nothing(store: History, tmp_path: Path) -> None:
    with pytest.raises(M1Error, match="no conversation 9"):
        write_export(store, 9, tmp_path / "eyes.md")
    assert not (tmp_path / "eyes.md").exists()
