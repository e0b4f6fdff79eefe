"""The folder a checkpoint is written to: when it may be used, and when it is whole.

What it is: the rules that nothing of the user's is lost and no half checkpoint is taken for a whole
one. A marker lies in the folder until the manifest replaces it, and a lock of the operating system
keeps a second run out. What it is not: a writer of weights.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import Timeout

from m1local.errors import StorageError
from m1local.generation_config import NAME as GENERATION_CONFIG
from m1local.manifest import NAME as MANIFEST
from m1local.shards import INDEX
from m1local.tokenizer import FILES as TOKENIZER_FILES
from m1local_quantize.disk import SYSTEM_FILES, allocated, disk_error, removal_error
from m1local_quantize.hub import LICENCES
from m1local_quantize.journal import HIDDEN, LOCK, MARKER
from m1local_quantize.lock import locked, unlock

# What a run writes, so what the next may delete; anything else is the user's.
OWN_FILES = (
    *(
        LOCK,
        MARKER,
        HIDDEN,
        MANIFEST,
        "*.part",
        "*.safetensors",
        INDEX,
        "NOTICE",
    ),
    *LICENCES,
    *("config.json", GENERATION_CONFIG, "special_tokens_map.json", *TOKENIZER_FILES),
)
SPARE_BYTES = 64 << 20  # for the small files, and for the disk not to be full to the last byte


@contextmanager
def prepared(target: Path, source: Path, nbytes: int, *, overwrite: bool) -> Iterator[None]:
    """Hold `target` as a folder that this run alone may write; raises StorageError if none can be.

    A folder of an unfinished run is taken; a finished checkpoint only with `overwrite`; a folder
    with anything else in it never, nor one that another run is writing, nor where `nbytes` do not
    fit. Refusing leaves everything as it is, and so does this function itself.
    """
    _refuse_source(target, source)
    check_contents(target, overwrite=overwrite)
    try:
        _check_space(target, nbytes)
        target.mkdir(parents=True, exist_ok=True)
        lock = locked(target / LOCK)
    except Timeout:
        raise StorageError(
            f"Another run is writing {target}; wait for it, or choose another folder."
        ) from None
    except OSError as error:
        raise disk_error(error, target) from error
    try:
        check_contents(target, overwrite=overwrite)  # another run may just have finished
        yield
    finally:
        unlock(lock)


def remove_checkpoint(folder: Path) -> int:
    """Delete a checkpoint, finished or not, and its folder; returns the bytes that were freed.

    Raises StorageError where the folder holds anything that m1local did not write, or where a run
    is writing it; then nothing is deleted.
    """
    if not (folder / MANIFEST).is_file() and not (folder / MARKER).is_file():
        raise StorageError(f"{folder} holds no checkpoint made by m1local; nothing was deleted.")
    check_contents(folder, overwrite=True)
    try:
        lock = locked(folder / LOCK)
        try:
            freed = sum(allocated(path) for path in folder.iterdir())
            # What says that the folder is whole goes first, what says that it is ours last.
            own = sorted(folder.iterdir(), key=lambda path: (path.name != MANIFEST, path.name))
            (folder / MARKER).touch()
            for path in own:
                if path.name not in (LOCK, MARKER):
                    path.unlink()
            (folder / MARKER).unlink()
        finally:
            unlock(lock)
        folder.rmdir()
    except Timeout:
        raise StorageError(f"A run is writing {folder}; wait for it, or stop it.") from None
    except OSError as error:
        raise removal_error(error, folder) from error
    return freed


def _refuse_source(target: Path, source: Path) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer.is_relative_to(inner) or inner.is_relative_to(outer):
        raise StorageError(
            f"{target} is, contains or lies in the source folder {source}; choose another folder."
        )


def _check_space(target: Path, nbytes: int) -> None:
    """Raise StorageError unless `nbytes` fit beside what stays on the disk."""
    existing = next(
        path for path in (target.absolute(), *target.absolute().parents) if path.exists()
    )
    replaced = (
        sum(allocated(path) for path in target.iterdir()) if existing == target.absolute() else 0
    )
    free = shutil.disk_usage(existing).free + replaced
    if free < nbytes + SPARE_BYTES:
        raise StorageError(
            f"The checkpoint takes {nbytes / 2**20:,.0f} MiB and {SPARE_BYTES >> 20} to spare, but "
            f"the disk that holds {target} has only {free / 2**20:,.0f} MiB left. Free some space, "
            "or choose another folder."
        )


def write_index(target: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Write the index of the tensors that are really there."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=1, sort_keys=True) + "\n"
    (target / INDEX).write_text(text, encoding="utf-8", newline="\n")


def check_contents(target: Path, *, overwrite: bool) -> None:
    """Raise StorageError where `target` holds what may not be replaced."""
    try:
        if not target.exists():
            return
    except OSError as error:  # as of a name that is too long
        raise disk_error(error, target) from error
    if not target.is_dir():
        raise StorageError(f"{target} is a file; choose another folder.")
    finished, unfinished = (target / MANIFEST).exists(), (target / MARKER).exists()
    if finished and not overwrite:
        raise StorageError(
            f"{target} already holds a checkpoint. Add --overwrite to replace it, or choose "
            "another folder."
        )
    ours = OWN_FILES if finished or unfinished else (LOCK, f"{MARKER}.part")
    foreign = sorted(
        path.name
        for path in target.iterdir()
        if path.is_dir()
        or not any(fnmatchcase(path.name, pattern) for pattern in (*ours, *SYSTEM_FILES))
    )
    if foreign:
        raise StorageError(
            f"{target} already exists and holds other files ({foreign[0]!r}), which would be lost; "
            "move them, or choose another folder."
        )
