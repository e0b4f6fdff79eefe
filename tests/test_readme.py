"""The README is true: tables come from committed results, commands exist, its Python runs."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import readme
from m1local_app.cli import cli
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe, shipped_recipes
from tests.conftest import ROOT, write_checkpoint

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_results_say() -> None:
    assert readme.render(TEXT) == TEXT, "run `python -m bench.readme`"
    assert "| `int4` |" in TEXT


def test_every_shipped_recipe_was_measured() -> None:
    measured = {
        name: {
            found[1]
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
            if (found := re.match(r"`?([\w-]+)`?(,|$)", row["recipe"]))
        }
        for name, path in ((n, readme.RESULTS / f"{n}.json") for n in ("quality", "memory"))
    }
    assert set(shipped_recipes()) <= measured["quality"]
    assert {"int4", "int8"} <= measured["memory"] <= set(shipped_recipes())


def test_the_command_table_is_that_of_the_help() -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", CliRunner().invoke(cli, ["--help"]).stdout).split())
    commands = re.findall(r"^\| `m1 (\w+)` \| (.+) \|$", TEXT, re.MULTILINE)
    assert len(commands) >= 5
    for name, summary in commands:
        assert f"{name} {summary}" in shown


def test_every_recipe_is_named() -> None:
    for recipe in shipped_recipes():
        assert f"`{recipe}`" in TEXT


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    write_checkpoint(tmp_path / "original", endless=True)  # an answer may not be empty here
    for _ in quantize_checkpoint(tmp_path / "original", tmp_path / "m1-int4", Recipe.find("int4")):
        pass
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, "README.md", "exec"), {})
    assert shown.getvalue().strip()


def test_files_it_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (ROOT / target).exists(), target
