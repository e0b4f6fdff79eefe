"""Quantizing while fetching: the same bytes as from a folder, never the whole source on disk."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m1local.errors import CheckpointError, HubError
from m1local_quantize import transfer
from m1local_quantize.arriving import ArrivingFiles
from m1local_quantize.convert import Converter
from m1local_quantize.estimate import estimate
from m1local_quantize.hub import RECORD, Repository, missing_bytes, pull
from m1local_quantize.journal import HIDDEN
from m1local_quantize.passage import TensorWritten
from m1local_quantize.pipeline import Planned, Stage, quantize_checkpoint
from m1local_quantize.plan import Plan, Step
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source
from m1local_quantize.transfer import BytesFetched
from tests.conftest import ROOT, TINY, lend_library, write_checkpoint
from tests.damage import refused
from tests.hub_server import Hub, hurry
from tests.test_pipeline import bytes_of

NAME = "someone/tiny-m1"
SHARD_BYTES = 40_000
FILES = 4  # each longer than a layer, so that none lies in three of them


def in_layer_order(folder: Path, files: int) -> None:
    """Write the weights again as such files are published: in the order of the layers."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    names = sorted(tensors, key=lambda n: (n == "lm_head.weight", n == "model.norm.weight", n))
    per_file = -(-len(names) // files)
    for number in range(files):
        part = {n: tensors[n] for n in names[number * per_file : (number + 1) * per_file]}
        save_file(part, folder / f"model-{number + 1:05d}-of-{files:05d}.safetensors")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hurry(monkeypatch)
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)
    write_checkpoint(tmp_path / "served", TINY)
    in_layer_order(tmp_path / "served", FILES)
    server = Hub(tmp_path / "served", NAME)
    yield server
    server.close()


def arriving(served: Hub, folder: Path) -> Source:
    """The repository as a source whose weights are still to come."""
    list(pull(NAME, folder, endpoint=served.url, weights=False))
    assert not list(folder.glob("*.safetensors"))
    return opened(served, folder)


def opened(served: Hub, folder: Path) -> Source:
    found = Repository.find(NAME, folder, endpoint=served.url)
    return Source.open(folder, ArrivingFiles.of(found))


def run(source: Source, target: Path, recipe: str = "int4") -> Iterator[Stage]:
    return quantize_checkpoint(source, target, Recipe.find(recipe), shard_bytes=SHARD_BYTES)


@pytest.fixture
def expected(served: Hub, tmp_path: Path) -> dict[str, str]:
    """What comes of the same files fetched whole."""
    list(pull(NAME, tmp_path / "whole", endpoint=served.url))
    list(run(Source.open(tmp_path / "whole"), tmp_path / "expected"))
    served.requests.clear()
    return bytes_of(tmp_path / "expected")


def test_the_bytes_are_those_of_a_source_that_was_fetched_whole(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    source = arriving(served, tmp_path / "m")
    for _ in run(source, tmp_path / "out"):
        pass
    assert bytes_of(tmp_path / "out") == expected
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        *(path.name for path in served.folder.iterdir() if path.suffix != ".safetensors"),
        RECORD,
    }
    fetched = [r for r in served.requests if r.startswith("GET") and "safetensors" in r]
    assert len(fetched) == 2 * FILES  # once the header, once the file


def test_two_files_lie_on_the_disk_at_most(served: Hub, tmp_path: Path) -> None:
    most = 0
    for _ in run(arriving(served, tmp_path / "m"), tmp_path / "out"):
        most = max(most, len(list((tmp_path / "m").rglob("*.safetensors"))))
    assert most == 2


def test_the_next_file_comes_while_this_one_is_quantized(served: Hub, tmp_path: Path) -> None:
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    written = next(event for event in events if isinstance(event, TensorWritten))
    wanted = f"GET /{NAME}/resolve/{served.commit}/model-00002-of-0000{FILES}.safetensors"
    for _ in range(200):
        if served.requests.count(wanted) == 2:
            break
        time.sleep(0.01)
    assert served.requests.count(wanted) == 2
    assert written.name == "model.embed_tokens.weight"
    events.close()  # type: ignore[attr-defined]  # a generator


