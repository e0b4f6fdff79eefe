"""The command `m1`: what it prints where, what it leaves behind, and with which exit code.

Runs on the tiny random checkpoint, so answers are nonsense; what is tested is the way they take.
"""

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from m1local.manifest import CheckpointManifest
from m1local_app import library
from m1local_app.cli import cli
from tests.conftest import TINY, write_checkpoint

GREEDY = ("--temp", "0", "-n", "8")


def m1(*arguments: str | Path, piped: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=piped)


@pytest.fixture
def quantized(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    target = tmp_path / "tiny-int4"
    assert m1("quantize", tiny_checkpoint, target).exit_code == 0
    return target


def test_quantize_writes_a_checkpoint_and_says_how_to_chat_with_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = m1("quantize", tiny_checkpoint, tmp_path / "out", "--recipe", "int8")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert f"m1 chat {tmp_path / 'out'}" in result.stderr
    assert CheckpointManifest.read(tmp_path / "out").recipe == "int8"


@pytest.mark.parametrize("recipe", ["int4", "int4-gptq"])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, recipe: str
) -> None:
    result = m1("quantize", tiny_checkpoint, tmp_path / "out", "--dry-run", "-r", recipe)
    assert result.exit_code == 0
    assert f"recipe     {recipe}" in result.stdout
    assert "writes     0.1 MiB" in result.stdout
    assert re.search(r"computing  about [\d,]+ s", result.stdout)
    assert not (tmp_path / "out").exists()


def test_chat_answers_a_single_question_on_stdout_alone(quantized: Path) -> None:
    result = m1("chat", quantized, "-p", "hello", *GREEDY)
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert "hello" not in result.stdout
    assert "tokens/s" not in result.stdout + result.stderr


def test_statistics_go_to_stderr(quantized: Path) -> None:
    result = m1("chat", quantized, "-p", "hello", "--stats", *GREEDY)
    assert "tokens/s" in result.stderr
    assert "tokens/s" not in result.stdout


