"""Targets: nothing of the user's is lost, nothing half written is taken for a checkpoint.

Whatever stops a run (a full disk, a pulled plug, the user), the source is untouched, the target
does not load, and the same command run again ends in the same bytes as if nothing had happened.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from m1local.checkpoint import load_model
from m1local.errors import CheckpointError, StorageError
from m1local.manifest import CheckpointManifest
from m1local_quantize.journal import MARKER
from m1local_quantize.pipeline import Stage, quantize_checkpoint
from m1local_quantize.recipe import Recipe
from m1local_quantize.shard_writer import ShardWriter
from tests.damage import refused

SHARD_BYTES = 60_000
SHARDS = 5  # that this makes of the tiny checkpoint
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def quantize(
    source: Path, target: Path, recipe: str = "int8", *, overwrite: bool = False
) -> Iterator[Stage]:
    return quantize_checkpoint(
        source,
        target,
        Recipe.find(recipe),
        overwrite=overwrite,
        text=None,  # measured or not makes no difference here, but takes time
        shard_bytes=SHARD_BYTES,
    )


def bytes_of(folder: Path) -> dict[str, str]:
    """A digest of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run ends in that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    list(quantize(tiny_checkpoint, folder))
    assert len(list(folder.glob("*.safetensors"))) == SHARDS
    return folder


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished checkpoint of this test's own."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))


def assert_run_again_ends_well(source: Path, target: Path, undisturbed: Path) -> None:
    """The target does not load as it is; a second run makes it whole."""
    with refused(CheckpointError, "has no config.json|unfinished|no folder"):
        load_model(target)
    list(quantize(source, target))
    assert bytes_of(target) == bytes_of(undisturbed)
    load_model(target)


def test_a_folder_with_other_files_is_refused_and_left_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with refused(StorageError, r"out already exists and holds other files .*choose another"):
            list(quantize(tiny_checkpoint, target, overwrite=overwrite))
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "thesis.txt": "years of work"
    }


def test_a_folder_with_an_original_checkpoint_is_refused_and_left_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    with refused(StorageError, r"other already exists and holds other files"):
        list(quantize(tiny_checkpoint, target, overwrite=True))
    assert bytes_of(target) == bytes_of(tiny_checkpoint)


def test_an_empty_folder_is_used(tiny_checkpoint: Path, tmp_path: Path, undisturbed: Path) -> None:
    list(quantize(tiny_checkpoint, tmp_path))
    assert bytes_of(tmp_path) == bytes_of(undisturbed)


def test_a_file_in_the_place_of_the_target_is_refused_and_left_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.write_text("mine")
    with refused(StorageError, r"out is a file; choose another folder"):
        list(quantize(tiny_checkpoint, target, overwrite=True))
    assert target.read_text() == "mine"


def test_a_finished_checkpoint_is_kept_without_overwrite(
    tiny_checkpoint: Path, finished: Path, undisturbed: Path
) -> None:
    with refused(StorageError, r"already holds a checkpoint. Add --overwrite to replace it, or"):
        list(quantize(tiny_checkpoint, finished, "int4"))
    assert bytes_of(finished) == bytes_of(undisturbed)


def test_overwrite_replaces_a_finished_checkpoint_without_a_trace(
    tiny_checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    list(quantize(tiny_checkpoint, finished, "int4", overwrite=True))
    list(quantize(tiny_checkpoint, tmp_path / "fresh", "int4"))
    assert bytes_of(finished) == bytes_of(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["notes.txt", "NOTICE.part/result.json", "own.json", "README.md"])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_file_of_the_users_beside_a_checkpoint_is_never_lost(
    tiny_checkpoint: Path, finished: Path, name: str, state: str
) -> None:
    if state == "unfinished":
        (finished / "m1local.json").rename(finished / MARKER)
    (finished / name).parent.mkdir(exist_ok=True)
    (finished / name).write_text("mine")
    before = bytes_of(finished)
    match = rf"holds other files \('{Path(name).parts[0]}'\), which would be lost; move them"
    with refused(StorageError, match):
        list(quantize(tiny_checkpoint, finished, "int4", overwrite=True))
    assert bytes_of(finished) == before


@pytest.mark.parametrize(
    "place",
    [
        lambda source: source,
        lambda source: source / "out",
        lambda source: source.parent,
        lambda source: source / ".." / source.name,
        lambda source: source / "sub" / "..",
    ],
    ids=["itself", "inside", "around", "by a detour", "by a detour through nothing"],
)
def test_the_source_and_what_is_around_it_are_no_target(
    tiny_checkpoint: Path, tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "around" / "source"))
    before = bytes_of(tmp_path)
    with refused(StorageError, r"is, contains or lies in the source folder .*; choose another"):
        list(quantize(source, place(source), overwrite=True))
    assert bytes_of(tmp_path) == before
    assert not (source / "out").exists()


def test_a_name_that_is_too_long_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with refused(StorageError, "cannot be written .File name too long"):
        list(quantize(tiny_checkpoint, tmp_path / ("x" * 300)))


def test_a_link_to_the_source_is_no_target(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source)
    with refused(StorageError, "is, contains or lies in the source folder"):
        list(quantize(source, tmp_path / "link", overwrite=True))
    assert bytes_of(source) == bytes_of(tiny_checkpoint)


