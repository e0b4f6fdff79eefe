"""Files read anew before speeds are compared: none is changed, and shares are shares."""

import sys
from pathlib import Path

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
