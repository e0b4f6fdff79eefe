"""Sizes and SHA-256 of a folder's files, computed beside other work.

What it is: one thread that hashes three files side by side, which is twice as fast as one after
the other (m1local/native/sha256.py), or a thread for each file where that cannot be; begun when
somebody says that a file will be needed. Files are mapped, block by block: nothing is copied, and
Python's lock is seldom held, not even while torch is being imported. What it is not: a comparison
with anything.
"""

import errno
import hashlib
import mmap
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import numpy

from m1local.manifest import FileRecord

BLOCK = 64 << 20  # bytes that are mapped at once; a multiple of every system's granularity
STEP = 8 << 20  # bytes of each file, before another file may join


class FileHashes:
    """The records of the files of one folder."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self._folder = folder
        self._lock = threading.Lock()  # of all that follows
        self._begun: dict[str, Future[FileRecord]] = {}
        self._waiting: deque[_Lane] = deque()
        self._worker = 0  # the number of the one that may go on
        self._working = False

    def side_by_side(self) -> bool:
        """Whether several files take less time together than one after the other."""
        from m1local.native import sha256  # torch, which must not be imported before `begin_early`

        return sha256.usable()

    def begin(self, name: str) -> None:
        """Begin with a file, unless that was done before; others are hashed beside it."""
        if not self.side_by_side():
            self._begin_alone(name)
            return
        with self._lock:
            if name in self._begun:
                return
            found = self._begun[name] = Future[FileRecord]()
            self._waiting.append(_Lane(self._folder / name, found))
            if not self._working:
                self._working, self._worker = True, self._worker + 1
                # A daemon: whoever stops quantizing must not wait for it.
                asked = (self._worker,)
                threading.Thread(target=self._work, args=asked, name="hashing", daemon=True).start()

    def begin_early(self) -> None:
        """Begin with what is likely to be needed first."""
        first = min(self._folder.glob("*.safetensors"), default=None)
        if first is not None:
            self._begin_alone(first.name)

    def record(self, name: str) -> FileRecord:
        """Wait for a file's record; raises OSError where it cannot be read."""
        self.begin(name)
        return self._begun[name].result()

    def stop(self) -> None:
        """Give up what is not hashed yet, for which nobody waits; `begin` begins it again."""
        with self._lock:
            self._working, self._worker = False, self._worker + 1
            self._waiting.clear()
            self._begun = {name: found for name, found in self._begun.items() if found.done()}

    def _begin_alone(self, name: str) -> None:
        with self._lock:
            if name in self._begun:
                return
            found = self._begun[name] = Future[FileRecord]()

        def run() -> None:
            try:
                found.set_result(record_of(self._folder / name))
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def _work(self, worker: int) -> None:
        """Hash all that waits, as many files at once as there are streams."""
        lanes: list[_Lane] = []
        try:
            while self._join(lanes, worker):
                lanes = [lane for lane in lanes if lane.goes_on()]
                _advance(lanes)
        except Exception as error:  # whoever waits has to hear of it
            waiting: list[_Lane] = []
            with self._lock:
                if worker == self._worker:  # else they are another's
                    waiting, self._working = list(self._waiting), False
                    self._waiting.clear()
            for lane in (*lanes, *waiting):
                lane.fail(error)

    def _join(self, lanes: list["_Lane"], worker: int) -> bool:
        """Let what waits join `lanes`; whether there is anything to be done."""
        from m1local.native.sha256 import STREAMS

        with self._lock:
            if worker != self._worker:
                return False
            while self._waiting and len(lanes) < STREAMS:
                lanes.append(self._waiting.popleft())
            self._working = bool(lanes)
            return self._working


class _Lane:
    """One file of those that are hashed side by side."""

    def __init__(self, path: Path, found: Future[FileRecord]) -> None:
        from m1local.native.sha256 import Sha256

        self.digest = Sha256()
        self._path, self._found = path, found
        self._nbytes, self._at = -1, 0  # of the file; where the next block begins
        self._mapped = numpy.empty(0, numpy.uint8)  # what is left of the block

    @property
    def mapped_bytes(self) -> int:
        return self._mapped.size

    @property
    def address(self) -> int:
        return self._mapped.ctypes.data

    def passed(self, nbytes: int) -> None:
        self._mapped = self._mapped[nbytes:]

    def fail(self, error: Exception) -> None:
        """Say that there is no record, where none has been found."""
        if not self._found.done():
            self._found.set_exception(error)

    def goes_on(self) -> bool:
        """Whether there are whole blocks left to be hashed; at the end, or an error, say so."""
        from m1local.native.sha256 import BLOCK_BYTES

        try:
            if self._nbytes < 0:
                self._nbytes = self._path.stat().st_size
            if self.mapped_bytes == 0 and self._at < self._nbytes:
                size = min(BLOCK, self._nbytes - self._at)
                with self._path.open("rb") as file:
                    self._mapped = numpy.frombuffer(
                        _map(file.fileno(), size, self._at, self._path), numpy.uint8
                    )
                self._at += size
        except OSError as error:
            self.fail(error)
            return False
        if self.mapped_bytes >= BLOCK_BYTES:
            return True
        digest = self.digest.finish(self._mapped.tobytes())
        self._found.set_result(FileRecord(self._nbytes, digest))
        return False


def _advance(lanes: list[_Lane]) -> None:
    """Hash as many blocks of each as all of them have mapped."""
    from m1local.native import sha256

    if lanes:
        nbytes = min(STEP, *(lane.mapped_bytes for lane in lanes))
        nbytes -= nbytes % sha256.BLOCK_BYTES
        digests = [lane.digest for lane in lanes]
        if not sha256.add_blocks(digests, [lane.address for lane in lanes], nbytes):
            raise RuntimeError("the compiled library hashes no longer")
        for lane in lanes:
            lane.passed(nbytes)


def record_of(path: Path) -> FileRecord:
    """As `FileRecord.of`, without copying; raises OSError where the file cannot be read."""
    digest, nbytes = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for at in range(0, nbytes, BLOCK):
            with _map(file.fileno(), min(BLOCK, nbytes - at), at, path) as block:
                digest.update(block)
    return FileRecord(nbytes, digest.hexdigest())


def _map(descriptor: int, nbytes: int, at: int, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, nbytes, offset=at, access=mmap.ACCESS_READ)
    except ValueError as error:  # it was cut meanwhile
        raise OSError(errno.EIO, f"{path} became shorter") from error
