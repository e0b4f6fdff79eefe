"""A growing file is sent to the disk while it grows, so that its end need not wait for all of it.

What it is: `fsync` now and then, on a thread of its own. What it is not: more durable; a file
counts only once `finish` has returned.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor

AT_ONCE = 256 << 20  # bytes; enough for a disk to write at its full speed


class WriteBack:
    """The write-back of one open file."""

    def __init__(self, descriptor: int) -> None:
        """For the file `descriptor`, which stays open until `close` has returned."""
        self._descriptor = descriptor
        self._waiting = 0  # bytes
        self._syncing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    def grown(self, nbytes: int) -> None:
        """Note bytes that have left this process; raises OSError where earlier ones were lost."""
        self._waiting += nbytes
        if self._waiting >= AT_ONCE and (self._syncing is None or self._syncing.done()):
            self._check()
            self._waiting = 0
            self._syncing = self._thread.submit(os.fsync, self._descriptor)

    def finish(self) -> None:
        """Return when all is on the disk; raises OSError where it is not."""
        self._check()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file."""
        self._thread.shutdown()

    def _check(self) -> None:
        """Wait for the last `fsync`: the system reports what it lost to one of them only."""
        if self._syncing is not None:
            self._syncing.result()
