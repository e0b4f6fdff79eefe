"""Publishing a finished checkpoint on the model hub: weights first, the manifest last.

What it is: what lies there already and what is still to be sent, and the sending as a generator of
events; huggingface_hub does the transfer, with its own login. Every file of weights is a commit of
its own, so that what was sent stays sent, and nobody takes the repository for a checkpoint before
the manifest is there. What it is not: a check of the checkpoint (`m1 verify`), or a question.
"""

import fnmatch
import hashlib
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from m1local.errors import HubError
from m1local.manifest import NAME as MANIFEST
from m1local_quantize import card
from m1local_quantize.hub import TIMEOUT_SECONDS, WEIGHTS
from m1local_quantize.insist import LOG_IN, TriedAgain, insist, outcome
from m1local_quantize.transfer import file_hash

HUBS_OWN = ".gitattributes"  # made by the hub with every repository


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to be published."""

    name: str
    nbytes: int
    sha256: str
    content: Path | bytes

    @classmethod
    def of(cls, name: str, content: bytes) -> Self:
        """A file that is not on the disk, or read from it."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content)

    def is_like(self, published: str | None) -> bool:
        """Whether its hash is `published`, "sha256:…", or "git:…" for small ones."""
        if published is None or published.startswith("sha256:"):
            return published == f"sha256:{self.sha256}"
        if isinstance(self.content, Path):
            return file_hash(self.content, published) == published
        blob = f"blob {self.nbytes}\0".encode() + self.content
        return published == f"git:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Sending:
    """These files are on their way; bytes of all that is published."""

    names: tuple[str, ...]
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """All files are there, with the hashes that they have here."""

    repository: str
    url: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A checkpoint, a repository, and what of the one is in the other."""

    facts: card.Facts
    endpoint: str | None
    groups: tuple[tuple[Outgoing, ...], ...]  # each one commit, in this order
    there: frozenset[str]  # files that lie there as they are here
    replaced: frozenset[str]  # files that lie there as others
    private: bool
    exists: bool

    @classmethod
    def prepare(
        cls, folder: Path, repository: str, *, private: bool = True, endpoint: str | None = None
    ) -> Self:
        """Compare the checkpoint in `folder` with what the hub has; nothing is sent.

        A repository that exists keeps its visibility. Raises CheckpointError for a bad checkpoint,
        and HubError for a name that is none, without a login, where the hub cannot be reached, and
        where the repository holds something else.
        """
        check_repository(repository)
        facts = card.Facts.of(folder, repository)
        endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
        groups = _groups(folder, facts)
        found = outcome(_look(repository, endpoint))
        files = [file for group in groups for file in group]
        hashes = {} if found is None else _hashes(found)
        there = {file.name for file in files if file.is_like(hashes.get(file.name))}
        _refuse_others(repository, {file.name for file in files}, set(hashes), there)
        if found is not None and private and not found.private:
            raise HubError(
                f"{repository} exists and is public: everybody would see what is sent there. Add "
                "--public if that is meant, or choose another name."
            )
        return cls(
            facts=facts,
            endpoint=endpoint,
            groups=groups,
            there=frozenset(there),
            replaced=frozenset((hashes.keys() & {f.name for f in files}) - there),
            private=private if found is None else bool(found.private),
            exists=found is not None,
        )

    @property
    def repository(self) -> str:
        """OWNER/NAME."""
        return self.facts.repository

    @property
    def files(self) -> list[Outgoing]:
        """All files, in the order in which they are sent."""
        return [file for group in self.groups for file in group]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def there_bytes(self) -> int:
        """Bytes of the files that need not be sent."""
        return sum(file.nbytes for file in self.files if file.name in self.there)


def check_repository(name: str) -> None:
    """Raise HubError unless `name` can be a repository's and somebody is logged in to the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, by their documents
        validate_repo_id,
    )

    try:
        validate_repo_id(name)
        is_name = name.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise HubError(
            f"{name} cannot be a repository's name; give OWNER/NAME, where OWNER is you or an "
            "organization of yours."
        )
    if get_token() is None:
        raise HubError(f"You are not logged in to the model hub; {LOG_IN}")


def publish(publication: Publication) -> Iterator[Sending | TriedAgain | Published]:
    """Send what is not there yet; call `prepare` and this again to go on after a cut.

    Raises HubError where the hub cannot be reached, refuses, or has other files afterwards.
    """
    repository, api = publication.repository, _api(publication.endpoint)
    create = partial(api.create_repo, repository, private=publication.private, exist_ok=True)
    if not publication.exists:
        yield from insist(repository, create)
    done, total = publication.there_bytes, publication.total_bytes
    for group in publication.groups:
        missing = [file for file in group if file.name not in publication.there]
        if missing:
            yield Sending(tuple(file.name for file in missing), done, total)
            yield from insist(repository, partial(_commit, api, repository, missing))
            done += sum(file.nbytes for file in missing)
    yield Sending((), done, total)
    found = yield from _look(repository, publication.endpoint)
    hashes = {} if found is None else _hashes(found)
    wrong = [file.name for file in publication.files if not file.is_like(hashes.get(file.name))]
    if found is None or wrong:
        raise HubError(
            f"The hub does not show {', '.join(wrong)} of {repository} as they were sent; run the "
            "same command again."
        )
    yield Published(repository, f"{api.endpoint}/{repository}", found.sha)


def _groups(folder: Path, facts: card.Facts) -> tuple[tuple[Outgoing, ...], ...]:
    """Each file of weights, then the small ones, then the card and the manifest."""
    files = [
        Outgoing(name, record.nbytes, record.sha256, folder / name)
        for name, record in sorted(facts.manifest.files.items())
    ]
    weights = [(file,) for file in files if fnmatch.fnmatch(file.name, WEIGHTS)]
    small = tuple(file for file in files if not fnmatch.fnmatch(file.name, WEIGHTS))
    last = (
        Outgoing.of(card.NAME, card.card(facts).encode()),
        Outgoing.of(MANIFEST, (folder / MANIFEST).read_bytes()),
    )
    return (*weights, small, last)


def _refuse_others(repository: str, ours: set[str], published: set[str], there: set[str]) -> None:
    """Raise HubError where the repository is not for this checkpoint alone."""
    foreign = sorted(published - ours - {HUBS_OWN})
    if foreign:
        raise HubError(
            f"{repository} holds other files ({foreign[0]!r}); choose a new name, or delete them "
            "there first."
        )
    if MANIFEST in published - there:
        raise HubError(
            f"{repository} already holds another checkpoint, which would be broken while this one "
            "is sent; choose a new name, or delete its files there first."
        )


def _look(repository: str, endpoint: str | None) -> Generator[TriedAgain, None, Any]:
    """What the hub says of the repository, or None where it shows none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def ask() -> Any:
        try:
            return _api(endpoint).model_info(
                repository, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    return (yield from insist(repository, ask))


def _hashes(found: Any) -> dict[str, str]:
    """The published hashes by file name."""
    return {
        entry.rfilename: f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        for entry in found.siblings or []
    }


def _api(endpoint: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=True)


def _commit(api: Any, repository: str, files: list[Outgoing]) -> None:
    from huggingface_hub import CommitOperationAdd

    names = ", ".join(file.name for file in files)
    api.create_commit(
        repository,
        [CommitOperationAdd(file.name, file.content) for file in files],
        commit_message=names if len(names) <= 72 else f"{len(files)} files",
    )
