"""A killed run is continued: nothing finished is done again, and the bytes are the same."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from torch import Tensor

from m1local.checkpoint import load_model
from m1local.errors import StorageError
from m1local.formats import base
from m1local_quantize import convert
from m1local_quantize.convert import Converter
from m1local_quantize.journal import MARKER
from m1local_quantize.passage import TensorWritten
from m1local_quantize.pipeline import Planned, Stage, quantize_checkpoint
from m1local_quantize.plan import Step
from m1local_quantize.recipe import Recipe
from m1local_quantize.shard_writer import ShardWriter
from tests.conftest import ROOT, TINY, lend_library, write_checkpoint
from tests.damage import refused
from tests.test_pipeline import bytes_of

SHARD_BYTES = 40_000


def run(source: Path, target: Path, recipe: str = "int4") -> Iterator[Stage]:
    return quantize_checkpoint(source, target, Recipe.find(recipe), shard_bytes=SHARD_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_checkpoint(folder, TINY)
    return folder


@pytest.fixture
def undisturbed(source: Path, tmp_path: Path) -> Path:
    list(run(source, tmp_path / "undisturbed"))
    return tmp_path / "undisturbed"


def interrupted(source: Path, target: Path, tensors: int) -> None:
    """A run that ends after so many tensors."""
    events = run(source, target)
    next(events)
    written = (event for event in events if isinstance(event, TensorWritten))
    assert len(list(islice(written, tensors))) == tensors
    events.close()  # type: ignore[attr-defined]  # a generator


def converted_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the source tensors that are converted from now on."""
    names: list[str] = []
    converting = Converter.convert

    def note(converter: Converter, step: Step) -> Iterator[tuple[str, Tensor]]:
        names.append(step.name)
        return converting(converter, step)

    monkeypatch.setattr(Converter, "convert", note)
    return names


@pytest.mark.parametrize("tensors", [0, 1, 7, 20, 38])
def test_finished_tensors_are_not_done_again(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, tensors: int
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, tensors)
    converted = converted_by(monkeypatch)
    first, *rest = run(source, target)
    assert isinstance(first, Planned)
    assert len(converted) == len(first.plan.steps) - tensors
    assert not first.started_over
    assert (first.resumed_bytes > 0) == (tensors > 0)
    written = [event for event in rest if isinstance(event, TensorWritten)]
    assert written[-1].done_bytes == first.plan.source_bytes
    assert bytes_of(target) == bytes_of(undisturbed)
    load_model(target)


def test_a_damaged_tensor_is_written_again(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, 30)
    whole = sorted(target.glob("*.safetensors"))
    (partial,) = target.glob("*.safetensors.part")
    assert whole
    for path in (whole[0], partial):
        content = bytearray(path.read_bytes())
        content[len(content) - 300 if path is partial else -1] ^= 1
        path.write_bytes(content)
    whole[1].write_bytes(whole[1].read_bytes()[:-5])
    converted_by(monkeypatch)
    list(run(source, target))
    assert bytes_of(target) == bytes_of(undisturbed)


@pytest.mark.parametrize("which", [0, -1])
def test_of_a_matrix_only_the_tensor_that_is_damaged_is_written_again(
    source: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, 30)
    journal = target / MARKER
    lines = journal.read_text().splitlines()
    several = [at for at, line in enumerate(lines) if len(json.loads(line).get("tensors", {})) > 1]
    recorded = json.loads(lines[several[which]])
    damaged = list(recorded["tensors"])[-1]
    recorded["tensors"][damaged] = "00000000"
    lines[several[which]] = json.dumps(recorded)
    journal.write_text("\n".join(lines) + "\n")
    write, written = ShardWriter.write, set[str]()

    def note(writer: ShardWriter, name: str, part: Tensor) -> str | None:
        written.add(name)
        return write(writer, name, part)

    monkeypatch.setattr(ShardWriter, "write", note)
    list(run(source, target))
    assert written & recorded["tensors"].keys() == {damaged}
    assert bytes_of(target) == bytes_of(undisturbed)


