"""The chat in a real pseudo-terminal, seen through a terminal emulator."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)
import termios

pytest.importorskip("pyte", reason="the terminal emulator is missing: pip install -e .[dev]")

from m1local_app.history import History
from tests.conftest import TINY, lend_library, write_checkpoint
from tests.screen import Screen

# Tokens at the pace of a real model, so that there is time to press keys.
SLOW = """
import time
from m1local.context import Context
feed = Context.feed
def slowly(self, token_ids):
    time.sleep(0.02 if len(token_ids) == 1 else 0.3)
    return feed(self, token_ids)
Context.feed = slowly
"""
Start = Callable[..., Screen]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    write_checkpoint(folder, TINY | {"max_position_embeddings": 32768}, endless=True)
    (folder / "generation_config.json").write_text(
        '{"assistant_token_id": 7, "temperature": 1.0, "max_new_tokens": 20000}'
    )
    return folder


@pytest.fixture
def start(endless: Path, m1_home: Path) -> Iterator[Start]:
    """Begins `m1 chat` on it, and waits for the prompt."""
    lend_library(m1_home)
    begun: list[Screen] = []

    def begin(*arguments: str, **environment: str) -> Screen:
        command = ["chat", str(endless), "-c", "32768", *arguments]
        screen = Screen(command, {"M1_HOME": str(m1_home)} | environment, SLOW)
        begun.append(screen)
        screen.wait_for("not medical advice")
        screen.wait_for(r"(?m)^>>>")
        screen.settle()
        return screen

    yield begin
    for screen in begun:
        screen.close()


def test_ctrl_c_stops_the_answer_and_the_next_question_is_answered(start: Start) -> None:
    screen = start()
    for number, question in enumerate(("hello", "and now?"), 1):
        screen.type(f"{question}\r")
        screen.stop(number)
    assert screen.text().count("\n>>> ") == 3
    screen.type("/bye\r")
    assert screen.exit_code() == 0


def test_text_appears_while_it_is_made(start: Start) -> None:
    screen = start("-n", "60")
    screen.type("hello\r")
    assert len(screen.shown_until("its limit")) > 10


def test_ctrl_c_twice_at_the_empty_prompt_leaves_with_130(start: Start) -> None:
    screen = start()
    screen.type("a draft\x03")  # which only empties the line
    screen.settle()
    assert "Ctrl-C again leaves" not in screen.text()
    screen.type("\x03")
    screen.wait_for("Ctrl-C again leaves")
    screen.prompt(2)
    screen.type("another\x03")
    screen.settle()
    screen.type("\x03")
    screen.wait_for("Ctrl-C again leaves", times=2)
    screen.prompt(3)
    screen.type("\x03")
    assert screen.exit_code() == 130


def test_ctrl_c_held_down_stops_the_answer_and_no_more(start: Start) -> None:
    screen = start()
    screen.type("hello\r")
    screen.wait_for_answer()
    for _ in range(3):
        screen.type("\x03")
        time.sleep(0.05)
    screen.wait_for(r"\[stopped\]")
    screen.settle()
    screen.type("still here\r")
    screen.stop(2)


def test_lines_pasted_during_an_answer_wait_and_are_not_sent(start: Start) -> None:
    screen = start("-n", "150")
    screen.type("hello\r")
    screen.wait_for_answer()
    pasted = "Patient A, 57\nBP 150/90\n" + "and more " * 800
    screen.paste(pasted)
    screen.wait_for("its limit")
    screen.settle(1)
    screen.type("the end\r")
    screen.wait_for("its limit", times=2)
    with History.open() as history:
        assert history.user_texts() == ["hello", f"{pasted}the end"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_end_by_the_system_gives_the_terminal_back(start: Start, name: str) -> None:
    screen = start()
    screen.type("hello\r")
    screen.wait_for_answer()
    os.kill(screen.pid, getattr(signal, name))
    assert screen.exit_code() == 128 + getattr(signal, name)
    flags = termios.tcgetattr(screen.terminal)[3]
    assert flags & termios.ECHO
    assert flags & termios.ICANON
    assert screen.sent.rfind(b"\x1b[?25h") > screen.sent.rfind(b"\x1b[?25l")  # the cursor
    with History.open() as history:
        (found,) = history.conversations()
        assert history.path(found.id)[-1].finish == "cancelled"


def test_a_command_is_one_also_while_a_question_is_edited(start: Start) -> None:
    screen = start("-n", "10")
    screen.type("/etc/hosts says what?\r")
    screen.wait_for("its limit")
    screen.settle()
    screen.type("/edit\r")
    screen.wait_for("Question 1 is edited")
    screen.wait_for(r">>> /etc/hosts")
    screen.settle()
    screen.type("\x15/history\r")
    screen.wait_for("  1  /etc/hosts")
    screen.settle()
    screen.type("next\r")
    screen.wait_for("its limit", times=2)
    with History.open() as history:
        (found,) = history.conversations()
        questions = [one.content for one in history.path(found.id) if one.role == "user"]
        assert questions == ["/etc/hosts says what?", "next"]


def test_chinese_is_edited_by_whole_characters(start: Start) -> None:
    screen = start()
    screen.type("高血压病是什么")
    screen.settle()
    screen.type("\x7f\x7f\x7f")
    screen.settle()
    assert ">>> 高血压病" in screen.text()
    assert "是" not in screen.text()
    screen.type("\x1b[D\x1b[D症\r")  # two to the left, and one more
    screen.stop()
    assert ">>> 高血症压病" in screen.text()


def test_a_long_chinese_line_wraps_and_comes_back(start: Start) -> None:
    screen = start()
    screen.type("病" * 60)
    screen.settle()
    assert screen.text().count("病") == 60
    screen.type("\x7f" * 30)
    screen.settle()
    assert screen.text().count("病") == 30


def test_two_hundred_pasted_lines_are_one_message(start: Start, m1_home: Path) -> None:
    screen = start()
    pasted = "\n".join(f"line {number} 第{number}行" for number in range(200))
    screen.paste(pasted)
    screen.settle(1)
    assert "[stopped]" not in screen.text()
    screen.type("\r")
    screen.stop()
    with History.open() as history:
        assert history.user_texts() == [pasted]


def test_a_question_that_was_stopped_before_its_answer_is_there_again(start: Start) -> None:
    screen = start()
    screen.type("/set predict 10\r")
    screen.wait_for("predict +10")
    screen.paste(" ".join(f"word{number}" for number in range(150)))
    screen.settle()
    screen.type(" the end\r")
    screen.wait_for("reading")
    screen.type("\x03")
    screen.wait_for(r"\[stopped\]")
    screen.wait_for(r"(?s)\[stopped\]\n\[no answer.*?\n>>> word0 .*the end")


def test_a_message_may_have_several_lines(start: Start) -> None:
    screen = start()
    screen.type('"""first\r')
    screen.wait_for(r"(?m)^\.\.\.")
    screen.type('second"""\r')
    screen.stop()
    screen.type("one\x1b\rtwo\r")  # Alt-Enter
    screen.stop(2)
    with History.open() as history:
        assert history.user_texts() == ["first\nsecond", "one\ntwo"]