def test_too_little_space_is_noticed_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 2**20, 2**20))
        with refused(
            StorageError, r"takes 0 MiB and 64 to spare, but the disk .* only 1 MiB left. Free"
        ):
            list(quantize(tiny_checkpoint, tmp_path / "out"))
    assert list((tmp_path / "out").glob("*.safetensors*")) == []
    assert_run_again_ends_well(tiny_checkpoint, tmp_path / "out", undisturbed)


@pytest.mark.parametrize("tensors_before", [0, 1, 20])
def test_a_disk_that_runs_full_is_called_full(
    tiny_checkpoint: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensors_before: int,
) -> None:
    write = ShardWriter.write
    written: list[str] = []

    def full(writer: ShardWriter, name: str, part: Tensor) -> str | None:
        if len(written) == tensors_before:
            raise NO_SPACE
        written.append(name)
        return write(writer, name, part)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with refused(StorageError, r"that holds .*out is full. Free some space and run the same"):
            list(quantize(tiny_checkpoint, tmp_path / "out"))
    assert_run_again_ends_well(tiny_checkpoint, tmp_path / "out", undisturbed)


def test_a_file_system_that_takes_no_large_files_is_reported(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, hard))
    try:
        with refused(StorageError, r"out cannot be written \(.+\). Choose another folder, or mend"):
            list(quantize(tiny_checkpoint, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_target_below_a_file_is_reported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with refused(StorageError, r"out cannot be written \(.+\). Choose another folder, or mend"):
        list(quantize(tiny_checkpoint, tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM], ids=os.strerror)
@pytest.mark.parametrize("method", ["mkdir", "write_text"])
def test_a_read_only_target_is_reported(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    number: int,
) -> None:
    def read_only(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, method, read_only)
    match = rf"out cannot be written \({os.strerror(number)}\). Choose another folder, or mend"
    with refused(StorageError, match):
        list(quantize(tiny_checkpoint, tmp_path / "out"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_write_permission_is_reported(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    try:
        with refused(StorageError, r"out cannot be written \(Permission denied\). Choose another"):
            list(quantize(tiny_checkpoint, tmp_path / "out"))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("stages", [1, 2, 8, 20, 39, 40])
def test_a_run_that_was_closed_is_taken_up_again(
    tiny_checkpoint: Path, tmp_path: Path, undisturbed: Path, stages: int
) -> None:
    run = quantize(tiny_checkpoint, tmp_path / "out")
    assert len(list(islice(run, stages))) == stages
    run.close()  # type: ignore[attr-defined]  # it is a generator, which its type leaves open
    assert_run_again_ends_well(tiny_checkpoint, tmp_path / "out", undisturbed)


@pytest.mark.parametrize(
    ("function", "calls_before"),
    [
        *((name, count) for name in ("os.replace", "os.fsync") for count in (0, 1, SHARDS)),
        *(("shutil.copyfile", count) for count in range(3)),
        *(("json.dumps", count) for count in (0, 1, SHARDS, SHARDS + 1)),
        ("json.dump", 0),  # the manifest
    ],
)
def test_a_run_that_died_at_a_file_is_taken_up_again(
    tiny_checkpoint: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    calls_before: int,
) -> None:
    module_name, _, name = function.partition(".")
    original = getattr({"os": os, "shutil": shutil, "json": json}[module_name], name)
    calls = 0

    def die(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(function, die)
        with pytest.raises(KeyboardInterrupt):
            list(quantize(tiny_checkpoint, tmp_path / "out"))
    assert_run_again_ends_well(tiny_checkpoint, tmp_path / "out", undisturbed)


@pytest.mark.parametrize("files_before", [1, 2, 5])
def test_an_overwriting_run_that_died_while_clearing_is_taken_up_again(
    tiny_checkpoint: Path,
    finished: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    files_before: int,
) -> None:
    unlink = Path.unlink
    removed: list[Path] = []

    def die(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == files_before:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            list(quantize(tiny_checkpoint, finished, overwrite=True))
    assert_run_again_ends_well(tiny_checkpoint, finished, undisturbed)


def test_a_run_that_died_just_before_its_end_has_made_a_whole_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointManifest.write

    def die(manifest: CheckpointManifest, folder: Path) -> None:
        write(manifest, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManifest, "write", die)
        with pytest.raises(KeyboardInterrupt):
            list(quantize(tiny_checkpoint, tmp_path / "out"))
    load_model(tmp_path / "out")
    list(quantize(tiny_checkpoint, tmp_path / "out", overwrite=True))
    assert bytes_of(tmp_path / "out") == bytes_of(undisturbed)


def test_a_second_run_is_refused_while_the_first_is_writing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target, recipe = tmp_path / "out", Recipe.find("int8")
    first = quantize_checkpoint(tiny_checkpoint, target, recipe)
    next(first)
    with pytest.raises(StorageError, match="Another run is writing"):
        next(quantize_checkpoint(tiny_checkpoint, target, recipe))
    for _ in first:
        pass
    assert load_model(target) is not None
    assert not (target / "m1local.lock").exists()


def test_a_checkpoint_is_kept_where_its_replacement_does_not_fit(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, recipe = tmp_path / "out", Recipe.find("int8")
    for _ in quantize_checkpoint(tiny_checkpoint, target, recipe):
        pass
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="Free some space"):
        next(quantize_checkpoint(tiny_checkpoint, target, recipe, overwrite=True))
    assert load_model(target) is not None
