"""What the disk refuses, in the user's words.

What it is: one translation, without torch. What it is not: a check; see target.py and hub.py.
"""

import errno
from pathlib import Path

from m1local.errors import StorageError


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