def test_an_earlier_message_is_edited(start: Start) -> None:
    screen = start()
    screen.type("first question\r")
    screen.stop()
    screen.type("second question\r")
    screen.stop(2)
    screen.type("/edit 1\r")
    screen.wait_for(r">>> first question", times=2)
    screen.type("\x17\x17other words\r")
    screen.stop(3)
    with History.open() as history:
        (found,) = history.conversations()
        assert [m.content for m in history.path(found.id) if m.role == "user"] == ["other words"]
        assert len(history.messages(found.id)) == 6


def test_what_is_typed_during_an_answer_waits_for_the_prompt(start: Start) -> None:
    screen = start("-n", "60")
    screen.type("hello\r")
    screen.wait_for_answer()
    screen.type("typed ahead")
    screen.wait_for("its limit")
    screen.wait_for(">>> typed ahead")
    assert screen.text().count("typed ahead") == 1


def test_a_window_that_changes_its_size_shows_the_answer_once(start: Start) -> None:
    screen = start("-n", "150")
    screen.type("hello\r")
    screen.wait_for_answer()
    for columns, lines in ((50, 30), (100, 40)):
        screen.resize(columns, lines)
        time.sleep(0.5)
    screen.wait_for("its limit")
    screen.settle()
    # An answer shown again begins alike; two lines of it may begin with the same word.
    begins = [line[:20] for line in screen.visible() if len(line) > 20]
    assert len(begins) > 4
    assert len(begins) == len(set(begins)), screen.text()
    screen.type("\x1b[A")  # the last message, from the history of the editor
    screen.wait_for(">>> hello")


