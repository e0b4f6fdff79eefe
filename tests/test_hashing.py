"""Hashes beside other work: those of the files, begun once, and errors where they are asked for."""

import hashlib
import mmap
from pathlib import Path

import pytest

from m1local.manifest import FileRecord
from m1local_app import library
from m1local_app.fetching import open_source
from m1local_quantize import hashing
from m1local_quantize.hashing import FileHashes, record_of

GRANULARITY = mmap.ALLOCATIONGRANULARITY


@pytest.mark.parametrize("nbytes", [0, 1, GRANULARITY, 3 * GRANULARITY, 3 * GRANULARITY + 7])
def test_blocks_of_a_file_are_hashed_as_the_whole(
    nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "BLOCK", GRANULARITY)
    content = (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]
    (tmp_path / "x").write_bytes(content)
    assert record_of(tmp_path / "x") == FileRecord(nbytes, hashlib.sha256(content).hexdigest())
    assert record_of(tmp_path / "x") == FileRecord.of(tmp_path / "x")


def test_what_was_begun_early_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.safetensors", "a.safetensors", "a.json"):
        (tmp_path / name).write_bytes(name.encode())
    hashes = FileHashes(tmp_path)
    hashes.begin_early()
    found = hashes.record("a.safetensors")
    monkeypatch.setattr(hashing, "record_of", None)
    assert hashes.record("a.safetensors") == found == FileRecord.of(tmp_path / "a.safetensors")


def test_a_source_is_hashed_from_the_beginning_where_all_of_it_will_be_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(FileHashes, "begin", lambda self, name: begun.append(name))
    chosen = library.find(str(tiny_checkpoint))
    open_source(chosen, offline=True, whole=False)
    assert not begun
    open_source(chosen, offline=True)
    assert begun == [min(path.name for path in tiny_checkpoint.glob("*.safetensors"))]


def test_a_folder_without_files_is_no_error_yet(tmp_path: Path) -> None:
    FileHashes(tmp_path).begin_early()
    FileHashes(tmp_path / "missing").begin_early()
    with pytest.raises(FileNotFoundError):
        FileHashes(tmp_path).record("a.safetensors")


def test_a_file_that_becomes_shorter_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1" * 2 * GRANULARITY)
    monkeypatch.setattr(hashing, "BLOCK", GRANULARITY)
    size = path.stat()
    path.write_bytes(b"1" * GRANULARITY)
    monkeypatch.setattr(Path, "stat", lambda path, **_: size)
    with pytest.raises(OSError, match="became shorter"):
        record_of(path)