def test_files_in_another_order_are_fetched_once_too(tmp_path: Path, served: Hub) -> None:
    shutil.rmtree(served.folder)
    write_checkpoint(served.folder, TINY)  # two files, by the alphabet: the head comes first
    list(pull(NAME, tmp_path / "whole", endpoint=served.url))
    list(run(Source.open(tmp_path / "whole"), tmp_path / "expected"))
    served.requests.clear()
    list(run(arriving(served, tmp_path / "m"), tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "expected")
    fetched = [r for r in served.requests if r.startswith("GET") and "safetensors" in r]
    assert len([r for r in fetched if "index" not in r]) == 2 * 2


@pytest.mark.parametrize("recipe", ["int4", "int4-gptq"])
@pytest.mark.parametrize("tensors", [0, 1, 12, 25, 38, 39])
def test_a_run_that_was_cut_goes_on_without_what_was_dropped(
    served: Hub, tmp_path: Path, recipe: str, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(pull(NAME, tmp_path / "whole", endpoint=served.url))
    list(run(Source.open(tmp_path / "whole"), tmp_path / "expected", recipe))
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out", recipe)
    written = (event for event in events if isinstance(event, TensorWritten))
    assert len(list(islice(written, tensors))) == tensors
    events.close()  # type: ignore[attr-defined]  # a generator
    dropped = served_weights(served) - {p.name for p in (tmp_path / "m").glob("*.safetensors")}
    served.requests.clear()
    converted: list[str] = []
    convert = Converter.convert

    def counted(self: Converter, step: Step) -> Iterator[tuple[str, torch.Tensor]]:
        converted.append(step.name)
        return convert(self, step)

    monkeypatch.setattr(Converter, "convert", counted)
    planned = next(events := run(opened(served, tmp_path / "m"), tmp_path / "out", recipe))
    assert isinstance(planned, Planned)
    assert not planned.started_over
    list(events)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "expected")
    assert len(converted) == 39 - tensors
    if 12 <= tensors < 39:
        again = {n for n in dropped if sum(n in r and "GET" in r for r in served.requests) > 1}
        assert len(again) < len(dropped)  # the first ones were dropped and are not needed again


def served_weights(served: Hub) -> set[str]:
    return {path.name for path in served.folder.glob("*.safetensors")}


@pytest.mark.parametrize("damage", ["missing", "cut", "of another text"])
def test_lost_hidden_states_cost_a_second_transfer_but_no_bytes(
    served: Hub, tmp_path: Path, expected: dict[str, str], damage: str
) -> None:
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    written = (event for event in events if isinstance(event, TensorWritten))
    list(islice(written, 25))
    events.close()  # type: ignore[attr-defined]  # a generator
    hidden = tmp_path / "out" / HIDDEN
    content = hidden.read_bytes()
    if damage == "missing":
        hidden.unlink()
    elif damage == "cut":
        hidden.write_bytes(content[:-7])
    else:
        at = content.index(b"text_sha256") + 20
        hidden.write_bytes(content[:at] + b"0000" + content[at + 4 :])
    list(run(opened(served, tmp_path / "m"), tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == expected


@pytest.mark.parametrize("fault", ["cut", "stall", "503", "wrong byte"])
def test_a_fault_is_survived(
    served: Hub, tmp_path: Path, expected: dict[str, str], fault: str
) -> None:
    source = arriving(served, tmp_path / "m")
    served.faults = [fault, "", fault, "", fault]
    list(run(source, tmp_path / "out"))
    assert served.faults == []
    assert bytes_of(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_hub_that_goes_away_loses_nothing(
    served: Hub, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    written = (event for event in events if isinstance(event, TensorWritten))
    list(islice(written, 8))
    served.status = 500
    with refused(HubError, "could not be fetched .* the same command goes on from there"):
        list(events)
    served.status = None
    first, *_ = run(opened(served, tmp_path / "m"), tmp_path / "out")
    assert isinstance(first, Planned)
    assert first.resumed_bytes > 0
    assert bytes_of(tmp_path / "out") == expected


def test_another_commit_starts_over(served: Hub, tmp_path: Path) -> None:
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    list(islice(events, 20))
    events.close()  # type: ignore[attr-defined]  # a generator
    shutil.rmtree(served.folder)
    write_checkpoint(served.folder, TINY, seed=1)
    served.commit = "b" * 40
    shutil.rmtree(tmp_path / "m")  # without its record, the newest commit is what is meant
    first, *_ = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    assert isinstance(first, Planned)
    assert first.started_over
    assert first.resumed_bytes == 0


def test_what_came_is_told(served: Hub, tmp_path: Path) -> None:
    events = [
        event
        for event in run(arriving(served, tmp_path / "m"), tmp_path / "out")
        if isinstance(event, BytesFetched)
    ]
    total = sum(path.stat().st_size for path in served.folder.glob("*.safetensors"))
    assert {event.total_bytes for event in events} == {total}
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[-1] == total


def test_a_header_that_does_not_fit_the_config_is_refused_before_any_weights_come(
    served: Hub, tmp_path: Path
) -> None:
    path = served.folder / f"model-00003-of-0000{FILES}.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with refused(CheckpointError, "lacks tensor"):
        arriving(served, tmp_path / "m")
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    with refused(HubError, f"model-00003-of-0000{FILES}.safetensors .* is no safetensors file"):
        arriving(served, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX; elsewhere see the tests above")
def test_sigkill_while_fetching_and_quantizing(
    served: Hub, tmp_path: Path, expected: dict[str, str], m1_home: Path
) -> None:
    lend_library(m1_home)
    target = tmp_path / "out"
    command = (
        "import sys, time\n"
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'quantize'), str(ROOT / 'app')]!r}\n"
        "from m1local_quantize import passage, pipeline\n"
        f"pipeline.DEFAULT_SHARD_BYTES = {SHARD_BYTES}\n"
        f"pipeline.quantize_checkpoint.__kwdefaults__['shard_bytes'] = {SHARD_BYTES}\n"
        "write = passage.Passage._write\n"
        "def slow(self, writer, step):\n"
        "    write(self, writer, step); time.sleep(0.02); print('.', flush=True)\n"
        "passage.Passage._write = slow\n"
        "from m1local_app.cli import cli\n"
        f"cli(['quantize', {NAME!r}, {str(target)!r}])\n"
    )
    for lines_before_kill in (4, 16, None):
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_ENDPOINT": served.url},
        )
        assert process.stdout is not None
        if lines_before_kill is not None:
            for _ in range(lines_before_kill):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert (process.returncode == 0) == (lines_before_kill is None), errors
    assert bytes_of(target) == expected


def test_two_runs_never_share_what_one_of_them_drops(served: Hub, tmp_path: Path) -> None:
    first = run(arriving(served, tmp_path / "m"), tmp_path / "a")
    list(islice(first, 5))
    with refused(HubError, "Another run is fetching into .*m, or quantizing from there; wait"):
        list(run(opened(served, tmp_path / "m"), tmp_path / "b", "int8"))
    with refused(HubError, "Another run is fetching into"):
        list(pull(NAME, tmp_path / "m", endpoint=served.url))
    list(first)
    assert (tmp_path / "a" / "m1local.json").is_file()
    list(run(opened(served, tmp_path / "m"), tmp_path / "b", "int8"))


def test_a_source_fetched_whole_goes_on_where_an_arriving_one_was_cut(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    list(islice((event for event in events if isinstance(event, TensorWritten)), 30))
    events.close()  # type: ignore[attr-defined]  # a generator
    list(pull(NAME, tmp_path / "m", endpoint=served.url))
    first, *_ = run(Source.open(tmp_path / "m"), tmp_path / "out")
    assert isinstance(first, Planned)
    assert not first.started_over
    assert first.resumed_bytes > 0
    assert bytes_of(tmp_path / "out") == expected


def test_states_of_another_recipe_are_never_gone_on_with(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = run(arriving(served, tmp_path / "m"), tmp_path / "out")
    list(islice((event for event in events if isinstance(event, TensorWritten)), 30))
    events.close()  # type: ignore[attr-defined]  # a generator
    assert (tmp_path / "out" / HIDDEN).is_file()
    with monkeypatch.context() as patch:  # killed as soon as the journal is the new run's
        patch.setattr("m1local_quantize.journal.MANIFEST", "\0")
        with pytest.raises(ValueError, match="null"):
            next(run(opened(served, tmp_path / "m"), tmp_path / "out", "int8"))
    assert not (tmp_path / "out" / HIDDEN).is_file()


def test_only_the_missing_rest_of_a_file_needs_room(served: Hub, tmp_path: Path) -> None:
    found = Repository.find(NAME, tmp_path, endpoint=served.url)
    file = found.weights[0]
    assert missing_bytes(tmp_path, [file]) == file.nbytes
    begun = tmp_path / ".cache" / "huggingface" / "download" / "x.incomplete"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(bytes(file.nbytes - 10))
    assert missing_bytes(tmp_path, [file]) == 10


def test_a_dry_run_fetches_no_weights(served: Hub, tmp_path: Path) -> None:
    source = arriving(served, tmp_path / "m")
    found = estimate(source, Plan.of(source, Recipe.find("int4")))
    assert found.seconds is None
    assert not list((tmp_path / "m").rglob("*.safetensors"))
