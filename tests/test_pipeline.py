"""The quantization pipeline from end to end, and what is promised of its result.

The checkpoint it writes loads, answers like its source, holds exactly what its index and manifest
say, and is the same to the byte every time. Files are read back with safetensors itself.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from m1local.checkpoint import load_model
from m1local.manifest import CheckpointManifest
from m1local_quantize.certificate import StageMeasured
from m1local_quantize.passage import TensorWritten
from m1local_quantize.pipeline import (
    CheckpointWritten,
    Planned,
    Stage,
    quantize_checkpoint,
)
from m1local_quantize.recipe import Recipe, shipped_recipes
from tests.conftest import TINY, write_checkpoint

RECIPES = ["bnb-int8", "bnb-nf4", "int4", "int4-gptq", "int8"]
# How far logits may lie from the source's, as a share of their size: about twice what was
# measured. Rounding to 8 bits moves a weight by 0.4 % of its row's greatest, to 4 bits by 5 %.
LOGITS_DIFFER: dict[str, float] = {
    "bnb-int8": 0.05,
    "bnb-nf4": 0.45,
    "int4": 0.45,
    "int4-gptq": 0.45,
    "int8": 0.04,
}
FILES = {
    "NOTICE",
    "config.json",
    "generation_config.json",
    "m1local.json",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
MATRICES = {"model.embed_tokens", "lm_head"} | {
    f"model.layers.{layer}.{name}"
    for layer in range(4)
    for name in (
        "self_attn.W_pack",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}
Quantized = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The tiny checkpoint by a shipped recipe, made once; not to be written to."""
    made: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("quantized") / recipe
            list(quantize_checkpoint(tiny_checkpoint, made[recipe], Recipe.find(recipe)))
        return made[recipe]

    return make


def own_recipe(folder: Path, text: str) -> Recipe:
    path = folder / "own.toml"
    path.write_text(f'method = "rtn"\n{text}')
    return Recipe.find(str(path))


def logits_of(folder: Path) -> Tensor:
    token_ids = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits: Tensor = load_model(folder, dtype=torch.float32)(token_ids)
    return logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    paths = folder.glob("*.safetensors")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_the_recipes_tested_here_are_those_that_are_shipped() -> None:
    assert shipped_recipes() == sorted([*RECIPES, "fit"])  # of which test_fit.py tells


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_result_answers_like_its_source(
    quantized: Quantized, tiny_checkpoint: Path, recipe: str
) -> None:
    found, expected = logits_of(quantized(recipe)), logits_of(tiny_checkpoint)
    assert 0 < difference(found, expected) < LOGITS_DIFFER[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_holds_exactly_these_files(quantized: Quantized, recipe: str) -> None:
    names = {path.name for path in quantized(recipe).iterdir()}
    assert names == FILES | {"model.safetensors"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_index_names_the_tensors_that_are_really_there(
    quantized: Quantized, recipe: str
) -> None:
    folder = quantized(recipe)
    index = read_json(folder / "model.safetensors.index.json")
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors_of(folder).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_manifest_lists_every_matrix_and_none_is_left_in_16_bits(
    quantized: Quantized, recipe: str
) -> None:
    folder = quantized(recipe)
    manifest = CheckpointManifest.read(folder)
    assert manifest.linears.keys() == MATRICES
    assert {spec.format for spec in manifest.linears.values()} <= {
        recipe.removesuffix("-gptq"),
        "int8",
    }
    floats = {name for name, tensor in tensors_of(folder).items() if tensor.dtype == torch.bfloat16}
    small = ("norm.weight", ".conv_k", ".conv_v", ".scales", ".zeros")
    assert {name for name in floats if not name.endswith(small)} == set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_manifest_knows_every_file_and_where_it_came_from(
    quantized: Quantized, tiny_checkpoint: Path, recipe: str
) -> None:
    folder = quantized(recipe)
    manifest = CheckpointManifest.read(folder)
    found = bytes_of(folder)
    del found["m1local.json"]
    assert {name: record.sha256 for name, record in manifest.files.items()} == found
    assert all(r.nbytes == (folder / n).stat().st_size for n, r in manifest.files.items())
    source = {k: v for k, v in bytes_of(tiny_checkpoint).items() if k.endswith(".safetensors")}
    assert {name: record.sha256 for name, record in manifest.source_files.items()} == source
    assert (manifest.source, manifest.recipe, manifest.method) == (
        "tiny-m1",
        recipe,
        {"int4": "refit", "int4-gptq": "gptq"}.get(recipe, "rtn"),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_notice_names_source_and_recipe(quantized: Quantized, recipe: str) -> None:
    text = (quantized(recipe) / "NOTICE").read_text(encoding="utf-8")
    assert "Source:    tiny-m1\n" in text
    assert f'quantised by m1local to the recipe "{recipe}"' in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_keeps_its_keys_and_says_how_it_was_quantized(
    quantized: Quantized, tiny_checkpoint: Path, recipe: str
) -> None:
    config = read_json(quantized(recipe) / "config.json")
    quantization = config.pop("quantization_config")
    assert config == read_json(tiny_checkpoint / "config.json")
    assert quantization["m1local_recipe"] == recipe
    expected = "bitsandbytes" if recipe.startswith("bnb-") else "m1local"
    assert quantization["quant_method"] == expected
    if expected == "bitsandbytes":
        assert quantization["llm_int8_skip_modules"] == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_source_and_recipe_give_the_same_bytes(
    quantized: Quantized, tiny_checkpoint: Path, tmp_path: Path, recipe: str
) -> None:
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "again", Recipe.find(recipe)))
    assert bytes_of(tmp_path / "again") == bytes_of(quantized(recipe))


def test_the_source_is_left_as_it_was(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[str, int]]:
        times = {path.name: path.stat().st_mtime_ns for path in tiny_checkpoint.iterdir()}
        return {name: (digest, times[name]) for name, digest in bytes_of(tiny_checkpoint).items()}

    before = state()
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "out", Recipe.find("int4")))
    assert state() == before


