"""m1local.json: what a quantized checkpoint's folder holds and where it came from.

What it is: the promise that a checkpoint is whole. It is written last and atomically, so a folder
without it is unfinished. It holds nothing that differs from run to run (no times), so the same
source and recipe end in the same bytes. What it is not: a place for guesses; every matrix is listed
with its format.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, Self

from m1local.errors import CheckpointError
from m1local.folder import inside
from m1local.formats import LinearSpec

NAME = "m1local.json"
FORMAT_VERSION = 1
HASH_BLOCK = 1 << 18  # stays in the processor's cache between reading and hashing
CERTIFIED = (
    "tokens", "reference_perplexity", "perplexity", "mean_kl", "p99_kl", "top1_agreement",
)  # fmt: skip


def hash_rest(file: RawIOBase, digest: "hashlib._Hash") -> None:
    """Feed what is left of `file` into `digest`."""
    block = bytearray(HASH_BLOCK)
    view = memoryview(block)
    while count := file.readinto(block):
        digest.update(view[:count])


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure the file at `path`."""
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            hash_rest(file, digest)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointManifest:
    """A checkpoint's contents and origin."""

    m1local_version: str
    source: str
    source_revision: str | None
    source_files: Mapping[str, FileRecord]
    recipe: str
    method: str
    linears: Mapping[str, LinearSpec]
    files: Mapping[str, FileRecord]
    # What quantization cost, measured on a named text; None where it was not measured.
    certificate: Mapping[str, str | int | float] | None = None
    calibration: str | None = None  # SHA-256 of the text that gptq was calibrated with
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read m1local.json; raises CheckpointError when it is missing or not understood."""
        path = folder / NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} has no {NAME}: it is no checkpoint of m1local, or an unfinished one. "
                "Make one with `m1 quantize SRC OUT`."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); quantize again.") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this m1local reads {FORMAT_VERSION}. "
                "Update m1local, or quantize again."
            )
        try:
            return cls._from_dict(raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is malformed ({error!r}); quantize again.") from error

    def write(self, folder: Path) -> None:
        """Write m1local.json atomically; the last step of making a checkpoint."""
        path = folder / NAME
        partial = path.with_suffix(".part")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            json.dump(asdict(self), file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def check_files(self, folder: Path) -> None:
        """Compare sizes, and hash what was touched after the manifest; raises CheckpointError.

        Copying a folder touches its files, so once they have passed the manifest is marked newer.
        """
        manifest = folder / NAME
        newer = []
        for name, record in self.files.items():
            path = inside(folder, name)
            if not path.is_file():
                raise CheckpointError(
                    f"{folder} lacks {name}, which {NAME} names; copy it again, or quantize again."
                )
            status = path.stat()
            if status.st_size != record.nbytes:
                raise CheckpointError(
                    f"{path} has {status.st_size} bytes, {NAME} says {record.nbytes}: it is "
                    "damaged. Copy it again, or quantize again."
                )
            if status.st_mtime_ns > manifest.stat().st_mtime_ns:
                newer.append(name)
        self.check_hashes(folder, newer)
        if newer and os.access(manifest, os.W_OK):
            os.utime(manifest)

    def check_hashes(self, folder: Path, names: list[str] | None = None) -> None:
        """Compare the SHA-256 of the named files, or of all; raises CheckpointError."""
        for name in self.files if names is None else names:
            if FileRecord.of(inside(folder, name)) != self.files[name]:
                raise CheckpointError(
                    f"{folder / name} is damaged: its SHA-256 is not the one in {NAME}. "
                    "Copy it again, or quantize again."
                )

    @classmethod
    def _from_dict(cls, raw: Mapping[str, Any]) -> Self:
        return cls(
            m1local_version=raw["m1local_version"],
            source=raw["source"],
            source_revision=raw["source_revision"],
            source_files={k: FileRecord(**v) for k, v in raw["source_files"].items()},
            recipe=raw["recipe"],
            method=raw["method"],
            linears={name: _spec(**spec) for name, spec in raw["linears"].items()},
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
            certificate=_certificate(raw.get("certificate")),
            calibration=raw.get("calibration"),
        )


def _certificate(raw: Any) -> Mapping[str, str | int | float] | None:
    if raw is None:
        return None
    if not all(isinstance(raw[name], int | float) for name in CERTIFIED) or not isinstance(
        raw["text"], str
    ):
        raise TypeError(f"certificate {raw!r}")
    found: dict[str, str | int | float] = raw
    return found


def _spec(format: str, group_size: int | None = None) -> LinearSpec:
    if not isinstance(format, str) or not isinstance(group_size, int | None):
        raise TypeError(f"format {format!r} with group_size {group_size!r}")
    return LinearSpec(format, group_size)
