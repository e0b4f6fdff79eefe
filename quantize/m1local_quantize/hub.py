"""Fetching a checkpoint from the model hub, file by file, and checking every byte.

What it is: huggingface_hub does the transfer (resumed where it was cut, mirrors through
HF_ENDPOINT); this adds a revision that stays the same from attempt to attempt, and our own
comparison of every file with the hash that the hub publishes, and of a quantized checkpoint with
its manifest. What it is not: a cache shared with
other programs; the files lie in a folder like any other checkpoint.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from filelock import Timeout

from m1local.errors import CheckpointError, HubError, StorageError
from m1local.manifest import NAME as MANIFEST
from m1local.manifest import CheckpointManifest
from m1local_quantize.disk import SYSTEM_FILES, allocated, disk_error, removal_error
from m1local_quantize.lock import locked, unlock
from m1local_quantize.transfer import BytesFetched, Place, Published, Transfer, with_words

RECORD = "m1local-source.json"  # which repository and revision the folder is, and what was checked
WEIGHTS = "*.safetensors"
LICENCES = ("*icen[cs]e*", "*ICEN[CS]E*", "*许可协议*")
WANTED = ("*.json", WEIGHTS, "tokenizer.model", "NOTICE*", "*.pdf", *LICENCES)
TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class FileFetched:
    """A file is there and right; bytes of the whole repository."""

    name: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """All files are there and right."""

    folder: Path
    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class Record:
    """RECORD: the revision that is being fetched, and the files that were found right."""

    repository: str
    revision: str
    asked: str | None  # the revision that was asked for by name
    checked: dict[str, str]  # hashes by file name
    complete: bool = False
    described: bool = False  # whether all but the weights has come

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in `folder`, or None where there is none that can be read."""
        try:
            return cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write it; a cut leaves the old one or the new one."""
        unfinished = folder / f"{RECORD}.part"
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(folder / RECORD)

    def has(self, file: Published, folder: Path) -> bool:
        """Whether `file` lies in `folder` and was found right."""
        path = folder / file.name
        known = self.checked.get(file.name) == file.hash
        return known and path.is_file() and path.stat().st_size == file.nbytes


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at the commit that it is fetched at, and what is fetched of it."""

    place: Place
    files: tuple[Published, ...]
    record: Record

    @classmethod
    def find(
        cls, name: str, folder: Path, *, revision: str | None = None, endpoint: str | None = None
    ) -> Self:
        """Ask the hub; the commit stays what an earlier attempt at `folder` found.

        Raises HubError where the hub cannot be reached, or refuses.
        """
        endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
        record, pinned = Record.read(folder), None
        if record is not None and (record.repository, record.asked) == (name, revision):
            pinned = record.revision
        commit, files = _published(name, pinned or revision, endpoint)
        if record is None or record.revision != commit:
            record = Record(name, commit, revision, {})
        record = replace(record, asked=revision, complete=False, checked=dict(record.checked))
        return cls(Place(name, commit, endpoint, folder), tuple(files), record)

    @property
    def weights(self) -> tuple[Published, ...]:
        """The files that hold tensors."""
        return tuple(file for file in self.files if fnmatch.fnmatch(file.name, WEIGHTS))

    def note(self, file: Published) -> None:
        """Record that `file` is there and right."""
        self.record.checked[file.name] = file.hash
        self.record.write(self.place.folder)


