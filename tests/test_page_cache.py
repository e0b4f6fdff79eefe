"""Files read anew before speeds are compared: all are forgotten first, and shares are shares."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.page_cache import PIECE, read_anew, share_in_huge_pages
from m1local import home


@pytest.mark.parametrize("size", [1, 4097, PIECE + 3])
def test_what_is_read_anew_is_as_it_was(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(bytes(size))
    read_anew([path])
    assert path.read_bytes() == bytes(size)
    share = share_in_huge_pages(path)
    if sys.platform != "linux":
        assert share is None
    elif share is not None:  # a kernel may not say
        assert 0 <= share <= 1
        assert size > PIECE or share == 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot forget files")
def test_all_are_forgotten_before_the_first_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.write_bytes(b"x" * 5000)
    done: list[tuple[str, Path]] = []
    real = Path.open

    def forget(descriptor: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        done.append(("forgotten", Path(f"/proc/self/fd/{descriptor}").resolve()))

    def opened(path: Path, *given: Any, **named: Any) -> Any:
        if named.get("buffering") == 0:
            done.append(("read", path))
        return real(path, *given, **named)

    monkeypatch.setattr(os, "posix_fadvise", forget)
    monkeypatch.setattr(Path, "open", opened)
    read_anew(iter(paths))
    expected = [("forgotten", paths[0]), ("forgotten", paths[1]), ("read", paths[0])]
    assert [kind for kind, _ in done] == ["forgotten", "forgotten", "read", "read"]
    if sys.platform == "linux":
        assert done[:3] == expected


def test_an_empty_file_has_no_share(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert share_in_huge_pages(path) is None


def test_the_weights_of_a_checkpoint_are_looked_at() -> None:
    from bench.decode_speed import our_contestant

    one = our_contestant(home.DEMO, 0, "")
    assert [path.name for path in one.files] == ["model.safetensors"]
    one.look()
    assert one.huge_pages is None or 0 <= one.huge_pages <= 1