def test_the_latest_conversation_goes_on(start: Start) -> None:
    first = start("-n", "20")
    first.type("remember the word glaucoma\r")
    first.prompt(2)
    first.type("\x04")
    assert first.exit_code() == 0
    again = start("--continue", "-n", "20")
    again.type("/history\r")
    again.wait_for("  1  remember the word glaucoma")


def test_a_killed_answer_is_there_as_far_as_it_came(start: Start) -> None:
    first = start()
    first.type("hello\r")
    first.wait_for_answer()
    time.sleep(2)
    first.kill()
    with History.open() as history:
        (found,) = history.conversations()
        question, answer = history.path(found.id)
        assert (question.content, answer.finish) == ("hello", None)
        assert len(answer.content) > 10
    again = start("--continue")
    again.type("/history\r")
    again.wait_for("  1  hello")
    again.settle()
    again.type("/retry\r")
    again.stop()
    with History.open() as history:
        assert len(history.versions(answer.id)) == 2


def test_nothing_is_kept_without_history(start: Start, m1_home: Path) -> None:
    screen = start("--no-history")
    screen.type("a secret\r")
    screen.stop()
    screen.type("/bye\r")
    assert screen.exit_code() == 0
    kept = [path for path in m1_home.rglob("*") if path.is_file()]
    assert all(b"a secret" not in path.read_bytes() for path in kept)
    assert not (m1_home / "history.db").exists()


def test_no_colour_where_none_is_wanted(start: Start) -> None:
    screen = start(NO_COLOR="1")
    screen.type("/nonsense\r")
    screen.wait_for("no command /nonsense")
    assert b"\x1b[31m" not in screen.sent
    assert b"\x1b[38" not in screen.sent


def test_a_dumb_terminal_is_served_plainly(start: Start) -> None:
    screen = start(TERM="dumb")
    screen.type("hello\r")
    screen.stop()
    assert b"\x1b" not in screen.sent


def test_a_message_is_written_in_the_editor(start: Start, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "of several\\nlines, 中文" >> "$1"\n')
    editor.chmod(0o755)
    screen = start(EDITOR=str(editor), VISUAL=str(editor))
    screen.type("begun \x07")  # Ctrl-G
    screen.wait_for("lines, 中文")
    screen.settle()
    screen.type("\r")
    screen.stop()
    with History.open() as history:
        assert history.user_texts() == ["begun of several\nlines, 中文"]


def test_commands_and_paths_are_completed(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a note about asthma.txt").write_text("Asthma makes breathing hard.")
    screen = start("-n", "20")
    screen.type("/rea\t")
    screen.wait_for(">>> /read")
    screen.type(f" {tmp_path}/a not\t")
    screen.wait_for(r"\n?".join(map(re.escape, "about asthma.txt")))  # a long path is wrapped
    screen.settle()
    screen.type("\r")
    screen.wait_for("its limit")
    with History.open() as history:
        assert history.user_texts() == ["Asthma makes breathing hard."]


def test_what_was_asked_in_an_earlier_session_is_searched(start: Start) -> None:
    first = start("-n", "10")
    for question in ("what is glaucoma", "what is asthma"):
        first.type(f"{question}\r")
        first.wait_for(rf"(?s){question}.*its limit")
        first.settle()
    first.type("/bye\r")
    assert first.exit_code() == 0
    again = start("-n", "10")
    again.type("\x12glau")  # Ctrl-R
    again.wait_for("what is glaucoma")
    again.settle()
    again.type("\r\r")
    again.wait_for("its limit")
    with History.open() as history:
        assert history.user_texts().count("what is glaucoma") == 2


def test_a_named_session_is_begun_and_gone_on_with(start: Start) -> None:
    for number, question in enumerate(("the first", "the second"), 1):
        screen = start("--session", "rounds", "-n", "10")
        screen.type(f"{question}\r")
        screen.wait_for("its limit")
        screen.settle()
        screen.type("/history\r")
        screen.wait_for(rf"  {number}  {question}")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    with History.open() as history:
        assert [found.title for found in history.conversations()] == ["rounds"]


def test_enter_begins_another_line_where_that_is_wanted(start: Start) -> None:
    screen = start("-n", "10")
    screen.type("/multi\r")
    screen.wait_for("Alt-Enter sends")
    screen.settle()
    screen.type("one\rtwo")
    screen.wait_for(r"\.\.\. two")
    screen.type("\x1b\r")
    screen.wait_for("its limit")
    with History.open() as history:
        assert history.user_texts() == ["one\ntwo"]
