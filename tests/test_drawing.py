"""What appears in a terminal: Markdown while it comes, an editor's lines, notes about an answer."""

import io
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from m1local.generate import Event, Finished, FinishReason, TextDelta, TurnsDropped
from m1local_app.answer_view import StoppedError, ending_line, print_answer, speed_line
from m1local_app.interrupt import typed_text
from m1local_app.line_editor import Message, PlainEditor, unfinished
from m1local_app.markdown_stream import MarkdownStream

pyte = pytest.importorskip("pyte", reason="the terminal emulator is missing: pip install -e .[dev]")

COLUMNS, LINES = 60, 12
TEXT = """\
# 高血压

High **blood pressure** has *no* symptoms:

1. headache
2. dizziness, which may be a long item that has to be wrapped because it does not fit
   - nested

| drug | dose |
|------|------|
| 阿司匹林 | 100 mg |

```python
print("<b>not bold</b>")
```

[Dose]: 5mg
[1]: https://example.org/paper

![scan](http://example.org/scan.png)

BP 120/80
HR 70

A [link](http://example.org/steal) and <script>alert(1)</script> and ~~struck~~.

Last line
"""


def shown_by(text: str, pieces: list[str]) -> list[str]:
    """What the emulator shows, scrollback included, when `pieces` are pushed."""
    screen = pyte.HistoryScreen(COLUMNS, LINES, history=1000)
    stream = pyte.Stream(screen)
    written = io.StringIO()
    console = Console(
        file=written, force_terminal=True, width=COLUMNS, height=LINES, highlight=False,
        color_system="standard", legacy_windows=False,
    )  # fmt: skip
    drawn = MarkdownStream(console)
    for piece in pieces:
        drawn._draw_at = 0.0  # draw every time
        drawn.push(piece)
    drawn.end()
    stream.feed(written.getvalue().replace("\n", "\r\n"))
    above = ["".join(row[x].data for x in range(COLUMNS)) for row in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display]]


def test_markdown_in_pieces_is_the_markdown_of_the_whole() -> None:
    whole = shown_by(TEXT, [TEXT])
    assert any("高血压" in line for line in whole)
    generator = random.Random(1)
    for _ in range(10):
        pieces, at = [], 0
        while at < len(TEXT):
            size = generator.choice((1, 2, 5, 20))
            pieces.append(TEXT[at : at + size])
            at += size
        assert shown_by(TEXT, pieces) == whole


def test_markdown_hides_nothing_and_links_nowhere() -> None:
    shown = "\n".join(shown_by(TEXT, [TEXT]))
    assert "<script>alert(1)</script>" in shown
    assert "<b>not bold</b>" in shown
    assert "example.org/steal" in shown
    assert "100 mg" in shown
    assert "[Dose]: 5mg\n[1]: https://example.org/paper" in shown
    assert "scan" in shown
    assert "example.org/scan.png" in shown
    assert "BP 120/80\nHR 70" in shown
    for word in set(re.findall(r"[\w/:.]+", TEXT)) - {"python"}:  # which only colours the code
        assert word.strip(".") in shown, word


def test_a_block_taller_than_the_window_is_whole_in_the_scrollback() -> None:
    text = "\n".join(f"- item {number}" for number in range(50))
    shown = "\n".join(shown_by(text, re.findall(r"[^\n]*\n?", text)))
    for number in range(50):
        assert shown.count(f"item {number}\n") + shown.endswith(f"item {number}") == 1


@pytest.mark.parametrize(
    ("text", "multi", "expected"),
    [
        ("hello", False, False),
        ("hello", True, True),
        ("/bye", True, False),
        ('"""', False, True),
        ('"""first', False, True),
        ('"""first\nsecond"""', False, False),
        ('""""""', False, False),
        ("", False, False),
    ],
)
def test_when_enter_begins_another_line(text: str, multi: bool, expected: bool) -> None:
    assert unfinished(text, multi=multi) is expected


