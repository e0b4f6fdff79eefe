"""Sizes and SHA-256 of a folder's files, computed beside other work.

What it is: a thread for each file, begun when somebody says that the file will be needed. Files are
mapped, block by block: nothing is copied, and a thread seldom waits for Python's lock, not even
while torch is being imported. What it is not: a comparison with anything.
"""

import errno
import hashlib
import mmap
import threading
from concurrent.futures import Future
from pathlib import Path

from m1local.manifest import FileRecord

BLOCK = 64 << 20  # bytes that are mapped at once; a multiple of every system's granularity


class FileHashes:
    """The records of the files of one folder."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self._folder = folder
        self._begun: dict[str, Future[FileRecord]] = {}

    def begin(self, name: str) -> None:
        """Begin with a file, unless that was done before."""
        if name in self._begun:
            return
        found = self._begun[name] = Future[FileRecord]()

        def run() -> None:
            try:
                found.set_result(record_of(self._folder / name))
            except OSError as error:
                found.set_exception(error)

        # A daemon: whoever stops quantizing must not wait for it.
        threading.Thread(target=run, daemon=True).start()

    def begin_early(self) -> None:
        """Begin with what is likely to be needed first."""
        first = min(self._folder.glob("*.safetensors"), default=None)
        if first is not None:
            self.begin(first.name)

    def record(self, name: str) -> FileRecord:
        """Wait for a file's record; raises OSError where it cannot be read."""
        self.begin(name)
        return self._begun[name].result()


def record_of(path: Path) -> FileRecord:
    """As `FileRecord.of`, without copying; raises OSError where the file cannot be read."""
    digest, nbytes = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for at in range(0, nbytes, BLOCK):
            size = min(BLOCK, nbytes - at)
            try:
                block = mmap.mmap(file.fileno(), size, offset=at, access=mmap.ACCESS_READ)
            except ValueError as error:  # it was cut meanwhile
                raise OSError(errno.EIO, f"{path} became shorter") from error
            with block:
                digest.update(block)
    return FileRecord(nbytes, digest.hexdigest())
