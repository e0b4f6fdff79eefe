"""Damaged quantized checkpoints: found by size, by hash or by what the manifest says, and named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m1local.checkpoint import load_model
from m1local.errors import CheckpointError
from m1local.manifest import FileRecord
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.damage import change_json, overwrite, refused, truncate

Damage = Callable[[Path], object]
SHARD = "model.safetensors"
MATRIX = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def undamaged(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "tiny-m1-int4"
    list(quantize_checkpoint(tiny_checkpoint, folder, Recipe.find("int4")))
    return folder


@pytest.fixture
def quantized(undamaged: Path, tmp_path: Path) -> Path:
    """A quantized checkpoint, to be damaged."""
    return Path(shutil.copytree(undamaged, tmp_path / "quantized"))


def manifest_with(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: change_json(folder / "m1local.json", change)


def manifest_is(content: str) -> Damage:
    return lambda folder: (folder / "m1local.json").write_text(content)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)  # and is newer than the manifest now


BAD_QUANTIZED: dict[str, tuple[Damage, str]] = {
    "a truncated shard": (
        lambda folder: truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1),
        rf"{SHARD} has \d+ bytes, m1local.json says \d+: it is damaged. Copy it again",
    ),
    "a shard that grew": (
        lambda folder: overwrite(folder / SHARD, (folder / SHARD).stat().st_size, b"x"),
        rf"{SHARD} has \d+ bytes, m1local.json says \d+: it is damaged. Copy it again",
    ),
    "a flipped byte": (
        lambda folder: flip_a_byte(folder / SHARD),
        rf"{SHARD} is damaged: its SHA-256 is not the one in m1local.json. Copy it again",
    ),
    "a flipped byte in a small file": (
        lambda folder: flip_a_byte(folder / "NOTICE"),
        r"NOTICE is damaged: its SHA-256 is not the one in m1local.json. Copy it again",
    ),
    "a missing shard": (
        lambda folder: (folder / SHARD).unlink(),
        rf"quantized lacks {SHARD}, which m1local.json names; copy it again",
    ),
    "no m1local.json": (
        lambda folder: (folder / "m1local.json").unlink(),
        r"is quantized but has no m1local.json: it is unfinished, or .* `m1 quantize SRC OUT`",
    ),
    "m1local.json cut off": (
        lambda folder: truncate(folder / "m1local.json", 300),
        r"m1local.json is damaged \(.*; quantize again",
    ),
    "m1local.json empty": (manifest_is(""), r"m1local.json is damaged \(.*; quantize again"),
    "m1local.json endlessly nested": (
        manifest_is('{"a":' * 100_000),
        r"m1local.json is damaged \(.*; quantize again",
    ),
    "m1local.json of a newer version": (
        manifest_with(lambda raw: raw.update(format_version=2)),
        r"m1local.json has format version 2; this m1local reads 1. Update m1local",
    ),
    "m1local.json without version": (
        manifest_is("{}"),
        r"m1local.json has format version None; this m1local reads 1",
    ),
    "m1local.json a list": (manifest_is("[1]"), r"m1local.json has format version None"),
    "m1local.json without files": (
        manifest_with(lambda raw: raw.pop("files")),
        r"m1local.json is malformed \(.*files.*; quantize again",
    ),
    "files that are a list": (
        manifest_with(lambda raw: raw.update(files=[SHARD])),
        r"m1local.json is malformed \(.*; quantize again",
    ),
    "a file without its hash": (
        manifest_with(lambda raw: raw["files"].update({SHARD: {"nbytes": 3}})),
        r"m1local.json is malformed \(.*sha256.*; quantize again",
    ),
    "a matrix with an unknown key": (
        manifest_with(lambda raw: raw["linears"][MATRIX].update(bits=4)),
        r"m1local.json is malformed \(.*bits.*; quantize again",
    ),
    "a format that is no text": (
        manifest_with(lambda raw: raw["linears"][MATRIX].update(format=["int4"])),
        r"m1local.json is malformed \(.*\['int4'\].*; quantize again",
    ),
    "a format of a newer version": (
        manifest_with(lambda raw: raw["linears"][MATRIX].update(format="int2")),
        r"The format 'int2' is unknown to this m1local; it knows int8, .* Update m1local",
    ),
    "no group size": (
        manifest_with(lambda raw: raw["linears"][MATRIX].update(group_size=None)),
        rf"{MATRIX} is stored as int4, but the group size is None; .* quantize again",
    ),
    "another group size": (
        manifest_with(lambda raw: raw["linears"][MATRIX].update(group_size=32)),
        rf"{MATRIX}.scales has shape \[128, 1\], .* implies \[128, 2\]; the files do not belong",
    ),
    "another format": (
        manifest_with(lambda raw: raw["linears"][MATRIX].update(format="int8")),
        rf"has the foreign tensor {MATRIX}.zeros; .* Fetch",
    ),
    "a matrix forgotten": (
        manifest_with(lambda raw: raw["linears"].pop(MATRIX)),
        rf"has the foreign tensor {MATRIX}.scales and 1 more; .* Fetch",
    ),
    "a vector listed as a matrix": (
        manifest_with(lambda raw: raw["linears"].update({"model.norm": {"format": "int8"}})),
        r"m1local.json lists model.norm, which is no matrix of this model; quantize again",
    ),
}


@pytest.mark.parametrize("name", BAD_QUANTIZED)
def test_a_damaged_quantized_checkpoint_is_refused(quantized: Path, name: str) -> None:
    damage, match = BAD_QUANTIZED[name]
    damage(quantized)
    with refused(CheckpointError, match):
        load_model(quantized)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "C:\\evil", "\\\\server\\evil", "sub/evil"]
)
def test_a_manifest_may_not_lead_out_of_its_folder(quantized: Path, name: str) -> None:
    manifest_with(lambda raw: raw["files"].update({name: raw["files"][SHARD]}))(quantized)
    with refused(CheckpointError, r"names the file .*, which does not lie in it; do not use this"):
        load_model(quantized)


def test_a_copied_checkpoint_is_hashed_once_and_then_trusted(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(quantized / "m1local.json", ns=(0, 0))  # copying makes the other files look newer
    hashed: list[str] = []
    measure = FileRecord.of

    def counted(path: Path) -> FileRecord:
        hashed.append(path.name)
        return measure(path)

    monkeypatch.setattr(FileRecord, "of", counted)
    load_model(quantized)
    load_model(quantized)
    assert sorted(hashed) == sorted({path.name for path in quantized.iterdir()} - {"m1local.json"})
