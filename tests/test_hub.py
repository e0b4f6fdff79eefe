"""Fetching from a hub that cuts, stalls, and serves a wrong byte; all on loopback."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from m1local.errors import HubError
from m1local.manifest import CheckpointManifest
from m1local_app.cli import cli
from m1local_quantize import hub, transfer
from m1local_quantize.hub import FileFetched, Pulled, pull
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from m1local_quantize.transfer import BytesFetched
from tests.damage import refused
from tests.hub_server import Hub, hurry
from tests.test_pipeline import bytes_of

NAME = "someone/tiny-m1"


@pytest.fixture
def served(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hurry(monkeypatch)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    (folder / "modeling_baichuan.py").write_text("import os")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "LICENSE").write_text("Ask the vendor.")
    server = Hub(folder, NAME)
    yield server
    server.close()


def fetch(served: Hub, target: Path) -> list[BytesFetched | FileFetched | Pulled]:
    return list(pull(NAME, target, endpoint=served.url))


def files_only(events: Iterator[BytesFetched | FileFetched | Pulled]) -> Iterator[object]:
    return (event for event in events if not isinstance(event, BytesFetched))


def assert_same_files(served: Hub, target: Path) -> None:
    expected = bytes_of(served.folder)
    del expected["modeling_baichuan.py"], expected["pytorch_model.bin"]
    found = {path.name: path for path in target.iterdir()}
    assert found.keys() == expected.keys() | {hub.RECORD}
    assert {n: d for n, d in bytes_of(target).items() if n != hub.RECORD} == expected


def test_everything_that_is_read_is_fetched_and_nothing_else(served: Hub, tmp_path: Path) -> None:
    *files, last = fetch(served, tmp_path / "m")
    assert last == Pulled(tmp_path / "m", NAME, served.commit)
    assert_same_files(served, tmp_path / "m")
    done = [event.done_bytes for event in files if isinstance(event, FileFetched)]
    assert done == sorted(done)
    assert isinstance(files[-1], FileFetched)
    assert done[-1] == files[-1].total_bytes
    assert not any("modeling" in request for request in served.requests)
    list(quantize_checkpoint(tmp_path / "m", tmp_path / "q", Recipe.find("int8"), text=None))


def test_a_second_call_fetches_nothing_again(served: Hub, tmp_path: Path) -> None:
    fetch(served, tmp_path / "m")
    served.requests.clear()
    fetch(served, tmp_path / "m")
    assert not [request for request in served.requests if "resolve" in request]


def test_what_has_come_of_a_large_file_is_told_while_it_comes(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    served.faults = ["", "", "", "stall"]  # of the first weights
    events = fetch(served, tmp_path / "m")
    told = [event.done_bytes for event in events if not isinstance(event, Pulled)]
    whole = {event.done_bytes for event in events if isinstance(event, FileFetched)}
    assert told == sorted(told)
    assert set(told) - whole - {0}


@pytest.mark.parametrize("fault", ["cut", "stall", "503", "wrong byte"])
def test_a_fault_is_survived(served: Hub, tmp_path: Path, fault: str) -> None:
    served.faults = ["", fault, "", fault]
    fetch(served, tmp_path / "m")
    assert served.faults == []
    assert_same_files(served, tmp_path / "m")


def test_a_mirror_that_changes_files_is_named(served: Hub, tmp_path: Path) -> None:
    served.faults = ["wrong byte"] * 99
    with refused(HubError, "came twice with other bytes than the hub publishes"):
        fetch(served, tmp_path / "m")
    assert not [path for path in (tmp_path / "m").glob("*") if path.name in ("config.json",)]
    served.faults = []
    fetch(served, tmp_path / "m")
    assert_same_files(served, tmp_path / "m")


def test_a_call_that_was_cut_is_taken_up_at_the_file_it_was_at(served: Hub, tmp_path: Path) -> None:
    events = pull(NAME, tmp_path / "m", endpoint=served.url)
    list(islice(files_only(events), 3))
    events.close()  # type: ignore[attr-defined]  # a generator
    first = [r for r in served.requests if r.startswith("GET") and "resolve" in r]
    fetch(served, tmp_path / "m")
    every = [r for r in served.requests if r.startswith("GET") and "resolve" in r]
    assert len(first) == 3
    assert len(every) == len(set(every))
    assert_same_files(served, tmp_path / "m")


def test_a_damaged_file_of_the_right_size_is_noticed_only_where_it_was_never_checked(
    served: Hub, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    weights = next(served.folder.glob("*.safetensors"))
    (tmp_path / "m" / weights.name).write_bytes(b"\0" * weights.stat().st_size)
    fetch(served, tmp_path / "m")
    assert_same_files(served, tmp_path / "m")


def test_the_revision_stays_what_it_was_when_the_repository_moves_on(
    served: Hub, tmp_path: Path
) -> None:
    events = pull(NAME, tmp_path / "m", endpoint=served.url)
    list(islice(files_only(events), 2))
    events.close()  # type: ignore[attr-defined]  # a generator
    before = json.loads((tmp_path / "m" / hub.RECORD).read_text())
    assert before["revision"] == served.commit
    served.requests.clear()
    fetch(served, tmp_path / "m")
    assert any(f"/revision/{served.commit}" in request for request in served.requests)


def test_what_the_hub_refuses_is_one_clear_line(served: Hub, tmp_path: Path) -> None:
    with refused(HubError, "has no repository someone/else"):
        list(pull("someone/else", tmp_path / "m", endpoint=served.url))
    with refused(HubError, "has no repository a b"):
        list(pull("a b", tmp_path / "m", endpoint=served.url))
    served.status = 500
    with refused(HubError, "could not be fetched .* the same command goes on"):
        fetch(served, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    with refused(HubError, f"{NAME} could not be fetched"):
        list(pull(NAME, tmp_path / "m", endpoint="http://127.0.0.1:9"))


def test_a_repository_without_safetensors_is_refused(served: Hub, tmp_path: Path) -> None:
    for path in served.folder.glob("*.safetensors"):
        path.unlink()
    with refused(HubError, "holds no .safetensors file"):
        fetch(served, tmp_path / "m")


def test_a_disk_that_is_too_small_is_noticed_first(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with refused(HubError, "are still to come, but the disk"):
        fetch(served, tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.safetensors"))


@pytest.fixture
def m1(served: Hub, m1_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    return lambda *arguments: CliRunner().invoke(cli, arguments)


def test_run_fetches_quantizes_and_answers_and_needs_no_network_afterwards(
    m1: Callable[..., Result], served: Hub, m1_home: Path
) -> None:
    question = ("-p", "hello", "-n", "4", "--temp", "0")
    first = m1("run", NAME, *question)
    assert first.exit_code == 0, first.stderr
    assert "Licence: the weights of someone/tiny-m1" in first.stderr
    (kept,) = (m1_home / "models").iterdir()
    manifest = CheckpointManifest.read(kept)
    assert (manifest.source, manifest.source_revision) == (NAME, served.commit)
    assert kept.name.startswith("tiny-m1-int4-")
    assert NAME in json.loads((m1_home / "licences.json").read_text())
    served.close = lambda: None  # type: ignore[method-assign]  # closed here already
    Hub.close(served)
    second = m1("run", NAME, "--offline", *question)
    assert second.exit_code == 0, second.stderr
    assert second.stdout == first.stdout
    assert "Licence" not in second.stderr
    assert not list((m1_home / "sources").rglob("*.safetensors"))
    quantized = m1("quantize", NAME, str(m1_home / "own"), "-r", "int8", "--offline")
    assert quantized.exit_code == 1
    assert "--offline forbids to fetch them" in quantized.stderr
    assert not (m1_home / "own").exists()


def test_a_kept_source_is_there_for_the_next_recipe(
    m1: Callable[..., Result], served: Hub, m1_home: Path
) -> None:
    first = m1("quantize", NAME, str(m1_home / "a"), "-r", "int4", "--keep-source")
    assert first.exit_code == 0, first.stderr
    assert "every hash checked" in first.stderr
    second = m1("quantize", NAME, str(m1_home / "b"), "-r", "int8", "--offline")
    assert second.exit_code == 0, second.stderr
    shown = m1("show", NAME)
    assert "original, not quantized" in shown.stdout


def test_a_revision_is_quantized_as_it_arrives_and_stays_the_one(
    m1: Callable[..., Result], served: Hub, m1_home: Path
) -> None:
    first = m1("quantize", NAME, str(m1_home / "a"), "-r", "int8", "--revision", "v1")
    assert first.exit_code == 0, first.stderr
    assert any("/revision/v1" in request for request in served.requests)
    assert CheckpointManifest.read(m1_home / "a").source_revision == served.commit
    assert not list((m1_home / "sources").rglob("*.safetensors"))
    served.requests.clear()
    again = m1("quantize", NAME, str(m1_home / "b"), "-r", "int8", "--keep-source")
    assert again.exit_code == 0, again.stderr
    assert any(f"/revision/{served.commit}" in request for request in served.requests)
    served.requests.clear()
    assert m1("quantize", NAME, str(m1_home / "c"), "-r", "int8").exit_code == 0
    assert not served.requests
    other = m1("quantize", NAME, str(m1_home / "d"), "-r", "int8", "--revision", "v2", "--offline")
    assert other.exit_code == 1
    assert m1("quantize", NAME, str(m1_home / "d"), "-r", "int8", "--revision", "v2").exit_code == 0
    assert any("/revision/v2" in request for request in served.requests)


def test_a_folder_has_no_revision(m1: Callable[..., Result], tiny_checkpoint: Path) -> None:
    said = m1("quantize", str(tiny_checkpoint), "x", "--revision", "v1")
    assert said.exit_code == 2
    assert "--revision is of a repository on the hub" in said.stderr


def test_fit_keeps_the_source_and_says_so(
    m1: Callable[..., Result], served: Hub, m1_home: Path
) -> None:
    run = ("run", NAME, "-r", "fit", "--budget", "110kB", "-p", "hello", "-n", "2")
    refused_offline = m1(*run, "--offline")
    assert refused_offline.exit_code == 1
    first = m1(*run)
    assert first.exit_code == 0, first.stderr
    assert "is fetched first and kept; `m1 rm someone/tiny-m1` deletes it" in first.stderr
    assert list((m1_home / "sources").rglob("*.safetensors"))
    (kept,) = (m1_home / "models").iterdir()
    assert CheckpointManifest.read(kept).source_revision == served.commit
    again = m1(*run, "--offline")
    assert again.exit_code == 0, again.stderr
    assert "is fetched first" not in again.stderr


def test_pull_goes_on_where_it_was_cut(
    m1: Callable[..., Result], served: Hub, m1_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    served.faults = ["", "", "", "503", "503", "503", "503", "503", "503"]
    cut = m1("pull", NAME)
    assert cut.exit_code == 1
    assert "the same command goes on from there" in cut.stderr
    assert "m1 pull someone/tiny-m1" in m1("chat", NAME).stderr
    served.faults = []
    whole = m1("pull", NAME)
    assert whole.exit_code == 0
    assert f"m1 run {NAME}" in whole.stderr
    assert_same_files(served, m1_home / "sources" / "someone--tiny-m1")
    assert m1("pull", "./here").exit_code == 2
