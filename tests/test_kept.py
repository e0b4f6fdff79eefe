"""`m1 list` and `m1 rm`: what is kept, and that nothing of the user's is deleted."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from m1local_app import boundary
from m1local_app.cli import cli
from m1local_app.web.models import _names
from m1local_quantize.hub import RECORD, Record, alone, pull
from m1local_quantize.journal import LOCK
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.hub_server import Hub
from tests.test_pipeline import bytes_of

REPOSITORY = "someone/tiny-int8"


def m1(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=typed)


@pytest.fixture
def kept(tiny_checkpoint: Path, m1_home: Path) -> Path:
    folder = m1_home / "models" / "tiny-int8"
    list(quantize_checkpoint(tiny_checkpoint, folder, Recipe.find("int8")))
    return folder


def test_list_says_that_nothing_is_kept(m1_home: Path) -> None:
    result = m1("list")
    assert result.exit_code == 0
    assert "Nothing is kept" in result.stdout


def test_list_shows_size_recipe_and_quality_of_each(
    kept: Path, tiny_checkpoint: Path, m1_home: Path
) -> None:
    unfinished = quantize_checkpoint(
        tiny_checkpoint, kept.with_name("a-half-done"), Recipe.find("int4")
    )
    list(islice(unfinished, 5))
    unfinished.close()  # type: ignore[attr-defined]  # a generator
    damaged = kept.with_name("odd")
    damaged.mkdir()
    (damaged / "m1local.json").write_text("{")
    head, first, second, third = m1("list").stdout.splitlines()
    assert head.split()[:4] == ["NAME", "ORIGIN", "SIZE", "RECIPE"]
    assert "made here" in third
    assert first.split()[0] == "a-half-done"
    assert "unfinished" in first
    assert second.split()[0] == "odd"
    assert "damaged" in second
    assert third.split()[0] == "tiny-int8"
    assert "MiB  int8" in third
    assert third.endswith("%")
    assert head.index("RECIPE") == third.index("int8", 30) == first.index("unfinished")


@pytest.mark.parametrize("finished", [True, False])
def test_rm_deletes_a_checkpoint_and_nothing_beside_it(
    kept: Path, tiny_checkpoint: Path, finished: bool
) -> None:
    source, name = bytes_of(tiny_checkpoint), kept.name
    if not finished:
        name = "half"
        run = quantize_checkpoint(tiny_checkpoint, kept.with_name(name), Recipe.find("int4"))
        list(islice(run, 5))
        run.close()  # type: ignore[attr-defined]  # a generator
    result = m1("rm", name, "--yes")
    assert result.exit_code == 0
    assert "freed" in result.stderr
    assert not kept.with_name(name).exists()
    assert kept.exists() != finished
    assert bytes_of(tiny_checkpoint) == source


def test_rm_asks_first(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = m1("rm", kept.name)
    assert (nobody.exit_code, "add --yes" in nobody.stderr) == (2, True)
    monkeypatch.setattr(boundary, "is_terminal", lambda: True)
    assert m1("rm", kept.name, typed="n\n").exit_code == 1
    assert kept.exists()
    assert m1("rm", kept.name, typed="y\n").exit_code == 0
    assert not kept.exists()


@pytest.mark.parametrize("name", ["none", "../models/tiny-int8", "..", "/"])
def test_rm_knows_only_the_names_that_are_listed(kept: Path, name: str) -> None:
    result = m1("rm", name, "--yes")
    assert result.exit_code == 1
    assert "there is tiny-int8" in result.stderr
    assert kept.exists()


def test_rm_keeps_a_folder_with_a_file_of_the_users(kept: Path) -> None:
    (kept / "notes.txt").write_text("mine")
    before = bytes_of(kept)
    result = m1("rm", kept.name, "--yes")
    assert result.exit_code == 1
    assert "notes.txt" in result.stderr
    assert bytes_of(kept) == before


def test_rm_leaves_alone_what_a_run_is_writing(kept: Path) -> None:
    with FileLock(kept / LOCK):
        result = m1("rm", kept.name, "--yes")
    assert result.exit_code == 1
    assert "is writing" in result.stderr
    assert (kept / "m1local.json").exists()


def test_rm_of_a_folder_that_is_no_checkpoint_is_refused(m1_home: Path) -> None:
    folder = m1_home / "models" / "photos"
    folder.mkdir(parents=True)
    (folder / "me.jpg").write_text("x")
    result = m1("rm", "photos", "--yes")
    assert result.exit_code == 1
    assert "holds no checkpoint" in result.stderr
    assert (folder / "me.jpg").exists()


@pytest.fixture
def pulled(kept: Path, m1_home: Path) -> Path:
    """The checkpoint as another machine would pull it."""
    folder = m1_home / "sources" / "someone--tiny-int8"
    server = Hub(kept, REPOSITORY)
    list(pull(REPOSITORY, folder, endpoint=server.url))
    server.close()
    return folder


def test_a_pulled_checkpoint_is_listed_and_can_be_chosen(pulled: Path, kept: Path) -> None:
    _, made, line = m1("list").stdout.splitlines()
    assert made.startswith(kept.name)
    assert line.startswith(f"{REPOSITORY}  pulled")
    assert "MiB  int8" in line
    assert line.endswith("%")
    assert _names() == ["m1-tiny", kept.name, REPOSITORY]
    assert m1("show", REPOSITORY).exit_code == 0


def test_a_pulled_checkpoint_that_is_not_whole_is_not_offered(pulled: Path, kept: Path) -> None:
    record = Record.read(pulled)
    assert record is not None
    replace(record, complete=False).write(pulled)
    assert "unfinished" in m1("list").stdout
    assert _names() == ["m1-tiny", kept.name]


def test_a_pulled_original_is_listed_but_not_offered(tiny_checkpoint: Path, m1_home: Path) -> None:
    server, folder = Hub(tiny_checkpoint, "someone/tiny"), m1_home / "sources" / "someone--tiny"
    list(pull("someone/tiny", folder, endpoint=server.url, weights=False))
    assert "Nothing is kept" in m1("list").stdout  # a description, and nothing of size
    events = pull("someone/tiny", folder, endpoint=server.url)
    while not list(folder.glob("*.safetensors")):
        next(events)
    events.close()  # type: ignore[attr-defined]  # a generator
    assert "unfinished" in m1("list").stdout
    list(pull("someone/tiny", folder, endpoint=server.url))
    server.close()
    assert "original" in m1("list").stdout
    assert _names() == ["m1-tiny"]
    assert m1("rm", "someone/tiny", "--yes").exit_code == 0
    assert list((m1_home / "sources").iterdir()) == []


def test_rm_of_a_pulled_one_asks_and_deletes_all_of_it(
    pulled: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "is_terminal", lambda: True)
    assert m1("rm", REPOSITORY, typed="n\n").exit_code == 1
    assert (pulled / RECORD).is_file()
    result = m1("rm", REPOSITORY, typed="y\n")
    assert result.exit_code == 0
    assert "freed" in result.stderr
    assert list(pulled.parent.iterdir()) == []
    assert kept.exists()
    assert REPOSITORY not in m1("list").stdout


def test_rm_of_a_pulled_one_keeps_what_is_not_ours(pulled: Path) -> None:
    (pulled / "notes.txt").write_text("mine")
    before = bytes_of(pulled)
    result = m1("rm", REPOSITORY, "--yes")
    assert result.exit_code == 1
    assert "notes.txt" in result.stderr
    assert bytes_of(pulled) == before
    (pulled / "notes.txt").unlink()
    (pulled / "photos").mkdir()
    assert m1("rm", REPOSITORY, "--yes").exit_code == 1
    assert (pulled / "photos").is_dir()


def test_rm_leaves_alone_what_is_being_fetched(pulled: Path) -> None:
    before = bytes_of(pulled)
    with alone(pulled):
        result = m1("rm", REPOSITORY, "--yes")
    assert result.exit_code == 1
    assert "Another run is fetching" in result.stderr
    assert bytes_of(pulled) == before


def test_a_removal_that_was_cut_is_no_checkpoint_and_can_be_ended(
    pulled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def upset(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "in use")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", upset)
        result = m1("rm", REPOSITORY, "--yes")
    assert result.exit_code == 1
    assert "close what uses it" in result.stderr
    record = Record.read(pulled)
    assert record is not None
    assert not record.complete
    assert "unfinished" in m1("list").stdout
    assert m1("rm", REPOSITORY, "--yes").exit_code == 0
    assert not pulled.exists()


def test_a_record_of_another_folder_is_not_believed(pulled: Path) -> None:
    moved = pulled.rename(pulled.with_name("elsewhere"))
    assert REPOSITORY not in m1("list").stdout
    assert m1("rm", REPOSITORY, "--yes").exit_code == 1
    assert (moved / RECORD).is_file()
