"""One file on its way from the model hub: resumed where it was cut, and compared with its hash.

What it is: huggingface_hub's transfer in a thread, so that it can be watched, and something else
be done meanwhile; and the faults of a connection, in a user's words. What it is not: a choice of
what to fetch (hub.py, arriving.py).
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from m1local.errors import HubError
from m1local.manifest import HASH_BLOCK

ATTEMPTS = 5  # at one file; each goes on where the last was cut
WAIT_SECONDS = 2.0  # before the second attempt, and twice as long before each further one
TICK_SECONDS = 0.2  # between two looks at a transfer
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BytesFetched:
    """Some more has come, of all that is to come."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """What the hub says of one file; a hash is "sha256:…", or "git:…" for small ones."""

    name: str
    nbytes: int
    hash: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a repository's files come from, and the folder that they go to."""

    repository: str
    commit: str
    endpoint: str | None
    folder: Path


class Transfer:
    """One file being fetched, in a thread."""

    def __init__(self, place: Place, file: Published) -> None:
        """Begin."""
        self.file = file
        self._place = place
        self._received = 0
        self._ended = threading.Event()
        self._error: BaseException | None = None
        # A daemon: whoever gives up waiting must not wait for the network.
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def received(self) -> int:
        """Bytes of the file that have come."""
        return min(self._received, self.file.nbytes)

    def wait(self) -> Iterator[int]:
        """Wait until the file is there and right; yields how many bytes have come.

        Raises HubError where it did not come, or came as another.
        """
        while not self._ended.wait(TICK_SECONDS):
            yield self.received
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        # The library warns of every cut that it survives; those that it does not are our error.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            self._fetch()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _fetch(self) -> None:
        place, file = self._place, self.file
        for again in (False, True):  # `again` discards what was received before
            path = with_words(place.repository, place.commit, partial(self._download, again))
            if path.stat().st_size == file.nbytes and file_hash(path, file.hash) == file.hash:
                return
            path.unlink()
        raise HubError(
            f"{file.name} of {place.repository} came twice with other bytes than the hub "
            "publishes. The mirror or the connection changes files; try later, or another "
            "HF_ENDPOINT."
        )

    def _download(self, again: bool) -> Path:
        from huggingface_hub import hf_hub_download

        place = self._place
        self._received = 0
        found = hf_hub_download(
            place.repository, self.file.name, revision=place.commit, local_dir=place.folder,
            endpoint=place.endpoint, force_download=again, tqdm_class=self._counter(),
        )  # fmt: skip
        return Path(found)

    def _counter(self) -> Any:
        """A progress bar that draws nothing and counts what comes."""
        from tqdm import tqdm

        watched = self

        class Counter(tqdm):  # type: ignore[misc]  # has no annotations
            def __init__(self, *arguments: Any, **options: Any) -> None:
                watched._received += int(options.get("initial") or 0)
                super().__init__(*arguments, **(options | {"disable": True}))

            def update(self, n: float | None = 1) -> None:
                watched._received += int(n or 0)

        return Counter


def file_hash(path: Path, like: str) -> str:
    """The file's hash of the same kind as `like`."""
    kind = like.partition(":")[0]
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":  # as git names a blob
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def with_words(repository: str, revision: str | None, call: Callable[[], T]) -> T:
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
            if not is_connection(error):
                raise
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if refused or attempt == ATTEMPTS - 1:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise HubError(
                    f"{repository} could not be fetched ({reason}). See to the connection, or name "
                    "a mirror in HF_ENDPOINT; what has come is kept, and the same command goes on "
                    "from there."
                ) from error
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def is_connection(error: Exception) -> bool:
    """Whether the network is at fault, and not this disk or this program."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "HTTPError", "TransportError", "HfHubHTTPError", "ConnectionError", "TimeoutError",
            "LocalEntryNotFoundError", "FileMetadataError", "OfflineModeIsEnabled",
        }
    ) or "Consistency check failed" in str(error)  # fmt: skip