@pytest.mark.parametrize(
    "damage", ["cut last line", "cut first line", "not text", "another fingerprint", "no line"]
)
def test_a_damaged_journal_costs_time_but_no_bytes(
    source: Path, tmp_path: Path, undisturbed: Path, damage: str
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, 20)
    journal = target / MARKER
    lines = journal.read_text().splitlines()
    changed = {
        "cut last line": "\n".join(lines)[:-9],
        "cut first line": lines[0][:10],
        "not text": "\udcff",
        "another fingerprint": "\n".join([json.dumps({"fingerprint": "x"}), *lines[1:]]),
        "no line": "",
    }[damage]
    journal.write_bytes(changed.encode("utf-8", "surrogateescape"))
    planned = next(events := run(source, target))
    assert isinstance(planned, Planned)
    assert (planned.resumed_bytes > 0) == (damage == "cut last line")
    assert planned.started_over == (damage != "cut last line")
    list(events)
    assert bytes_of(target) == bytes_of(undisturbed)


def test_another_recipe_or_source_starts_over(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(source, target, 20)
    planned = next(run(source, target, "int8"))
    assert isinstance(planned, Planned)
    assert planned.started_over
    interrupted(source, target, 20)
    weights = next(source.glob("*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    planned = next(run(source, target))
    assert isinstance(planned, Planned)
    assert planned.started_over
    assert planned.resumed_bytes == 0
    interrupted(source, target, 20)
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 1234.0}))
    planned = next(run(source, target))
    assert isinstance(planned, Planned)
    assert planned.started_over


@pytest.mark.parametrize("recipe", ["int4", "int8", "bnb-nf4"])
def test_a_tensor_cut_between_its_parts_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    list(run(source, tmp_path / "undisturbed", recipe))
    monkeypatch.setattr(base, "WEIGHTS_PER_PART", 1)  # of a few slices, so several of each
    monkeypatch.setattr(convert, "ROWS_QUANTIZED", 8)
    write, parts, failing = ShardWriter.write, Counter[str](), "model.layers.1.mlp.up_proj.weight"

    def cut(writer: ShardWriter, name: str, part: Tensor) -> str | None:
        parts[name] += 1
        if (name, parts[name]) == (failing, 3):
            raise OSError(errno.EIO, "Input/output error")
        return write(writer, name, part)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", cut)
        with refused(StorageError, r"out cannot be written \(Input/output error\)"):
            list(run(source, tmp_path / "out", recipe))
    assert parts[failing] == 3  # and nothing after what failed
    assert list(parts)[-1] == failing
    list(run(source, tmp_path / "out", recipe))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX; elsewhere see the tests above")
def test_sigkill_at_any_moment_costs_nothing_but_the_tensor_at_hand(
    source: Path, tmp_path: Path, undisturbed: Path
) -> None:
    target = tmp_path / "out"
    script = f"""
import sys, time
sys.path[:0] = {[str(ROOT), str(ROOT / "quantize")]!r}
from pathlib import Path
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.plan import Step
from m1local_quantize.recipe import Recipe
from m1local_quantize.shard_writer import ShardWriter
events = quantize_checkpoint(
    Path({str(source)!r}), Path({str(target)!r}), Recipe.find("int4"), shard_bytes={SHARD_BYTES}
)
for event in events:
    print(type(event).__name__, getattr(event, "resumed_bytes", ""), flush=True)
    time.sleep(0.01)
"""
    lend_library(Path(os.environ["M1_HOME"]))
    resumed = []
    for lines_before_kill in (3, 12, 25, None):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert process.stdout is not None
        resumed.append(int(process.stdout.readline().split()[1]))
        if lines_before_kill is not None:
            for _ in range(lines_before_kill):
                process.stdout.readline()
            time.sleep(0.004)
            process.send_signal(signal.SIGKILL)
        process.stdout.read()
        process.stdout.close()
        assert (process.wait() == 0) == (lines_before_kill is None)
    assert resumed == sorted(resumed)
    assert resumed[0] == 0 < resumed[1]
    assert bytes_of(target) == bytes_of(undisturbed)