def test_options_that_would_do_nothing_are_refused(
    quantized: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    raw = m1("chat", quantized, "-p", "hello", "--raw", "--session", "x", *GREEDY)
    assert (raw.exit_code, "is kept in no conversation" in raw.stderr) == (1, True)
    ppl = m1("eval", "ppl", quantized, "--source", tmp_path)
    assert (ppl.exit_code, "ppl compares with nothing" in ppl.stderr) == (2, True)
    text = m1("quantize", tiny_checkpoint, tmp_path / "out", "--calibration", tmp_path / "none")
    assert (text.exit_code, "int4 learns from no text" in text.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_advice_in_an_emergency_goes_to_stderr(quantized: Path) -> None:
    told = m1("chat", quantized, "-p", "I have chest pain", *GREEDY)
    assert "call your local emergency number" in " ".join(told.stderr.split())
    assert "emergency number" not in told.stdout
    assert "emergency" not in m1("chat", quantized, "-p", "hello", *GREEDY).stderr
    spoken = m1("chat", quantized, *GREEDY, piped="我胸口疼")
    assert spoken.exit_code == 0
    assert "emergency number" in " ".join(spoken.stderr.split())


def test_a_piped_text_is_the_question(quantized: Path) -> None:
    piped = m1("chat", quantized, *GREEDY, piped="hello")
    asked = m1("chat", quantized, *GREEDY, "-p", "hello")
    assert piped.exit_code == 0
    assert piped.stdout == asked.stdout


def test_a_piped_text_is_added_to_the_prompt(quantized: Path) -> None:
    together = m1("chat", quantized, *GREEDY, "-p", "sum up", piped="the heart")
    asked = m1("chat", quantized, *GREEDY, "-p", "sum up\n\nthe heart")
    assert together.stdout == asked.stdout


def test_the_same_seed_gives_the_same_answer(quantized: Path) -> None:
    first, second, other = (
        m1("chat", quantized, "-p", "hello", "-n", "16", "--temp", "5", "--seed", seed).stdout
        for seed in ("7", "7", "8")
    )
    assert first == second
    assert first != other


def test_an_empty_question_is_a_usage_error(quantized: Path) -> None:
    result = m1("chat", quantized, "-p", "  ")
    assert result.exit_code == 2
    assert "there is no question" in result.stderr


def test_run_quantizes_once_and_keeps_the_result(tiny_checkpoint: Path, m1_home: Path) -> None:
    first = m1("run", tiny_checkpoint, "-p", "hello", *GREEDY)
    assert first.exit_code == 0, first.stderr
    (kept,) = (m1_home / "models").iterdir()
    manifest = (kept / "m1local.json").stat().st_mtime_ns
    second = m1("run", tiny_checkpoint, "-p", "hello", *GREEDY)
    assert second.stdout == first.stdout
    assert (kept / "m1local.json").stat().st_mtime_ns == manifest
    assert [path.name for path in (m1_home / "models").iterdir()] == [kept.name]


def test_run_makes_another_checkpoint_for_another_recipe(
    tiny_checkpoint: Path, m1_home: Path
) -> None:
    for recipe in ("int4", "int8"):
        assert m1("run", tiny_checkpoint, "-r", recipe, "-p", "hi", *GREEDY).exit_code == 0
    recipes = {CheckpointManifest.read(path).recipe for path in (m1_home / "models").iterdir()}
    assert recipes == {"int4", "int8"}


def test_run_notices_that_a_source_of_the_same_name_changed(m1_home: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    write_checkpoint(source, seed=1)
    m1("run", source, "-p", "hi", *GREEDY)
    write_checkpoint(source, seed=2)
    m1("run", source, "-p", "hi", *GREEDY)
    assert len(list((m1_home / "models").iterdir())) == 2


def test_a_kept_checkpoint_is_found_by_its_name(tiny_checkpoint: Path, m1_home: Path) -> None:
    m1("run", tiny_checkpoint, "-p", "hi", *GREEDY)
    (kept,) = (m1_home / "models").iterdir()
    assert m1("chat", kept.name, "-p", "hi", *GREEDY).exit_code == 0


def test_run_without_a_model_is_the_demo_and_says_so(m1_home: Path) -> None:
    if not (library.find(None).folder / "model.safetensors").exists():
        pytest.skip("the demo's weights are not in this checkout")
    result = m1("run", "-p", "What is glaucoma?", *GREEDY)
    assert result.exit_code == 0
    assert "demo" in result.stderr
    assert "Baichuan-M1-14B-Instruct" in result.stderr
    assert result.stdout.strip()


def test_a_base_model_continues_the_text(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_checkpoint(base)
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    plain = m1("chat", base, "-p", "The heart", *GREEDY)
    assert plain.exit_code == 0
    assert plain.stdout == m1("chat", base, "--raw", "-p", "The heart", *GREEDY).stdout


def test_show_names_recipe_formats_and_size(quantized: Path) -> None:
    result = m1("show", quantized)
    assert result.exit_code == 0
    wanted = ("int4 (refit)", "int4 g64", "bits per weight", "window 8", "NOTICE", "tiny-m1")
    for expected in wanted:
        assert expected in result.stdout


def test_show_of_an_original_says_that_it_is_one(tiny_checkpoint: Path) -> None:
    assert "original, not quantized" in m1("show", tiny_checkpoint).stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("chat", "/nowhere/at/all"), "There is no folder"),
        (("chat", "no-such-name"), "no checkpoint of that name"),
        (("chat", "baichuan-inc/Baichuan-M1-14B-Instruct"), "m1 pull baichuan-inc/"),
        (("run", "a/b", "--offline", "-p", "hi"), "not on this disk yet"),
        (("show", "/"), "config.json"),
    ],
    ids=["folder", "name", "repository", "offline", "foreign folder"],
)
def test_a_model_that_is_not_there_is_one_line(
    arguments: tuple[str, ...], expected: str, m1_home: Path
) -> None:
    result = m1(*arguments)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--temp", "-1"), "temperature is -1"),
        (("--top-p", "0"), "top-p is 0"),
        (("--top-k", "-1"), "top-k is -1"),
        (("--min-p", "2"), "min-p is 2"),
        (("--repeat-penalty", "0"), "repeat-penalty is 0"),
        (("--seed", "-5"), "seed is -5"),
        (("--ctx-size", "100000"), "--ctx-size"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_flag_out_of_its_range_is_one_line(
    quantized: Path, flags: tuple[str, ...], expected: str
) -> None:
    result = m1("chat", quantized, "-p", "hi", *flags)
    assert result.exit_code == (1 if flags[0] == "--ctx-size" else 2)  # that depends on the model
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_flag_is_a_usage_error(quantized: Path) -> None:
    assert m1("chat", quantized, "--no-such-flag").exit_code == 2
    assert m1("quantize", quantized).exit_code == 2


def test_a_prompt_longer_than_the_context_is_one_line(quantized: Path) -> None:
    result = m1("chat", quantized, "-c", "32", "-p", "hello " * 40)
    assert result.exit_code == 1
    assert "The prompt has" in result.stderr
    assert "--ctx-size" in result.stderr
    assert result.stdout == ""


def test_an_occupied_target_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    result = m1("quantize", tiny_checkpoint, tmp_path)
    assert result.exit_code == 1
    assert "holds other files" in result.stderr
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_overwrite_replaces_a_checkpoint(quantized: Path, tiny_checkpoint: Path) -> None:
    refused = m1("quantize", tiny_checkpoint, quantized, "-r", "int8")
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert CheckpointManifest.read(quantized).recipe == "int4"
    assert m1("quantize", tiny_checkpoint, quantized, "-r", "int8", "--overwrite").exit_code == 0
    assert CheckpointManifest.read(quantized).recipe == "int8"


def test_an_unknown_recipe_names_the_known_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = m1("quantize", tiny_checkpoint, tmp_path / "out", "-r", "int3")
    assert result.exit_code == 1
    assert "bnb-nf4" in result.stderr
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_are_one_line(tmp_path: Path) -> None:
    source = tmp_path / "narrow"
    write_checkpoint(source, TINY | {"intermediate_size": 96})
    result = m1("quantize", source, tmp_path / "out")
    assert result.exit_code == 1
    assert "do not divide its 96 columns" in result.stderr
    assert not (tmp_path / "out").exists()


def test_version_and_help_answer() -> None:
    assert m1("--version").stdout.startswith("m1local ")
    for command in ("run", "chat", "ui", "quantize", "show"):
        assert command in m1("--help").stdout
        assert "xample" in m1(command, "--help").stdout


def test_no_help_says_a_default_twice() -> None:
    commands = get_command(cli).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        for option in command.params:
            own = "(default" in (option.help or "")
            assert not (own and option.show_default and option.default is not None), (name, option)


def test_what_fetches_says_that_a_model_on_the_hub_may_be_named() -> None:
    for command in ("run", "ui"):
        assert "OWNER/NAME" in m1(command, "--help").stdout


def test_a_mistake_in_a_flag_is_found_before_anything_is_quantized(
    tiny_checkpoint: Path, m1_home: Path
) -> None:
    assert m1("run", tiny_checkpoint, "-p", "hi", "--temp", "999").exit_code == 2
    assert m1("run", tiny_checkpoint, "-p", " ").exit_code == 2
    assert m1("run", tiny_checkpoint, "-p", "hi", "-r", "int3").exit_code == 1
    assert not m1_home.exists()


def test_another_recipe_than_a_checkpoint_was_made_by_is_refused(quantized: Path) -> None:
    result = m1("run", quantized, "-r", "int8", "-p", "hi")
    assert result.exit_code == 2
    assert "quantized by the recipe int4" in result.stderr
    assert m1("run", quantized, "-r", "int4", "-p", "hi", *GREEDY).exit_code == 0


def test_a_question_in_the_place_of_the_model_is_not_repeated(m1_home: Path) -> None:
    result = m1("run", "What is glaucoma? " * 30)
    assert result.exit_code == 1
    assert "a question goes after -p" in result.stderr
    assert len(result.stderr) < 400


def test_files_of_the_system_change_nothing(tmp_path: Path, m1_home: Path) -> None:
    source = tmp_path / "model"
    write_checkpoint(source)
    m1("run", source, "-p", "hi", *GREEDY)
    (source / ".DS_Store").write_text("x")
    m1("run", source, "-p", "hi", *GREEDY)
    assert len(list((m1_home / "models").iterdir())) == 1