def pull(
    name: str,
    folder: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    weights: bool = True,
) -> Iterator[BytesFetched | FileFetched | Pulled]:
    """Fetch what m1local reads of a repository into `folder`; call again to go on after a cut.

    Without `weights` only the small files. Raises HubError where the hub cannot be reached,
    refuses, or sends what it did not publish, and StorageError where the disk is full or
    read-only.
    """
    found = Repository.find(name, folder, revision=revision, endpoint=endpoint)
    files = found.files if weights else [f for f in found.files if f not in found.weights]
    try:
        with alone(folder):
            yield from _pull(found, files, weights=weights)
    except OSError as error:
        raise disk_error(error, folder) from error
    yield Pulled(folder, name, found.place.commit)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` as the one that this run alone fetches into, or deletes from.

    Raises HubError where another run does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(_lock_path(folder))
    except Timeout:
        raise HubError(
            f"Another run is fetching into {folder}, or quantizing from there; wait for it."
        ) from None
    try:
        yield
    finally:
        unlock(lock)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _pull(
    found: Repository, files: Sequence[Published], *, weights: bool
) -> Iterator[BytesFetched | FileFetched]:
    folder, name, done = found.place.folder, found.place.repository, 0
    total = sum(file.nbytes for file in files)
    check_space(folder, files)
    whole = all(found.record.has(file, folder) for file in found.files)
    known = whole and not (folder / MANIFEST).is_file()  # otherwise that is to be seen
    replace(found.record, complete=known).write(folder)
    for file in files:
        if not found.record.has(file, folder):
            for received in Transfer(found.place, file).wait():
                yield BytesFetched(done + received, total)
            found.note(file)
        done += file.nbytes
        yield FileFetched(file.name, done, total)
    if weights or whole:
        _check_manifest(folder, name)
    if weights:
        forget_transfers(folder)
    replace(found.record, complete=weights or whole, described=True).write(folder)


def _check_manifest(folder: Path, name: str) -> None:
    """Raise HubError unless a quantized checkpoint is what its manifest says it is."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        manifest = CheckpointManifest.read(folder)
        manifest.check_files(folder)
        manifest.check_hashes(folder)
    except CheckpointError as error:
        raise HubError(
            f"{name} came as the hub has it, but is no whole checkpoint there: {error} Tell "
            "whoever publishes it, or take another."
        ) from error


def remove_fetched(folder: Path) -> int:
    """Delete what `pull` fetched into `folder`, and the folder; returns the bytes that were freed.

    Raises StorageError where it holds anything else, and HubError where a run fetches into it;
    then nothing is deleted. A cut leaves what is known to be incomplete, and can be removed again.
    """
    record = Record.read(folder)
    if record is None:
        raise StorageError(f"{folder} was not fetched by m1local; nothing was deleted.")
    known = (RECORD, f"{RECORD}.part", *record.checked, *WANTED, *SYSTEM_FILES)
    try:
        with alone(folder):
            own = sorted(folder.iterdir(), key=lambda path: (path.name != MANIFEST, path.name))
            foreign = [path.name for path in own if not _is_ours(path, known)]
            if foreign:
                raise StorageError(
                    f"{folder} holds other files ({foreign[0]!r}), which would be lost; move them, "
                    "and try again."
                )
            freed = sum(allocated(path) for path in folder.rglob("*") if path.is_file())
            replace(record, complete=False, described=False).write(folder)
            forget_transfers(folder)
            for path in own:
                if path.name != RECORD and not path.is_dir():
                    path.unlink()
            (folder / RECORD).unlink()
            folder.rmdir()
    except OSError as error:
        raise removal_error(error, folder) from error
    return freed


def _is_ours(path: Path, known: Iterable[str]) -> bool:
    if path.is_dir():
        return path.name == ".cache" and not path.is_symlink()
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in known)


def is_licence(name: str) -> bool:
    """Whether a file of that name is a licence, or a vendor's agreement."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LICENCES)


def forget_transfers(folder: Path) -> None:
    """Delete what the library notes of transfers in `folder`, the unfinished ones included."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _published(
    repository: str, revision: str | None, endpoint: str | None
) -> tuple[str, list[Published]]:
    """The commit that `revision` means now, and its files that m1local reads."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)

    def ask() -> Any:
        return api.model_info(
            repository, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )

    info = with_words(repository, revision, ask)
    files = []
    for entry in info.siblings or []:
        if "/" in entry.rfilename or not any(fnmatch.fnmatch(entry.rfilename, w) for w in WANTED):
            continue
        digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        files.append(Published(entry.rfilename, entry.size or 0, digest))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise HubError(f"{repository} holds no .safetensors file; name the repository of a model.")
    return info.sha, sorted(files, key=lambda file: file.name)


def check_space(folder: Path, files: Iterable[Published]) -> None:
    """Raise HubError unless what is missing of `files` fits on the disk of `folder`."""
    missing, free = missing_bytes(folder, files), shutil.disk_usage(folder).free
    if free < missing:
        raise HubError(
            f"{missing / 2**30:.1f} GiB are still to come, but the disk of {folder} has only "
            f"{free / 2**30:.1f} GiB left. Free some space, or set M1_HOME to another disk."
        )


def missing_bytes(folder: Path, files: Iterable[Published]) -> int:
    """What is still to come of `files`, less what has come of unfinished ones."""
    begun = sum(path.stat().st_size for path in (folder / ".cache").rglob("*.incomplete"))
    missing = sum(
        file.nbytes - min(file.nbytes, path.stat().st_size if path.is_file() else 0)
        for file in files
        for path in [folder / file.name]
    )
    return max(0, missing - begun)
