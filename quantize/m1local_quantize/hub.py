"""Fetching an original checkpoint from the model hub, file by file, and checking every byte.

What it is: huggingface_hub does the transfer (resumed where it was cut, mirrors through
HF_ENDPOINT); this adds a revision that stays the same from attempt to attempt, and our own
comparison of every file with the hash that the hub publishes. What it is not: a cache shared with
other programs; the files lie in a folder like any other checkpoint.
"""

import fnmatch
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from m1local.errors import HubError
from m1local.manifest import HASH_BLOCK
from m1local_quantize.disk import disk_error

RECORD = "m1local-source.json"  # which repository and revision the folder is, and what was checked
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "LICENSE*", "NOTICE*", "*.pdf")
ATTEMPTS = 5  # at one file; each goes on where the last was cut
WAIT_SECONDS = 2.0  # before the second attempt, and twice as long before each further one
TIMEOUT_SECONDS = 20.0
TICK_SECONDS = 0.2  # between two looks at a transfer
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Published:
    """What the hub says of one file; a hash is "sha256:…", or "git:…" for small ones."""

    name: str
    nbytes: int
    hash: str


@dataclass(frozen=True, slots=True)
class BytesFetched:
    """Some more of a file has come; bytes of the whole repository."""

    done_bytes: int
    total_bytes: int


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


def pull(
    repository: str, folder: Path, *, revision: str | None = None, endpoint: str | None = None
) -> Iterator[BytesFetched | FileFetched | Pulled]:
    """Fetch what m1local reads of `repository` into `folder`; call again to go on after a cut.

    Raises HubError where the hub cannot be reached, refuses, or sends what it did not publish,
    and StorageError where the disk is full or read-only.
    """
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    record = Record.read(folder)
    pinned = None
    if record is not None and (record.repository, record.asked) == (repository, revision):
        pinned = record.revision
    commit, files = _published(repository, pinned or revision, endpoint)
    checked = record.checked if record is not None and record.revision == commit else {}
    record = Record(repository, commit, revision, dict(checked))
    total = sum(file.nbytes for file in files)
    done = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, files)
        record.write(folder)
        for file in files:
            path = folder / file.name
            known = record.checked.get(file.name) == file.hash
            if not (known and path.is_file() and path.stat().st_size == file.nbytes):
                for received in _fetch(repository, commit, file, folder, endpoint):
                    yield BytesFetched(done + received, total)
                record.checked[file.name] = file.hash
                record.write(folder)
            done += file.nbytes
            yield FileFetched(file.name, done, total)
        replace(record, complete=True).write(folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on transfers
    except OSError as error:
        raise disk_error(error, folder) from error
    yield Pulled(folder, repository, commit)


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

    info = _with_words(repository, revision, ask)
    files = []
    for entry in info.siblings or []:
        if "/" in entry.rfilename or not any(fnmatch.fnmatch(entry.rfilename, w) for w in WANTED):
            continue
        digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        files.append(Published(entry.rfilename, entry.size or 0, digest))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise HubError(
            f"{repository} holds no .safetensors file; name the repository of an original model."
        )
    return info.sha, sorted(files, key=lambda file: file.name)


def _fetch(
    repository: str, commit: str, file: Published, folder: Path, endpoint: str | None
) -> Iterator[int]:
    """Fetch one file and check it; yields how many bytes of it have come."""
    for again in (False, True):
        transfer = _Transfer(repository, commit, file, folder, endpoint, again=again)
        while not transfer.ended.wait(TICK_SECONDS):
            yield min(transfer.received, file.nbytes)
        path = transfer.result()
        if path.stat().st_size == file.nbytes and _hash(path, file.hash) == file.hash:
            return
        path.unlink()
    raise HubError(
        f"{file.name} of {repository} came twice with other bytes than the hub publishes. The "
        "mirror or the connection changes files; try later, or another HF_ENDPOINT."
    )


class _Transfer:
    """huggingface_hub's transfer of one file, in a thread, so that it can be watched."""

    def __init__(
        self,
        repository: str,
        commit: str,
        file: Published,
        folder: Path,
        endpoint: str | None,
        *,
        again: bool,
    ) -> None:
        """Begin; `again` discards what was received before."""
        self.received = 0
        self.ended = threading.Event()
        self._path: Path | None = None
        self._error: BaseException | None = None
        arguments = (repository, commit, file.name, folder, endpoint, again)
        # A daemon: whoever gives up waiting must not wait for the network.
        threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def result(self) -> Path:
        """The file, or the error that ended the transfer."""
        if self._error is not None:
            raise self._error
        if self._path is None:
            raise RuntimeError("the transfer has not ended")
        return self._path

    def _run(
        self,
        repository: str,
        commit: str,
        name: str,
        folder: Path,
        endpoint: str | None,
        again: bool,
    ) -> None:
        from huggingface_hub import hf_hub_download

        def transfer() -> Path:
            self.received = 0
            found = hf_hub_download(
                repository, name, revision=commit, local_dir=folder, endpoint=endpoint,
                force_download=again, tqdm_class=self._counter(),
            )  # fmt: skip
            return Path(found)

        # It warns of every cut that it survives; those that it does not are our error.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            self._path = _with_words(repository, commit, transfer)
        except BaseException as error:
            self._error = error
        finally:
            self.ended.set()

    def _counter(self) -> Any:
        """A progress bar that draws nothing and counts what comes."""
        from tqdm import tqdm

        watched = self

        class Counter(tqdm):  # type: ignore[misc]  # has no annotations
            def __init__(self, *arguments: Any, **options: Any) -> None:
                watched.received += int(options.get("initial") or 0)
                super().__init__(*arguments, **(options | {"disable": True}))

            def update(self, n: float | None = 1) -> None:
                watched.received += int(n or 0)

        return Counter


def _hash(path: Path, like: str) -> str:
    """The file's hash of the same kind as `like`."""
    kind = like.partition(":")[0]
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":  # as git names a blob
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def _with_words(repository: str, revision: str | None, call: Callable[[], T]) -> T:
    """`call`, tried again while the connection is at fault, its errors in the user's words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for attempt in range(ATTEMPTS):
        try:
            return call()
        except GatedRepoError as error:
            raise HubError(
                f"{repository} is only for people who accepted its conditions: accept them on its "
                "page, log in with `hf auth login`, and try again."
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise HubError(
                f"The hub has no repository {repository} for you; check the name."
            ) from error
        except RevisionNotFoundError as error:
            raise HubError(f"{repository} has no revision {revision}.") from error
        except Exception as error:
            if not _is_connection(error):
                raise
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if refused or attempt == ATTEMPTS - 1:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise HubError(
                    f"{repository} could not be fetched ({reason}). What has come is kept; the "
                    "same command goes on from there."
                ) from error
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _is_connection(error: Exception) -> bool:
    """Whether the network is at fault, and not this disk or this program."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "HTTPError", "TransportError", "HfHubHTTPError", "ConnectionError", "TimeoutError",
            "LocalEntryNotFoundError", "FileMetadataError", "OfflineModeIsEnabled",
        }
    ) or "Consistency check failed" in str(error)  # fmt: skip


def _check_space(folder: Path, files: list[Published]) -> None:
    missing = sum(
        file.nbytes - min(file.nbytes, path.stat().st_size if path.is_file() else 0)
        for file in files
        for path in [folder / file.name]
    )
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise HubError(
            f"{missing / 2**30:.1f} GiB are still to come, but the disk of {folder} has only "
            f"{free / 2**30:.1f} GiB left. Free some space, or set M1_HOME to another disk."
        )