def test_events_are_the_plan_then_every_tensor_then_the_end(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source, target = tensors_of(tiny_checkpoint), tmp_path / "out"
    stages: list[Stage] = list(quantize_checkpoint(tiny_checkpoint, target, Recipe.find("int8")))
    first, *middle, last = stages
    assert isinstance(first, Planned)
    assert isinstance(last, CheckpointWritten)
    written = [stage for stage in middle if isinstance(stage, TensorWritten)]
    measured = [stage for stage in middle if isinstance(stage, StageMeasured)]
    assert len(middle) == len(written) + len(measured)
    assert measured == [StageMeasured(done, 6) for done in range(1, 7)]
    # Every stage is measured as soon as it is written.
    assert [middle.index(event) for event in measured[:2]] == [1, 2 + len(source) // 4]
    assert sorted(stage.name for stage in written) == sorted(source)
    done = 0
    for stage in written:
        done += source[stage.name].numel() * source[stage.name].element_size()
        assert stage.done_bytes == done
    assert {stage.total_bytes for stage in written} == {done}
    tensors = tensors_of(target).values()
    assert first.plan.target_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert last.manifest == CheckpointManifest.read(target)


def test_nothing_is_written_before_the_plan_is_seen_and_taken_up(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stages = quantize_checkpoint(tiny_checkpoint, tmp_path / "out", Recipe.find("int8"))
    next(stages)
    assert list((tmp_path / "out").glob("*.safetensors*")) == []


def test_many_small_shards_hold_what_one_does(
    quantized: Quantized, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe, target, limit = Recipe.find("int4"), tmp_path / "out", 40_000
    list(quantize_checkpoint(tiny_checkpoint, target, recipe, shard_bytes=limit))
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 3
    count = len(shards)
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert {path.name for path in target.iterdir()} == FILES | set(shards)
    sizes = [
        sum(t.numel() * t.element_size() for t in load_file(target / name).values())
        for name in shards
    ]
    assert max(sizes) <= limit
    one = tensors_of(quantized("int4"))
    many = tensors_of(target)
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    torch.testing.assert_close(logits_of(target), logits_of(quantized("int4")), rtol=0, atol=0)


def test_a_tensor_that_is_larger_than_a_shard_has_one_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    list(quantize_checkpoint(tiny_checkpoint, target, Recipe.find("int8"), shard_bytes=1))
    assert len(list(target.glob("*.safetensors"))) == len(tensors_of(tiny_checkpoint))
    load_model(target)


def test_rows_of_the_head_are_of_unit_length(quantized: Quantized, tiny_checkpoint: Path) -> None:
    source = tensors_of(tiny_checkpoint)["lm_head.weight"].float()
    tensors = tensors_of(quantized("int8"))
    head = tensors["lm_head.weight"].float() * tensors["lm_head.scales"][:, None]
    assert source.norm(dim=-1).min() > 2
    # Rounding to 127 steps per row.
    torch.testing.assert_close(head, source / source.norm(dim=-1, keepdim=True), rtol=0, atol=4e-3)
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(512), rtol=0, atol=4e-3)


def test_an_embedding_that_serves_as_head_is_stored_as_both(tmp_path: Path) -> None:
    source, target = tmp_path / "tied", tmp_path / "out"
    write_checkpoint(source, TINY | {"tie_word_embeddings": True})
    index = read_json(source / "model.safetensors.index.json")
    path = source / index["weight_map"].pop("lm_head.weight")
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    list(quantize_checkpoint(source, target, Recipe.find("int8")))
    assert difference(logits_of(target), logits_of(source)) < LOGITS_DIFFER["int8"]
    assert CheckpointManifest.read(target).linears.keys() == MATRICES
    tensors = tensors_of(target)
    head = tensors["lm_head.weight"].float() * tensors["lm_head.scales"][:, None]
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(512), rtol=0, atol=4e-3)


def test_a_recipe_of_ones_own_may_leave_matrices_as_they_are(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = own_recipe(
        tmp_path,
        """
        rules = [
            { match = "*.mlp.*", format = "int4", group_size = 32 },
            { match = "lm_head", format = "int8" },
            { match = "*", format = "float" },
        ]
        """,
    )
    target = tmp_path / "out"
    list(quantize_checkpoint(tiny_checkpoint, target, recipe))
    manifest, source, found = (
        CheckpointManifest.read(target),
        tensors_of(tiny_checkpoint),
        tensors_of(target),
    )
    assert manifest.recipe == "own"
    assert manifest.linears.keys() == MATRICES
    kept = {name for name, spec in manifest.linears.items() if spec.format == "float"}
    assert kept == {name for name in MATRICES if ".mlp." not in name} - {"lm_head"}
    assert all(torch.equal(found[f"{n}.weight"], source[f"{n}.weight"]) for n in kept)
    assert 0 < difference(logits_of(target), logits_of(tiny_checkpoint)) < 0.45


def test_a_recipe_may_leave_everything_as_it_is_but_normalizes_the_head(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = own_recipe(tmp_path, 'rules = [{ match = "*", format = "float" }]')
    list(quantize_checkpoint(tiny_checkpoint, tmp_path / "out", recipe))
    source, found = tensors_of(tiny_checkpoint), tensors_of(tmp_path / "out")
    head = found.pop("lm_head.weight")
    del source["lm_head.weight"]
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)
    # bfloat16 keeps eight bits.
    torch.testing.assert_close(head.float().norm(dim=-1), torch.ones(512), rtol=0, atol=2**-8)
    assert difference(logits_of(tmp_path / "out"), logits_of(tiny_checkpoint)) < 2**-7


def test_licences_travel_along_and_code_does_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source)
    licences = {"LICENSE", "M1 community licence.pdf", "License.txt", "M1模型社区许可协议.pdf"}
    for name in (*licences, "special_tokens_map.json", "modeling_baichuan.py", "README.md"):
        (source / name).write_text(f"{name} of the source")
    list(quantize_checkpoint(source, target, Recipe.find("int8")))
    found = {path.name for path in target.iterdir()}
    assert found == FILES | licences | {"model.safetensors", "special_tokens_map.json"}
    assert all((target / n).read_text() == f"{n} of the source" for n in licences)
