"""What each recipe costs in quality: `python -m bench.quality --text medquad_dev.jsonl`.

What it is: the demo (or any checkpoint that fits in memory) quantized by every shipped recipe and
compared with its 16-bit weights on held-out questions and answers. What it is not: a measure of
medical knowledge. Prints a table last, and writes it as JSON for the README.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from bench.machine import describe_machine
from m1local.checkpoint import load_model, parameter_shapes
from m1local.home import DEMO
from m1local.manifest import CheckpointManifest
from m1local.tokenizer import M1Tokenizer, Message
from m1local_quantize.evaluate import Divergence, Sample, compare
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe, shipped_recipes
from m1local_quantize.text import CALIBRATION

DECODED_ROWS = 20  # token by token is slow: the first few answers are enough to see a difference


def read_samples(
    path: Path, tokenizer: M1Tokenizer, *, system: str, rows: int, length: int
) -> list[Sample]:
    """Answers judged given their questions (and a system prompt), cut to `length` tokens."""
    samples = []
    before = [Message("system", system)] if system else []
    for line in path.read_text(encoding="utf-8").splitlines()[:rows]:
        row = json.loads(line)
        question = tokenizer.render([*before, Message("user", row["question"])])
        answer = tokenizer.render([Message("assistant", row["answer"])])
        token_ids = (question + answer)[:length]
        if len(token_ids) > len(question) + 1:
            samples.append(Sample(tuple(token_ids), len(question) + 1))
    return samples


def every_nth_row(path: Path, rows: int, folder: Path) -> Path:
    """A file in `folder` with `rows` rows spread over `path`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    chosen = folder / f"{rows}-rows-of-{path.name}"
    text = "\n".join(lines[:: max(1, len(lines) // rows)][:rows])
    chosen.write_text(text + "\n", encoding="utf-8")
    return chosen


def measure(
    source: Path, recipe: str, samples: list[Sample], calibration: Path
) -> dict[str, object]:
    """One row of the table."""
    reference = load_model(source, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / recipe
        for _ in quantize_checkpoint(
            source, target, Recipe.find(recipe), text=None, calibration=calibration
        ):
            pass
        manifest = CheckpointManifest.read(target)
        nbytes = sum(r.nbytes for n, r in manifest.files.items() if n.endswith(".safetensors"))
        model = load_model(target, dtype=torch.float32)
        prefill: Divergence = compare(reference, model, samples)
        decode = compare(reference, model, samples[:DECODED_ROWS], decode=True)
    parameters = sum(
        torch.Size(shape).numel() for shape in parameter_shapes(reference.config).values()
    )
    return {
        "recipe": recipe,
        "bits_per_weight": round(8 * nbytes / parameters, 2),
        "mib": round(nbytes / 2**20, 2),
        **{key: round(value, 5) for key, value in asdict(prefill).items()},
        "mean_kl_decoding": round(decode.mean_kl, 5),
    }


def main() -> None:
    """Read the command line, measure every recipe, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="questions and answers, .jsonl")
    parser.add_argument("--model", type=Path, default=DEMO, help="an original checkpoint")
    parser.add_argument("--system", default="Answer in detail.", help="the demo answers at length")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="for int4-gptq")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    tokenizer = M1Tokenizer.from_folder(arguments.model)
    length = load_model(arguments.model).config.max_position_embeddings
    samples = read_samples(
        arguments.text, tokenizer, system=arguments.system, rows=arguments.rows, length=length
    )
    with tempfile.TemporaryDirectory() as folder:
        calibration = every_nth_row(arguments.calibration, arguments.calibration_rows, Path(folder))
        rows = [
            measure(arguments.model, recipe, samples, calibration) for recipe in shipped_recipes()
        ]
    result = {
        "command": (
            f"python -m bench.quality --text {arguments.text.name} --rows {arguments.rows} "
            f"--calibration {arguments.calibration.name}"
        ),
        "machine": describe_machine(),
        "text": f"{len(samples)} answers of {arguments.text.name}, given their questions",
        "decoded_rows": DECODED_ROWS,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'recipe':10} {'bits':>6} {'ppl':>8} {'bf16':>8} {'KL':>9} {'KL 99%':>8} {'top-1':>7}")
    for row in rows:
        print(
            f"{row['recipe']:10} {row['bits_per_weight']:6} {row['perplexity']:8.3f} "
            f"{row['reference_perplexity']:8.3f} {row['mean_kl']:9.5f} {row['p99_kl']:8.4f} "
            f"{100 * float(str(row['top1_agreement'])):6.2f}%"
        )


if __name__ == "__main__":
    main()