def test_plain_lines_are_read_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = 'one\n"""two\nthree"""\nfour\n\n/bye\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    editor = PlainEditor()
    assert editor.read() == Message("one")
    assert editor.read() == Message("two\nthree", is_quoted=True)
    editor.multi = True
    assert editor.read() == Message("four")
    assert editor.read() == Message("/bye")
    with pytest.raises(EOFError):
        editor.read()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(">>> ")


def finished(reason: FinishReason) -> Finished:
    return Finished(
        reason=reason, prompt_tokens=30, cached_tokens=20, new_tokens=11, prefill_seconds=0.5,
        decode_seconds=2.0,
    )  # fmt: skip


def test_an_answer_goes_to_stdout_and_all_about_it_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events: list[Event] = [
        TurnsDropped(2, 40),
        TextDelta("It is", (1,)),
        TextDelta(" \x1b[31mred", (2,)),
        finished(FinishReason.LOOP),
    ]
    print_answer(iter(events), stats=True, used=lambda: (41, 100))
    said = capsys.readouterr()
    assert said.out == "It is \x1b[31mred\n"  # a pipe gets what the model wrote
    assert "no longer sees 2 older messages (40 tokens)" in said.err
    assert "repeated itself" in said.err
    assert "11 tokens, 5.0 tokens/s, first after 0.50 s (10 read)" in said.err
    assert "context 41/100 (41%)" in " ".join(said.err.split())


@pytest.mark.parametrize("reason", FinishReason)
def test_every_end_but_the_usual_one_is_said(reason: FinishReason) -> None:
    assert (ending_line(finished(reason)) is None) == (reason is FinishReason.STOP)
    assert speed_line(finished(reason), None).startswith("[11 tokens")


def test_what_was_looked_up_is_said_where_something_was() -> None:
    ended = finished(FinishReason.STOP)
    assert "looked up" not in speed_line(ended, None)
    assert "(10 read), 4 looked up]" in speed_line(replace(ended, looked_up_tokens=4), None)


def test_a_stopped_answer_stays_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def events() -> Iterator[Event]:
        yield TextDelta("as far", (1,))
        signal.raise_signal(signal.SIGINT)
        yield TextDelta(" as it came", (2,))
        raise AssertionError("nothing more is asked for")

    # Whoever started the tests in the background had SIGINT ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(StoppedError):
            print_answer(events(), stats=True)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert capsys.readouterr().out == "as far as it came\n"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("and then\x7f\x7f?", "and th?"),
        ("line\n", "line"),
        ("病\x7f病人", "病人"),
        ("\x1b[200~one\ntwo\x1b[201~ more", "one\ntwo more"),
        ("\x1b[200~cut off", "cut off"),
        ("a\x1b[A\x1b[1;5Cb\x1bOPc", "abc"),
        ("wrong\x15right", "right"),
        ("\x07\x12", ""),
    ],
)
def test_what_is_typed_during_an_answer_becomes_a_text(keys: str, text: str) -> None:
    assert typed_text(keys) == text


@pytest.mark.parametrize(
    ("message", "is_command", "unescaped"),
    [
        (Message("/help"), True, "/help"),
        (Message("/edit 1 of\ntwo lines"), True, "/edit 1 of\ntwo lines"),
        (Message("/etc/hosts says what?"), False, "/etc/hosts says what?"),
        (Message("//help"), False, "/help"),
        (Message("/home", is_quoted=True), False, "/home"),
        (Message("//x", is_quoted=True), False, "//x"),
        (Message("hello / there"), False, "hello / there"),
    ],
)
def test_what_is_a_command(message: Message, is_command: bool, unescaped: str) -> None:
    assert message.is_command is is_command
    assert message.unescaped == unescaped


def test_a_plain_editor_offers_the_question_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\nother\n"))
    assert PlainEditor().read("as it was") == Message("as it was")
    assert PlainEditor().read("as it was") == Message("other")
    assert "as it was" in capsys.readouterr().err
