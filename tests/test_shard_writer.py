"""The shard writer against safetensors itself: every dtype, every size, nothing half written."""

import errno
import json
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m1local.formats.base import Stored
from m1local.manifest import FileRecord
from m1local.shards import DTYPES
from m1local_quantize import shard_writer, write_back
from m1local_quantize.shard_writer import ShardWriter

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (9,), (5, 7), (0, 4), (1, 1, 2, 1, 2)]


def every_kind() -> dict[str, Tensor]:
    """A tensor of every dtype and of odd sizes, with every bit pattern allowed."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for code, dtype in DTYPES.items():
        for shape in SHAPES:
            size = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            # Named so that in the order of names small elements would come first.
            tensors[f"{dtype.itemsize}.{code}.{'x'.join(map(str, shape))}.重"] = raw.view(
                dtype
            ).view(shape)
    return tensors


def write_all(path: Path, tensors: dict[str, Tensor]) -> None:
    layout = {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with ShardWriter(path, layout) as writer:
        assert not path.exists()  # it has another name until it is whole
        for name in reversed(tensors):
            writer.write(name, tensors[name])


def test_safetensors_reads_back_every_dtype_and_size(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", every_kind()
    write_all(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        # As bytes: NaNs are equal then, and 0.0 and -0.0 are not.
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_all(path, every_kind())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for entry in header.values():
        start = 8 + length + entry["data_offsets"][0]
        assert start % DTYPES[entry["dtype"]].itemsize == 0


def test_a_tensor_that_is_not_contiguous_is_written_in_its_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    write_all(tmp_path / "x.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


@pytest.mark.parametrize("hash_block", [16, 1 << 18])  # hashed beside being written, or at once
def test_a_tensor_in_parts_is_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hash_block: int
) -> None:
    monkeypatch.setattr(write_back, "AT_ONCE", 100)
    monkeypatch.setattr(shard_writer, "HASH_BLOCK", hash_block)
    tensors = {"a": torch.arange(77 * 16).view(77, 16), "b": torch.arange(5.0), "c": torch.ones(64)}
    write_all(tmp_path / "whole.safetensors", tensors)
    layout = {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with ShardWriter(tmp_path / "parts.safetensors", layout) as writer:
        assert writer.write("b", tensors["b"][:3]) is None
        for start, stop in ((0, 1), (1, 1), (1, 40)):
            assert writer.write("a", tensors["a"][start:stop]) is None
        found = writer.write("a", tensors["a"][40:])
        assert found == f"{zlib.crc32(tensors['a'].numpy().tobytes()):08x}"
        assert writer.write("c", tensors["c"])
        assert writer.write("b", tensors["b"][3:])
    assert writer.record == FileRecord.of(tmp_path / "parts.safetensors")
    assert writer.record == FileRecord.of(tmp_path / "whole.safetensors")


class Filling:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, block: memoryview) -> int:
        self._room -= len(block)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(block)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@pytest.mark.parametrize("hash_block", [16, 1 << 18])
def test_a_disk_that_fills_in_the_middle_of_a_part_costs_that_tensor_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hash_block: int
) -> None:
    monkeypatch.setattr(shard_writer, "HASH_BLOCK", hash_block)
    tensors = {"a": torch.arange(77 * 16).view(77, 16), "c": torch.arange(640).view(40, 16)}
    layout = {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, layout)
    writer.write("a", tensors["a"])
    writer._file = Filling(writer._file, 1000)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"), writer:
        writer.write("c", tensors["c"])
    assert not path.exists()
    with ShardWriter(path, layout, finished={"a"}) as again:
        again.write("c", tensors["c"])
    assert again.record == FileRecord.of(path)
    assert torch.equal(load_file(path)["a"], tensors["a"])
    assert torch.equal(load_file(path)["c"], tensors["c"])


def test_what_the_disk_lost_on_the_way_is_not_called_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [OSError(errno.EIO, "Input/output error")]

    def sync(descriptor: int) -> None:  # the system tells of it once
        if lost:
            raise lost.pop()

    monkeypatch.setattr(write_back, "AT_ONCE", 1)
    monkeypatch.setattr(os, "fsync", sync)
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(OSError, match="Input/output"),
        ShardWriter(path, {"x": Stored((4,), torch.float32)}) as writer,
    ):
        writer.write("x", torch.zeros(4))
    assert not path.exists()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int8)], ids=str
)
def test_a_tensor_that_was_laid_out_otherwise_is_refused(tmp_path: Path, tensor: Tensor) -> None:
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, {"x": Stored((2,), torch.float32)})
    with pytest.raises(ValueError, match=r"x is .* laid out as"), writer:
        writer.write("x", tensor)
    assert not path.exists()


def test_a_file_in_which_a_tensor_is_missing_is_never_put_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, {"x": Stored((2,), torch.float32)})
    with pytest.raises(ValueError, match=r"never written: \['x'\]"), writer:
        pass
    assert not path.exists()
