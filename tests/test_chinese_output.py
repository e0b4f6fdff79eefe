"""What the checkpoint commands say in Chinese: nothing left in English, and tables in line.

Runs on the tiny random checkpoint. Errors of the library, the names of packages, recipes and files,
and what `m1 doctor` quotes of the library about its kernels are English in every language.
"""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1local_app.cli import cli
from m1local_app.columns import width
from m1local_app.kept import table
from m1local_app.language import choose
from tests.conftest import write_checkpoint

CHINESE = re.compile("[\u4e00-\u9fff]")
ENGLISH = re.compile(r"\b[a-z']+,? [a-z]+,? [a-z]+\b")  # three words, as in any sentence
PATH = re.compile(r"/\S+")
CELL = re.compile(r"\S+(?: \S+)*")  # columns have two spaces between them


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "tiny-int4"
    assert CliRunner().invoke(cli, ["quantize", str(tiny_checkpoint), str(target)]).exit_code == 0
    return target


def say(language: str, *arguments: str | Path) -> str:
    """What a command prints on stdout and stderr, in `language`."""
    given = [*map(str, arguments), "--lang", language]
    result = CliRunner().invoke(cli, given)
    assert result.exit_code == 0, result.output
    return result.output


def without_kernels(text: str) -> str:
    """`m1 doctor` without the group of kernels, whose values are the library's words."""
    return "\n\n".join(group for group in text.split("\n\n") if "int4" not in group)


def starts(line: str) -> list[int]:
    """The terminal columns where the cells of a line begin."""
    return [width(line[: cell.start()]) for cell in CELL.finditer(line)]


def check_labels(text: str) -> None:
    """Every line is a label and a value; all values begin in the same terminal column."""
    lines = [line for line in text.splitlines() if line]
    assert len(lines) > 3
    assert len({starts(line)[1] for line in lines}) == 1, text
    assert any(CHINESE.match(line.lstrip()) for line in lines)


def check_chinese(text: str) -> None:
    assert CHINESE.search(text), text
    assert not ENGLISH.search(PATH.sub("", text)), text


def test_show_is_in_chinese_and_aligned(tiny_checkpoint: Path, made: Path) -> None:
    for folder in (tiny_checkpoint, made):
        assert ENGLISH.search(say("en", "show", folder))
        shown = say("zh", "show", folder)
        check_chinese(shown)
        check_labels(shown)


def test_show_of_a_base_model_and_of_an_unmeasured_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    say("zh", "quantize", tiny_checkpoint, tmp_path / "out", "--no-certify")
    check_chinese(say("zh", "show", tmp_path / "out"))
    write_checkpoint(tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 2}')
    base = say("zh", "show", tmp_path / "base")
    check_chinese(base)
    assert "文本续写" in base


def test_a_dry_run_is_in_chinese_and_aligned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for recipe in ("int4", "int4-gptq"):
        arguments = ("quantize", tiny_checkpoint, tmp_path / "no", "--dry-run", "-r", recipe)
        assert ENGLISH.search(say("en", *arguments))
        said = say("zh", *arguments)
        check_chinese(said)
        check_labels(said)


def test_quantizing_says_in_chinese_what_was_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    check_chinese(say("zh", "quantize", tiny_checkpoint, tmp_path / "out"))
    fit = ("-r", "fit", "--budget", "110kB")
    check_chinese(say("zh", "quantize", tiny_checkpoint, tmp_path / "fit", *fit))


def test_verify_and_eval_are_in_chinese(tiny_checkpoint: Path, made: Path) -> None:
    assert ENGLISH.search(PATH.sub("", say("en", "verify", made)))
    check_chinese(say("zh", "verify", made))
    check_chinese(say("zh", "eval", "ppl", made))
    check_chinese(say("zh", "eval", "kld", made, "--source", tiny_checkpoint))


def test_doctor_is_in_chinese_and_its_groups_are_aligned() -> None:
    said = without_kernels(say("zh", "doctor", "--offline"))
    check_chinese(said)
    rows = [line for line in said.splitlines() if line.startswith("  ")]
    check_labels("\n".join(line for line in rows if "-> " not in line))
    heads = [line for line in said.splitlines() if line and not line.startswith(" ")]
    assert all(CHINESE.search(head) for head in heads), heads


def test_doctor_keeps_the_keys_of_its_json() -> None:
    said = say("zh", "doctor", "--offline", "--json")
    assert '"versions"' in said
    assert '"processor"' in said


def test_list_is_in_chinese_and_aligned_as_the_terminal_counts(
    tiny_checkpoint: Path, m1_home: Path
) -> None:
    check_chinese(say("zh", "list"))
    say("zh", "run", tiny_checkpoint, "-p", "hello", "-n", "1", "--temp", "0")
    (m1_home / "models" / "高血压").mkdir()
    said = say("zh", "list")
    check_chinese(said)
    heads, *rows = said.splitlines()
    assert all(CHINESE.search(cell) for cell in CELL.findall(heads))
    assert len(rows) == 2
    assert len(starts(heads)) == 6
    for row in rows:
        assert starts(row) == starts(heads)[: len(starts(row))], said
    choose("en")
    assert table().startswith("NAME ")
