"""Bad input: whatever is wrong with a source checkpoint ends in one clear line for the user.

Damaged and foreign sources are refused alike by the loader and by the quantizer, which then has
touched nothing. Damaged quantized checkpoints: tests/test_damaged_checkpoint.py; recipes:
tests/test_recipe.py; targets: tests/test_target.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m1local.checkpoint import load_model
from m1local.errors import CheckpointError, ConfigError, M1Error
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.damage import change_json, overwrite, refused, truncate

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def change_tensors(
    folder: Path, file_name: str, change: Callable[[dict[str, Tensor]], object]
) -> None:
    tensors = load_file(folder / file_name)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file_name)


def put(folder: Path, name: str, tensor: Tensor) -> None:
    """Store `tensor` under `name` in the second shard and in the index."""
    change_tensors(folder, SECOND, lambda tensors: tensors.update({name: tensor}))
    change_json(folder / INDEX, lambda index: index["weight_map"].update({name: SECOND}))


def drop(folder: Path, name: str) -> None:
    change_tensors(folder, SECOND, lambda tensors: tensors.pop(name))
    change_json(folder / INDEX, lambda index: index["weight_map"].pop(name))


def map_to(name: str, file_name: object) -> Damage:
    """The index says that the tensor `name` is in `file_name`."""
    return lambda folder: change_json(
        folder / INDEX, lambda index: index["weight_map"].update({name: file_name})
    )


def only_pickles(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def no_weights(folder: Path) -> None:
    for path in (folder / FIRST, folder / SECOND, folder / INDEX):
        path.unlink()


def without_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    shutil.copy(folder / FIRST, folder / "model.safetensors")


def shards_are(folder: Path, content: bytes) -> None:
    (folder / FIRST).write_bytes(content)


def config_with(**changes: object) -> Damage:
    return lambda folder: change_json(folder / "config.json", lambda raw: raw.update(changes))


NORM = "model.norm.weight"
BAD_SOURCES: dict[str, tuple[Damage, type[M1Error], str]] = {
    "no folder": (shutil.rmtree, CheckpointError, "is no folder; give the folder of a checkpoint"),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        ConfigError,
        r"has no config.json; is it the folder of",
    ),
    "config.json of a Llama": (
        config_with(model_type="llama"),
        ConfigError,
        r"config.json: this is llama; m1local runs baichuan_m1",
    ),
    "config.json of another size": (
        config_with(num_hidden_layers=3, sliding_window_layers=[1]),
        CheckpointError,
        r"has the foreign tensor model.layers.3.\w.* and \d+ more; .* Fetch",
    ),
    "quantized by another tool": (
        config_with(quantization_config={"quant_method": "awq"}),
        CheckpointError,
        r"is quantized but has no m1local.json: .* Start from the original",
    ),
    "a tensor missing": (
        lambda folder: drop(folder, NORM),
        CheckpointError,
        rf"source lacks tensor {NORM}; .* Fetch the model again",
    ),
    "a foreign tensor": (
        lambda folder: put(folder, "model.layers.0.self_attn.q_norm.weight", torch.ones(16)),
        CheckpointError,
        r"source has the foreign tensor model.layers.0.self_attn.q_norm.weight; .* Fetch",
    ),
    "a wrong shape": (
        lambda folder: put(folder, NORM, torch.ones(65, dtype=torch.bfloat16)),
        CheckpointError,
        rf"{SECOND}: {NORM} has shape \[65\], config.json implies \[64\]",
    ),
    "integers as weights": (
        lambda folder: put(folder, NORM, torch.ones(64, dtype=torch.int32)),
        CheckpointError,
        rf"{SECOND}: {NORM} is stored as torch.int32, expected torch.bfloat16 or",
    ),
    "a dtype this runtime does not read": (
        lambda folder: put(folder, NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        CheckpointError,
        rf"{SECOND}: {NORM} is stored as F8_E4M3; this m1local reads F64",
    ),
    "a truncated shard": (
        lambda folder: truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1),
        CheckpointError,
        rf"{SECOND} is truncated or damaged .*fetch that file again",
    ),
    "a shard cut off inside its header": (
        lambda folder: truncate(folder / SECOND, 100),
        CheckpointError,
        rf"{SECOND} is truncated or damaged .*fetch that file again",
    ),
    "an empty shard": (
        lambda folder: truncate(folder / SECOND, 0),
        CheckpointError,
        rf"{SECOND} is truncated or damaged .*fetch that file again",
    ),
    "a corrupted header": (
        lambda folder: overwrite(folder / SECOND, 20, b"\xff" * 16),
        CheckpointError,
        rf"{SECOND} is truncated or damaged .*fetch that file again",
    ),
    "a header of absurd length": (
        lambda folder: overwrite(folder / SECOND, 0, b"\xff" * 8),
        CheckpointError,
        rf"{SECOND} is truncated or damaged .*fetch that file again",
    ),
    "a page of HTML instead of a shard": (
        lambda folder: shards_are(folder, b"<html>\nlog in first\n</html>\n" * 99),
        CheckpointError,
        rf"{FIRST} is truncated or damaged .*fetch that file again",
    ),
    "a shard of the index missing": (
        lambda folder: (folder / SECOND).unlink(),
        CheckpointError,
        rf"source lacks {SECOND}, which {INDEX} names; fetch what is missing",
    ),
    "a stale index": (
        map_to(NORM, FIRST),
        CheckpointError,
        rf"{INDEX} is stale: {NORM} is not in {FIRST}. Fetch the index .* or delete it",
    ),
    "an index that names more": (
        map_to("model.layers.4.input_layernorm.weight", FIRST),
        CheckpointError,
        rf"{INDEX} is stale: model.layers.4.input_layernorm.weight is not in {FIRST}",
    ),
    "an index that is no JSON": (
        lambda folder: (folder / INDEX).write_text("{"),
        CheckpointError,
        rf"{INDEX} is no valid index .*fetch it again, or delete it",
    ),
    "an index that is endlessly nested": (
        lambda folder: (folder / INDEX).write_text('{"a":' * 100_000),
        CheckpointError,
        rf"{INDEX} is no valid index .*fetch it again, or delete it",
    ),
    "an index without weight_map": (
        lambda folder: (folder / INDEX).write_text("{}"),
        CheckpointError,
        rf"{INDEX} is no valid index .*weight_map.*fetch it again, or delete it",
    ),
    "an index that is a list": (
        lambda folder: (folder / INDEX).write_text("[]"),
        CheckpointError,
        rf"{INDEX} is no valid index .*fetch it again, or delete it",
    ),
    "an index with a list as weight_map": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": []}'),
        CheckpointError,
        rf"{INDEX}: weight_map is malformed; fetch",
    ),
    "an index with a number as file": (
        map_to(NORM, 2),
        CheckpointError,
        rf"{INDEX}: weight_map is malformed; fetch",
    ),
    "only pickled weights": (
        only_pickles,
        CheckpointError,
        r"only pickled weights \(pytorch_model.bin\), .* run code .*; fetch the \*.safetensors",
    ),
    "no weights": (
        no_weights,
        CheckpointError,
        r"source holds no \*.safetensors file; fetch the weights",
    ),
    "a tensor in two files": (
        without_index,
        CheckpointError,
        rf"source: \S+ is in {FIRST} and in model.safetensors; remove the file",
    ),
}


def load(folder: Path, _: Path) -> None:
    load_model(folder)


def quantize(folder: Path, target: Path) -> None:
    list(quantize_checkpoint(folder, target, Recipe.find("int8")))


@pytest.mark.parametrize("way_in", [load, quantize])
@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, way_in: Callable[[Path, Path], None], name: str
) -> None:
    damage, kind, match = BAD_SOURCES[name]
    damage(source)
    with refused(kind, match):
        way_in(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way_in", [load, quantize])
@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "..",
        ".",
        "",
        "/etc/evil.safetensors",
        "sub/evil.safetensors",
        "C:\\evil.safetensors",
        "C:evil.safetensors",
        "..\\evil.safetensors",
        "\\\\server\\evil.safetensors",
        "evil\n.safetensors",
        "evil\0.safetensors",
    ],
)
def test_an_index_may_not_lead_out_of_its_folder(
    source: Path, tmp_path: Path, way_in: Callable[[Path, Path], None], name: str
) -> None:
    shutil.copy(source / SECOND, tmp_path / "evil.safetensors")  # it would even fit
    map_to(NORM, name)(source)
    with refused(CheckpointError, r"names the file .*, which does not lie in it; do not use this"):
        way_in(source, tmp_path / "out")


def test_an_unneeded_table_of_rotations_is_ignored(source: Path) -> None:
    put(source, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    load_model(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.0.mlp.gate_proj.weight", 127),
        ("model.embed_tokens.weight", 511),
        ("lm_head.weight", 511),
        ("model.norm.weight", 63),
        ("model.layers.1.self_attn.conv_k", 0),
    ],
)
def test_values_that_are_no_numbers_are_never_quantized(
    source: Path, tmp_path: Path, name: str, row: int, value: float
) -> None:
    file_name = json.loads((source / INDEX).read_text())["weight_map"][name]
    change_tensors(source, file_name, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    match = (
        rf"{file_name}: {name} holds values that are no numbers in its row {row}; fetch that file"
    )
    with refused(CheckpointError, match):
        quantize(source, tmp_path / "out")
    with refused(ConfigError, "out is unfinished: .* The same `m1 quantize` goes on"):
        load_model(tmp_path / "out")


def test_a_quantized_checkpoint_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "quantized")
    with refused(CheckpointError, "is quantized already; give the original 16-bit checkpoint"):
        quantize(tmp_path / "quantized", tmp_path / "out")
