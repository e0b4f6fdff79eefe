"""Files as a machine has them after its start: read anew into the page cache, in large pieces.

What it is: forgetting what the system keeps of some files and reading them again, and how much of a
file is then mapped by huge pages. Files written or read while memory was in pieces are kept in
pieces of 4 KiB all over it, and reading those takes longer; so a comparison begins with the same
for all. What it is not: able to make memory whole; where it is in pieces the share
says so. Only Linux tells and forgets.
"""

import mmap
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

PIECE = 16 << 20


def read_anew(paths: Iterable[Path]) -> None:
    """Let the system forget what it keeps of `paths`, all of them, and read each from its disk."""
    files = list(paths)
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()  # what is not on the disk yet is kept
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(PIECE):
                pass


def share_in_huge_pages(path: Path) -> float | None:
    """Which share of a file is mapped by huge pages; None where the system does not say."""
    size = path.stat().st_size
    if sys.platform != "linux" or not size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sum(mapped[at] for at in range(0, size, mmap.PAGESIZE))
        described = Path("/proc/self/smaps").read_text(encoding="utf-8")
    mappings = described.split(str(path.resolve()))[1:]
    found = [re.search(r"FilePmdMapped: *(\d+) kB", mapping) for mapping in mappings[:1]]
    return round(int(found[0][1]) * 1024 / size, 2) if found and found[0] else None
