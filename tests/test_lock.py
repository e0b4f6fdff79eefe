"""A lock whose file goes when it is released: never two hold it, on whatever file of its name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from m1local_quantize import lock as module
from m1local_quantize.lock import locked, unlock

# Each holder makes a file that must not be there, and removes it before it lets go.
HOLDER = """
import sys
from pathlib import Path
from filelock import Timeout
from m1local_quantize.lock import locked, unlock
path, inside, held = Path(sys.argv[1]), Path(sys.argv[1] + ".inside"), 0
while held < 1000:
    try:
        lock = locked(path)
    except Timeout:
        continue
    inside.touch(exist_ok=False)
    inside.unlink()
    unlock(lock)
    held += 1
"""


def test_the_file_is_there_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = locked(path)
    for another in (locked, lambda path: FileLock(path).acquire(timeout=0)):
        with pytest.raises(Timeout):
            another(path)
    unlock(lock)
    assert list(tmp_path.iterdir()) == []
    unlock(locked(path))
    assert list(tmp_path.iterdir()) == []


def test_a_file_left_by_a_run_that_was_killed_is_taken(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    unlock(locked(tmp_path / "lock"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="no open file is removed there")
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replaced = tmp_path / "lock", list[Path]()

    class Late(FileLock):
        """Locks just before the last holder removes the file, and another makes its own."""

        def acquire(self, *args: object, **options: object) -> object:  # type: ignore[override]
            proxy = super().acquire(timeout=0)
            if not replaced:
                replaced.append(path)
                path.unlink()
                path.touch()
            return proxy

    monkeypatch.setattr(module, "FileLock", Late)
    lock = locked(path)
    assert replaced
    with pytest.raises(Timeout):
        FileLock(path).acquire(timeout=0)
    unlock(lock)


def test_a_file_that_is_gone_when_filelock_opens_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken = list[Path]()

    class Old(FileLock):
        """As filelock was: it does not make the file that it has seen before."""

        def acquire(self, *args: object, **options: object) -> object:  # type: ignore[override]
            if not overtaken:
                overtaken.append(tmp_path)
                raise FileNotFoundError
            return super().acquire(timeout=0)

    monkeypatch.setattr(module, "FileLock", Old)
    unlock(locked(tmp_path / "lock"))
    assert overtaken
    assert list(tmp_path.iterdir()) == []


def test_processes_never_hold_it_together(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "lock")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = [holder.communicate(timeout=60)[1] for holder in holders]
    assert [holder.returncode for holder in holders] == [0, 0, 0, 0], said
    assert list(tmp_path.iterdir()) == []
