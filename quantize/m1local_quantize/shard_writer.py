"""Writes a safetensors file tensor by tensor, so that it is never whole in memory.

What it is: the header first (every shape is known from the recipe), then each tensor at its place.
The file has another name until it is whole. What it is not: a general writer; safetensors' own
needs all tensors of a file at once.
Format: https://github.com/huggingface/safetensors#format. Tensors whose size is a multiple of 64
bytes come first, so that each of them is aligned when mapped and can be used where it lies; the
small others follow in order of falling element size. Otherwise they lie in the order in which they
are going to be written, so that the file is hashed while that happens. Checked by reading back with
safetensors.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from m1local.formats.base import Stored
from m1local.manifest import HASH_BLOCK, FileRecord, hash_rest
from m1local.shards import DTYPES
from m1local_quantize.write_back import WriteBack

CODES = {dtype: code for code, dtype in DTYPES.items()}
PARTIAL = ".part"
ALIGNMENT_BYTES = 64  # of a cache line and of a vector register; safetensors itself promises 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything in a file stands: the header with its length, and each tensor's offset."""

    header: bytes
    offsets: Mapping[str, int]  # from the beginning of the file
    file_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Stored]) -> Self:
        """Lay out `tensors`; the same in the same order always give the same bytes."""
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        offset = 0
        for name, stored in sorted(tensors.items(), key=lambda item: _order(item[1])):
            end = offset + stored.nbytes
            described[name] = {
                "dtype": CODES[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [offset, end],
            }
            offsets[name] = offset
            offset = end
        encoded = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT_BYTES)
        header = len(encoded).to_bytes(8, "little") + encoded
        return cls(
            header, {name: len(header) + at for name, at in offsets.items()}, len(header) + offset
        )


def partial_path(path: Path) -> Path:
    """The name a file has until it is whole."""
    return path.with_name(path.name + PARTIAL)


@dataclass(slots=True)
class _Begun:
    """So much of a tensor is written, and its CRC-32."""

    nbytes: int = 0
    checksum: int = 0


class ShardWriter:
    """One safetensors file being written; rename and sync happen on leaving `with` unharmed."""

    def __init__(
        self, path: Path, tensors: Mapping[str, Stored], finished: Container[str] = ()
    ) -> None:
        """Lay out `tensors`; those in `finished` stand in the unfinished file already."""
        self.path = path
        self.record: FileRecord | None = None  # of the whole file, once it is in place
        self._partial = partial_path(path)
        self._missing = {name: s for name, s in tensors.items() if name not in finished}
        self._begun: dict[str, _Begun] = {}
        self._layout = Layout.of(tensors)
        self._digest, self._hashed = hashlib.sha256(), 0  # of the file's beginning: so many bytes
        self._hashing = ThreadPoolExecutor(max_workers=1)
        if len(self._missing) < len(tensors):
            self._file: BinaryIO = self._partial.open("r+b")
            self._write_back = WriteBack(self._file.fileno())
            return
        self._file = self._partial.open("wb")
        try:
            self._file.write(self._layout.header)
            self._file.truncate(self._layout.file_bytes)
            self._digest.update(self._layout.header)
            self._hashed = len(self._layout.header)
        except OSError:
            self._file.close()
            raise
        self._write_back = WriteBack(self._file.fileno())

    def write(self, name: str, part: Tensor) -> str | None:
        """Write the next rows of a tensor, or all; once it is whole, return its checksum.

        Raises OSError when the disk is full.
        """
        stored, begun = self._missing[name], self._begun.setdefault(name, _Begun())
        if (
            part.dtype != stored.dtype
            or part.shape[1:] != stored.shape[1:]
            or (begun.nbytes + part.nbytes > stored.nbytes)
        ):
            raise ValueError(f"{name} is {part.shape} {part.dtype}, laid out as {stored}")
        flat = part.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data
        offset = self._layout.offsets[name] + begun.nbytes
        self._file.seek(offset)
        with self._hashed_meanwhile(content, offset):
            for at in range(0, len(content), HASH_BLOCK):
                block = content[at : at + HASH_BLOCK]
                self._file.write(block)
                begun.checksum = zlib.crc32(block, begun.checksum)
        begun.nbytes += len(content)
        self._write_back.grown(len(content))
        if begun.nbytes < stored.nbytes:
            return None
        del self._missing[name], self._begun[name]
        self._file.flush()  # to the system: a killed process loses nothing any more
        return f"{begun.checksum:08x}"

    @contextmanager
    def _hashed_meanwhile(self, content: memoryview, offset: int) -> Iterator[None]:
        """Hash what follows on what is hashed, on a thread of its own where that is worth it."""
        follows = offset == self._hashed
        self._hashed += len(content) if follows else 0
        if not follows or len(content) < HASH_BLOCK:
            if follows:
                self._digest.update(content)
            yield
            return
        done = self._hashing.submit(self._digest.update, content)
        try:
            yield
        finally:
            done.result()

    def __enter__(self) -> Self:
        """Begin writing tensors."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the file in place when every tensor was written; else leave it unfinished."""
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"never written: {sorted(self._missing)}")
                self._file.flush()
                self._write_back.finish()
                self.record = self._recorded()
        finally:
            self._hashing.shutdown()
            self._write_back.close()
            self._file.close()
        if kind is None:
            os.replace(self._partial, self.path)

    def _recorded(self) -> FileRecord:
        with self._partial.open("rb", buffering=0) as file:
            file.seek(self._hashed)
            hash_rest(file, self._digest)
        return FileRecord(self._layout.file_bytes, self._digest.hexdigest())


def _order(stored: Stored) -> tuple[bool, int]:
    """First what keeps the next tensor aligned; then the others, by falling element size."""
    is_odd = stored.nbytes % ALIGNMENT_BYTES != 0
    return is_odd, -stored.dtype.itemsize * is_odd
