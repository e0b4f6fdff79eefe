"""What the disk refuses, in the user's words, and how much of it a file takes.

What it is: translations, without torch. What it is not: a check; see target.py and hub.py.
"""

import errno
from pathlib import Path

from m1local.errors import StorageError

SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs*")  # dropped there by nobody


def disk_error(error: OSError, target: Path) -> StorageError:
    """The user's words for what went wrong while writing to `target`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk that holds {target} is full. Free some space and run the same command "
            "again; the source is untouched."
        )
    return StorageError(
        f"{target} cannot be written ({error.strerror or error}). Choose another folder, or mend "
        "its permissions, and run the same command again."
    )


def removal_error(error: OSError, folder: Path) -> StorageError:
    """The user's words for what went wrong while deleting `folder`."""
    return StorageError(
        f"{folder} cannot be deleted ({error.strerror or error}); close what uses it and try again."
    )


def allocated(path: Path) -> int:
    """Bytes the file takes on the disk; one being written is laid out at its full size at once."""
    status = path.stat()
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * 512)
