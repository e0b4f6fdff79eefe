"""quantize_checkpoint(): from an original checkpoint to a quantized one, tensor by tensor.

What it is: a generator of events; whoever consumes it draws the progress, and closing it leaves an
unfinished folder that no loader takes for a checkpoint. One matrix is in memory at a time, and only
its quantized form; the source stays mapped and untouched. What it is not: the arithmetic of a
format (m1local.formats) or the choice of formats (recipe.py).

Open the source, plan, prepare the target, let the source pass (passage.py: write and measure),
write the small files, and last of all the manifest.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from m1local import __version__
from m1local.checkpoint import CONFIG
from m1local.folder import read_json_object
from m1local.generation_config import NAME as GENERATION_CONFIG
from m1local.manifest import CheckpointManifest, FileRecord
from m1local.shards import INDEX
from m1local.tokenizer import FILES as TOKENIZER_FILES
from m1local_quantize.disk import disk_error
from m1local_quantize.hub import LICENCES
from m1local_quantize.journal import take_up
from m1local_quantize.methods import optimum_gptq
from m1local_quantize.notice import NAME as NOTICE
from m1local_quantize.notice import notice
from m1local_quantize.passage import Passage, Passed
from m1local_quantize.plan import DEFAULT_SHARD_BYTES, Plan
from m1local_quantize.recipe import Recipe
from m1local_quantize.source import Source
from m1local_quantize.target import prepared, write_index
from m1local_quantize.text import CALIBRATION, SHIPPED, Text

COPIED = (*TOKENIZER_FILES, "special_tokens_map.json", GENERATION_CONFIG)


@dataclass(frozen=True, slots=True)
class Planned:
    """What is going to be written, and what an earlier run had written of it."""

    plan: Plan
    target: Path
    resumed_bytes: int  # of the source, that need not be read again
    started_over: bool  # an unfinished run of another source, recipe or version was cleared away


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """The checkpoint is whole."""

    folder: Path
    manifest: CheckpointManifest


Stage = Planned | Passed | CheckpointWritten


def quantize_checkpoint(
    source: Path | Source,
    target: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    text: Path | None = SHIPPED,
    calibration: Path = CALIBRATION,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Iterator[Stage]:
    """Quantize `source`, a folder or an opened one, into the new folder `target`.

    The result is measured against the source on `text`, unless that is None; `calibration` is read
    where the recipe's method looks at what comes into a matrix. Raises
    CheckpointError for a bad source, RecipeError for a recipe that does not fit it,
    CalibrationError for a text that is of no use, HubError where a source that is still on its
    way does not come, and StorageError for a target that is occupied, unwritable or full.
    """
    if isinstance(source, Path):
        source = Source.open(source)
    plan = Plan.of(source, recipe, shard_bytes=shard_bytes)
    optimum_gptq.check(source, plan)
    measured_on = None if text is None else source.read_text(text)
    calibrated_on = source.read_text(calibration) if plan.needs_calibration else None
    with (
        prepared(target, source.folder, plan.target_bytes, overwrite=overwrite),
        source.files.held(),
    ):
        try:
            journal = take_up(target, source, plan, calibrated_on)
            resumed = sum(source.nbytes(step.name) for step in plan.steps if journal.has(step))
            yield Planned(plan, target, resumed, journal.started_over)
            passage = Passage(
                source, target, plan, journal, measured_on=measured_on, calibrated_on=calibrated_on
            )
            yield from passage.run()
            names = [*plan.shards, *write_small_files(source, target, plan, recipe)]
            files = {
                name: passage.records.get(name) or FileRecord.of(target / name)
                for name in sorted(names)
            }
            manifest = _manifest(source, plan, recipe, files, passage.quality, calibrated_on)
            manifest.write(target)
            passage.close()
            # Last: without marker and manifest the next run would not touch the folder.
            journal.path.unlink()
        except OSError as error:
            raise disk_error(error, target) from error
    yield CheckpointWritten(target, manifest)


def write_small_files(source: Source, target: Path, plan: Plan, recipe: Recipe) -> list[str]:
    """Copy tokenizer, generation defaults and licences; write config.json, the index, NOTICE.

    Returns the names of all of them.
    """
    folder = source.folder
    copied = {folder / name for name in COPIED if (folder / name).is_file()}
    copied |= {path for pattern in LICENCES for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(copied):
        shutil.copyfile(path, target / path.name)
    config = read_json_object(folder / CONFIG)
    config["quantization_config"] = quantization_config(plan, recipe)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / CONFIG).write_text(text, encoding="utf-8", newline="\n")
    weight_map = {
        name: file for file, steps in plan.shards.items() for step in steps for name in step.tensors
    }
    write_index(target, weight_map, plan.target_bytes)
    text = notice(source=source.name, recipe=recipe.name)
    (target / NOTICE).write_text(text, encoding="utf-8", newline="\n")
    return [CONFIG, INDEX, NOTICE, *(path.name for path in copied)]


def quantization_config(plan: Plan, recipe: Recipe) -> dict[str, object]:
    """What config.json says; for bitsandbytes formats in its own words."""
    formats = {spec.format for spec in plan.linears.values()}
    others = sorted(name for name, s in plan.linears.items() if not s.format.startswith("bnb-"))
    if four_bit := sorted(formats & {"bnb-nf4", "bnb-nf4-dq", "bnb-fp4"}):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": four_bit[0].split("-")[1],
            "bnb_4bit_use_double_quant": "bnb-nf4-dq" in formats,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": others,
            "m1local_recipe": recipe.name,
        }
    if "bnb-int8" in formats:
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": 0.0,
            "llm_int8_skip_modules": others,
            "m1local_recipe": recipe.name,
        }
    return {"quant_method": "m1local", "m1local_recipe": recipe.name}


def _manifest(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    files: Mapping[str, FileRecord],
    quality: Mapping[str, str | int | float] | None,
    calibration: Text | None,
) -> CheckpointManifest:
    return CheckpointManifest(
        m1local_version=__version__,
        source=source.name,
        source_revision=source.revision,
        source_files=source.files.records(),
        recipe=recipe.name,
        method=recipe.method,
        linears=plan.linears,
        files=files,
        certificate=quality,
        calibration=None if calibration is None else calibration.sha256,
    )
