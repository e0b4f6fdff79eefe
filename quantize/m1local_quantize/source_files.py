"""The weights of a source as the pipeline meets them: lying in a folder, or still on their way.

What it is: what the pipeline may ask of either; `LocalFiles` is the one that lies there. What it is
not: the transfer (arriving.py is the other one).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from m1local.manifest import FileRecord
from m1local.memory import free_bytes
from m1local.shards import DescribedTensors, TensorFiles
from m1local_quantize.hashing import FileHashes
from m1local_quantize.hub import RECORD, Record
from m1local_quantize.transfer import BytesFetched

KEPT = 4  # files that follow are hashed ahead while they fill so small a part of the free memory


class SourceFiles(DescribedTensors, Protocol):
    """Tensors of a source."""

    passing: bool  # whether files are fetched one by one, and dropped when they are done with

    @property
    def files(self) -> Collection[str]:
        """The names of the files."""

    def identity(self) -> Mapping[str, object]:
        """By file, what changes when its content does, as far as it is cheap to know."""

    def records(self) -> dict[str, FileRecord]:
        """Size and SHA-256 of every file."""

    def held(self) -> AbstractContextManager[None]:
        """Keep other runs from changing the files meanwhile, where they would."""

    def expect(self, names: Sequence[str]) -> None:
        """Say which tensors will be asked for, in which order."""

    def fetch(self, names: Collection[str]) -> Iterator[BytesFetched]:
        """Wait until the tensors `names` can be had."""

    def release(self, file_names: Collection[str]) -> None:
        """Say that files are done with."""


class LocalFiles(TensorFiles):
    """The files of a folder, which is never written to.

    Their hashes are computed beside the quantizing, each file's while it is being read anyway.
    """

    passing = False

    def __init__(self, folder: Path, file_names: list[str]) -> None:
        """Open `file_names` in `folder`; raises CheckpointError for the first that is damaged."""
        super().__init__(folder, file_names)
        self.hashes = FileHashes(folder)

    def identity(self) -> Mapping[str, object]:
        """Size and time of every file; the published hashes, where they are as they were fetched.

        Files that arrive have these too, so that a run of either kind continues the other.
        """
        status = {name: (self.folder / name).stat() for name in sorted(self.files)}
        record = Record.read(self.folder)
        if record is not None and record.complete and status.keys() <= record.checked.keys():
            recorded = (self.folder / RECORD).stat().st_mtime_ns
            if all(s.st_mtime_ns <= recorded for s in status.values()):
                return {name: record.checked[name] for name in status}
        return {name: [s.st_size, s.st_mtime_ns] for name, s in status.items()}

    def records(self) -> dict[str, FileRecord]:
        """Size and SHA-256 of every file."""
        for name in self.files:
            self.hashes.begin(name)
        return {name: self.hashes.record(name) for name in self.files}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop hashing at the end. Whoever changes the files is noticed by their times."""
        try:
            yield
        finally:
            self.hashes.stop()

    def expect(self, names: Sequence[str]) -> None:
        """Do nothing: all are there."""

    def fetch(self, names: Collection[str]) -> Iterator[BytesFetched]:
        """Begin to hash the files that are going to be read; all are there.

        And those that follow, as far as the system surely keeps what was read of them.
        """
        wanted = {self.file_of(name) for name in names}
        ahead = 0
        if wanted and self.hashes.side_by_side():
            ahead = free_bytes(torch.device("cpu")) // KEPT
        for name in sorted(name for name in self.files if name >= min(wanted, default=name)):
            if name not in wanted:
                ahead -= (self.folder / name).stat().st_size
            if name in wanted or ahead >= 0:
                self.hashes.begin(name)
        return iter(())

    def release(self, file_names: Collection[str]) -> None:
        """Do nothing: they are the user's."""
