"""Hashes beside other work: those of the files, begun once, and errors where they are asked for."""

import hashlib
import mmap
import threading
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from m1local.manifest import FileRecord
from m1local.native import sha256
from m1local_app import library
from m1local_app.fetching import open_source
from m1local_quantize import hashing, source_files
from m1local_quantize.hashing import FileHashes, record_of
from m1local_quantize.source_files import LocalFiles

GRANULARITY = mmap.ALLOCATIONGRANULARITY
needs_streams = pytest.mark.skipif(
    not sha256.usable(), reason="no library, or a processor without instructions for SHA-256"
)


@needs_streams
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_streams_side_by_side_are_hashed_as_each_alone(streams: int) -> None:
    generator = numpy.random.default_rng(streams)
    for blocks in (0, 1, 2, 7, 64):
        contents = [
            generator.integers(0, 256, blocks * 64 + rest + 1, numpy.uint8)
            for rest in generator.integers(0, 63, streams)
        ]
        hashes = [sha256.Sha256() for _ in contents]
        for first, count in ((0, blocks // 2), (blocks // 2, blocks - blocks // 2)):
            addresses = [content.ctypes.data + first * 64 for content in contents]
            assert sha256.add_blocks(hashes, addresses, count * 64)
        for found, content in zip(hashes, contents, strict=True):
            expected = hashlib.sha256(content.tobytes()).hexdigest()
            assert found.finish(content[blocks * 64 :].tobytes()) == expected


@needs_streams
@pytest.mark.parametrize("rest", [0, 1, 54, 55, 56, 63])
def test_the_end_of_a_stream_is_padded(rest: int) -> None:
    content = bytes(range(rest))
    assert sha256.Sha256().finish(content) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("compiled", [True, False])
def test_files_of_all_sizes_are_hashed_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(sha256, "usable", lambda: False)
    monkeypatch.setattr(hashing, "BLOCK", GRANULARITY)
    monkeypatch.setattr(hashing, "STEP", GRANULARITY // 2)
    generator = numpy.random.default_rng(0)
    names = []
    for number, nbytes in enumerate((0, 3 * GRANULARITY, 63, 5 * GRANULARITY + 7, 64, 200_000, 1)):
        names.append(f"{number}.safetensors")
        (tmp_path / names[-1]).write_bytes(generator.bytes(nbytes))
    hashes = FileHashes(tmp_path)
    for name in (*names, "missing.safetensors", *names):
        hashes.begin(name)
    for name in names:
        assert hashes.record(name) == FileRecord.of(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        hashes.record("missing.safetensors")
    assert_ended()
    (tmp_path / "late").write_bytes(b"1" * 1000)  # begins another thread
    assert hashes.record("late") == FileRecord.of(tmp_path / "late")


@pytest.mark.parametrize("nbytes", [0, 1, GRANULARITY, 3 * GRANULARITY, 3 * GRANULARITY + 7])
def test_blocks_of_a_file_are_hashed_as_the_whole(
    nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "BLOCK", GRANULARITY)
    content = (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]
    (tmp_path / "x").write_bytes(content)
    assert record_of(tmp_path / "x") == FileRecord(nbytes, hashlib.sha256(content).hexdigest())
    assert record_of(tmp_path / "x") == FileRecord.of(tmp_path / "x")


def test_what_was_begun_early_is_not_read_again(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "a.json"):
        (tmp_path / name).write_bytes(name.encode())
    hashes = FileHashes(tmp_path)
    hashes.begin_early()
    found = hashes.record("a.safetensors")
    expected = FileRecord.of(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert hashes.record("a.safetensors") == found == expected


def test_a_source_is_hashed_from_the_beginning_where_all_of_it_will_be_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(FileHashes, "_begin_alone", lambda self, name: begun.append(name))
    chosen = library.find(str(tiny_checkpoint))
    open_source(chosen, offline=True, whole=False)
    assert not begun
    open_source(chosen, offline=True)
    assert begun == [min(path.name for path in tiny_checkpoint.glob("*.safetensors"))]


def assert_ended() -> None:
    """No thread goes on when nothing waits."""
    for thread in threading.enumerate():
        if thread.name == "hashing":
            thread.join(60)
            assert not thread.is_alive()


@needs_streams
def test_a_stopped_run_reads_no_more_and_another_may_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1" * 1000)
    (tmp_path / "b").write_bytes(b"2" * 1000)
    hashes, in_midst, goes_on = FileHashes(tmp_path), threading.Event(), threading.Event()
    advance = hashing._advance

    def wait(lanes: list[hashing._Lane]) -> None:
        in_midst.set()
        assert goes_on.wait(60)
        advance(lanes)

    monkeypatch.setattr(hashing, "_advance", wait)
    hashes._begin_alone("b")
    assert hashes.record("b") == FileRecord.of(tmp_path / "b")
    hashes.begin("a")
    begun = hashes._begun["a"]
    assert in_midst.wait(60)
    hashes.stop()
    assert set(hashes._begun) == {"b"}
    goes_on.set()
    assert hashes.record("a") == FileRecord.of(tmp_path / "a")
    assert_ended()
    assert not begun.done()


@needs_streams
def test_an_error_that_nobody_expects_reaches_whoever_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1" * 1000)
    hashes = FileHashes(tmp_path)
    monkeypatch.setattr(sha256, "add_blocks", lambda *_: False)
    with pytest.raises(RuntimeError, match="no longer"):
        hashes.record("a")


def test_leaving_a_source_stops_its_hashing(tiny_checkpoint: Path) -> None:
    files = LocalFiles(
        tiny_checkpoint, [path.name for path in tiny_checkpoint.glob("*.safetensors")]
    )
    stopped: list[bool] = []
    files.hashes.stop = lambda: stopped.append(True)  # type: ignore[method-assign]
    with pytest.raises(KeyError), files.held():
        raise KeyError
    assert stopped


@pytest.mark.parametrize(
    ("percent", "begun"), [(0, "b"), (399, "b"), (400, "bc"), (799, "bc"), (800, "bcd"), (801, "b")]
)
def test_the_files_that_follow_are_hashed_while_they_are_sure_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, percent: int, begun: str
) -> None:
    for name in "abcd":
        save_file({f"of {name}": torch.zeros(1)}, tmp_path / name)
    nbytes = (tmp_path / "a").stat().st_size
    files = LocalFiles(tmp_path, list("abcd"))
    found: list[str] = []
    monkeypatch.setattr(files.hashes, "begin", found.append)
    monkeypatch.setattr(files.hashes, "side_by_side", lambda: percent != 801)
    monkeypatch.setattr(source_files, "free_bytes", lambda device: percent * nbytes // 100)
    assert not list(files.fetch([]))
    assert not found
    files.fetch(["of b"])
    assert "".join(found) == begun


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
    with pytest.raises(OSError, match="became shorter"):
        FileHashes(tmp_path).record("x")
