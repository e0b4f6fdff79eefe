"""A lock of the operating system on a file that is only there while it is held.

What it is: the step that filelock leaves out, so that removing the file never lets two in. What it
is not: a word to the user; see target.py and hub.py.
"""

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

MOST_TRIES = 100  # each was overtaken by one that had the lock and gave it back


def locked(path: Path) -> FileLock:
    """Hold the lock `path`, made where it is missing; raises filelock.Timeout where another does.

    Raises OSError where the file cannot be made.
    """
    for _ in range(MOST_TRIES):
        # While it is open its number goes to no other file, so that the comparison says: what
        # `path` names now was there before the lock, and is what was locked.
        there = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock = FileLock(path)
            # Its last holder may remove it now, before filelock opens it or after.
            with contextlib.suppress(FileNotFoundError):
                lock.acquire(timeout=0)
                if os.path.samestat(os.fstat(there), path.stat()):
                    return lock
            lock.release()  # of a file that its last holder has removed meanwhile
        finally:
            os.close(there)
    raise Timeout(str(path))


def unlock(lock: FileLock) -> None:
    """Give back what `locked` gave, and remove its file."""
    try:
        if os.name == "posix":  # Windows removes no open file: there filelock tries it afterwards
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
    finally:
        lock.release()
