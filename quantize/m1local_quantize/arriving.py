"""A source that is quantized while it is fetched: file by file, each dropped when it is done with.

What it is: the weights of a repository behind the same interface as those of a folder. Their
headers are read first, by themselves; then a file is fetched while the one before it is being
read, so that two of them lie on the disk at most, where a repository's tensors are in the order of
the layers; in another order, as many as it takes. What it is not: the transfer of a file
(transfer.py).
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from m1local.errors import CheckpointError, HubError
from m1local.manifest import FileRecord
from m1local.shards import TensorFiles, known_dtype
from m1local_quantize.disk import disk_error
from m1local_quantize.hub import (
    Repository,
    alone,
    check_space,
    forget_transfers,
    missing_bytes,
)
from m1local_quantize.transfer import BytesFetched, Published, Transfer, with_words

MOST_FILES = 2  # on the disk or on their way, unless more are needed at the same moment


class ArrivingFiles:
    """The weights of a repository, each file fetched when it is needed, or just before."""

    passing = True

    def __init__(self, found: Repository, headers: Mapping[str, Mapping[str, Any]]) -> None:
        """`headers` are safetensors' own, by file: for every tensor its `dtype` and `shape`."""
        self.folder: Path = found.place.folder
        self._found = found
        self._published = {file.name: file for file in found.weights}
        self._headers = headers
        self._file_of = {name: file for file, tensors in headers.items() for name in tensors}
        self._order: list[str] = []
        self._open: dict[str, TensorFiles] = {}
        self._coming: dict[str, Transfer] = {}
        self._done_bytes = 0

    @classmethod
    def of(cls, found: Repository) -> Self:
        """Read the headers of the repository's weights; raises HubError where that fails."""
        unhashed = [file.name for file in found.weights if not file.hash.startswith("sha256:")]
        if unhashed:
            raise HubError(
                f"{found.place.repository} keeps {unhashed[0]} without a SHA-256, so it cannot be "
                "quantized while it is fetched; add --keep-source."
            )
        return cls(found, {file.name: _header(found, file) for file in found.weights})

    @property
    def files(self) -> Collection[str]:
        """The names of the files."""
        return self._headers.keys()

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._file_of.keys()

    def file_of(self, name: str) -> str:
        """The file that holds the tensor `name`."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._headers[self._file_of[name]][name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header alone; raises CheckpointError for one unknown here."""
        file = self._file_of[name]
        return known_dtype(self._headers[file][name].dtype, self.folder / file, name)

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file, which is fetched now if need be."""
        for _ in self.fetch([name]):
            pass
        return self._open[self._file_of[name]].tensor(name)

    def identity(self) -> Mapping[str, object]:
        """The published hash of every file."""
        return {name: file.hash for name, file in sorted(self._published.items())}

    def records(self) -> dict[str, FileRecord]:
        """Size and SHA-256 of every file, as published and compared with what came."""
        return {
            name: FileRecord(file.nbytes, file.hash.partition(":")[2])
            for name, file in self._published.items()
        }

    def held(self) -> AbstractContextManager[None]:
        """Let no other run fetch into the folder, or delete from it."""
        return alone(self.folder)

    def expect(self, names: Sequence[str]) -> None:
        """Say which tensors will be asked for, in which order."""
        self._order = list(dict.fromkeys(self._file_of[name] for name in names))

    def fetch(self, names: Collection[str]) -> Iterator[BytesFetched]:
        """Wait until the tensors `names` can be had; at least one event, with what has come."""
        try:
            for file in dict.fromkeys(self._file_of[name] for name in names):
                if file not in self._open:
                    self._begin(file)
                    for _ in self._coming[file].wait() if file in self._coming else ():
                        yield self._progress()
                    self._arrived(file)
            self._look_ahead()
        except OSError as error:
            raise disk_error(error, self.folder) from error
        yield self._progress()

    def release(self, file_names: Collection[str]) -> None:
        """Delete files that are done with; what comes next takes their place."""
        for file in file_names:
            self._open.pop(file, None)  # a mapped file cannot be deleted everywhere
            if file in self._order:
                self._order.remove(file)
            with suppress(PermissionError):
                (self.folder / file).unlink(missing_ok=True)
        self._look_ahead()
        if not self._order and not self._coming:
            forget_transfers(self.folder)

    def _begin(self, file: str) -> None:
        published = self._published[file]
        if file not in self._coming and not self._found.record.has(published, self.folder):
            check_space(self.folder, [published])
            self._coming[file] = Transfer(self._found.place, published)

    def _arrived(self, file: str) -> None:
        if self._coming.pop(file, None) is not None:
            self._found.note(self._published[file])
            self._done_bytes += self._published[file].nbytes
        opened = TensorFiles(self.folder, [file])
        described = {name: tuple(entry.shape) for name, entry in self._headers[file].items()}
        if {name: opened.shape(name) for name in opened.names} != described:
            raise CheckpointError(f"{self.folder / file} holds other tensors than its header said.")
        self._open[file] = opened

    def _look_ahead(self) -> None:
        waiting = [f for f in self._order if f not in self._open and f not in self._coming]
        if not waiting or len(self._open) + len(self._coming) >= MOST_FILES:
            return
        coming = [self._published[file] for file in (*self._coming, waiting[0])]
        # Where there is no room for it yet, there will be once the present one is dropped.
        if missing_bytes(self.folder, coming) <= shutil.disk_usage(self.folder).free:
            self._begin(waiting[0])

    def _progress(self) -> BytesFetched:
        coming = sum(transfer.received for transfer in self._coming.values())
        missing = sum(
            self._published[file].nbytes
            for file in self._order
            if file not in self._open
            and not self._found.record.has(self._published[file], self.folder)
        )
        return BytesFetched(self._done_bytes + coming, self._done_bytes + missing)


def _header(found: Repository, file: Published) -> Mapping[str, Any]:
    """What a file's first bytes say of its tensors."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    place = found.place
    api = HfApi(endpoint=place.endpoint)

    def ask() -> Mapping[str, Any]:
        metadata = api.parse_safetensors_file_metadata(
            place.repository, file.name, revision=place.commit
        )
        tensors: Mapping[str, Any] = metadata.tensors
        return tensors

    try:
        return with_words(place.repository, place.commit, ask)
    except SafetensorsParsingError as error:
        raise HubError(f"{file.name} of {place.repository} is no safetensors file.") from error
