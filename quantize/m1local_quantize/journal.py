"""What an unfinished run has written, so that the next one goes on where it ended.

What it is: the file `m1local.unfinished` in the target: a fingerprint of everything the result's
bytes follow from, then one line for every tensor written, with its CRC-32. Whatever a killed
process or a full disk left half done has no line, or not that checksum, and is written again. What
it is not: trusted; another fingerprint, or none, means starting over. Nor is it protection from
anyone: the SHA-256 of the files stand in the manifest.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from m1local import __version__, folder
from m1local.checkpoint import CONFIG
from m1local.manifest import FORMAT_VERSION, HASH_BLOCK
from m1local.manifest import NAME as MANIFEST
from m1local.tokenizer import FILES as TOKENIZER_FILES
from m1local_quantize.methods import optimum_gptq
from m1local_quantize.plan import Plan, Step
from m1local_quantize.shard_writer import Layout, partial_path
from m1local_quantize.source import Source
from m1local_quantize.text import Text

MARKER = folder.UNFINISHED
LOCK = "m1local.lock"
HIDDEN = "m1local.hidden"  # what a measurement needs to go on where the source was dropped
NOTE = "This folder is being written by m1local; the same command continues it."


@dataclass(slots=True)
class Journal:
    """The tensors that are in place, and the file that says so."""

    path: Path
    finished: set[str] = field(default_factory=set)  # tensors of the target
    started_over: bool = False

    def add(self, checksums: Mapping[str, str]) -> None:
        """Note tensors as written; their bytes must have left this process."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"tensors": dict(checksums)}) + "\n")
        self.finished.update(checksums)

    def has(self, step: Step) -> bool:
        """Whether all that becomes of a source tensor is in place."""
        return step.tensors.keys() <= self.finished


def take_up(target: Path, source: Source, plan: Plan, calibration: Text | None) -> Journal:
    """Go on with what lies in `target`, or clear it: afterwards it holds only what is of use.

    At no moment is the folder taken for a whole checkpoint, or for somebody else's.
    """
    fingerprint = _fingerprint(source, plan, calibration)
    journal = Journal(target / MARKER)
    recorded = _read(journal.path, fingerprint)
    verified = _verified(target, plan, recorded or {})
    partial = journal.path.with_name(f"{MARKER}.part")
    lines: list[dict[str, Any]] = [{"note": NOTE, "fingerprint": fingerprint}]
    lines += [{"tensors": {name: recorded[name]}} for name in verified if recorded]
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if recorded is None and (target / HIDDEN).exists():
        (target / HIDDEN).unlink()  # before the journal is this run's: they are another one's
    journal.started_over = recorded is None and journal.path.exists()
    os.replace(partial, journal.path)
    (target / MANIFEST).unlink(missing_ok=True)
    journal.finished = verified
    kept = {MARKER, LOCK, HIDDEN} if recorded is not None else {MARKER, LOCK}
    for file_name, steps in plan.shards.items():
        path = target / file_name
        if path.is_file() and not all(journal.has(step) for step in steps):
            os.replace(path, partial_path(path))
        if any(name in verified for step in steps for name in step.tensors):
            kept |= {file_name, partial_path(path).name}
    for path in list(target.iterdir()):
        if path.name not in kept:
            path.unlink()
    return journal


def _fingerprint(source: Source, plan: Plan, calibration: Text | None) -> str:
    """SHA-256 of all that decides the bytes of the result, as far as it is cheap to know."""
    decisive = {
        "m1local": [__version__, FORMAT_VERSION],
        "torch": torch.__version__,
        "optimum": optimum_gptq.versions(plan),
        "calibration": None if calibration is None else calibration.sha256,
        "source": dict(source.files.identity()),
        "described": described(source.folder),
        "plan": {
            file: [[step.name, repr(step.spec), step.method] for step in steps]
            for file, steps in plan.shards.items()
        },
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def described(folder: Path) -> dict[str, str]:
    """By name, the SHA-256 of what says how the weights compute and how text becomes tokens."""
    paths = [folder / name for name in (CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _read(path: Path, fingerprint: str) -> dict[str, str] | None:
    """Recorded checksums by tensor; None where there is no journal of this very run."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    recorded: dict[str, str] = {}
    try:
        if json.loads(lines[0])["fingerprint"] != fingerprint:
            return None
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    for line in lines[1:]:
        try:
            recorded |= json.loads(line)["tensors"]
        except (ValueError, KeyError, TypeError):
            break  # the last line of a killed run may be cut; what it was to say is done again
    return recorded


def _verified(target: Path, plan: Plan, recorded: Mapping[str, str]) -> set[str]:
    """Tensors whose bytes in the files are those that were recorded."""
    verified: set[str] = set()
    for file_name, steps in plan.shards.items():
        tensors = {name: stored for step in steps for name, stored in step.tensors.items()}
        if not tensors.keys() & recorded.keys():
            continue
        path = target / file_name
        found = path if path.is_file() else partial_path(path)
        layout = Layout.of(tensors)
        if not found.is_file() or found.stat().st_size != layout.file_bytes:
            continue
        with found.open("rb") as file:
            if file.read(len(layout.header)) != layout.header:
                continue
            for name in tensors.keys() & recorded.keys():
                if _checksum(file, layout.offsets[name], tensors[name].nbytes) == recorded[name]:
                    verified.add(name)
    return verified


def _checksum(file: BinaryIO, start: int, nbytes: int) -> str:
    found = 0
    file.seek(start)
    while nbytes:
        block = file.read(min(nbytes, HASH_BLOCK))
        found = zlib.crc32(block, found)
        nbytes -= len(block)
    return f"{found:08x}"
