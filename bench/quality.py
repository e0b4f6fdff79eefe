"""What each recipe costs in quality: `python -m bench.quality --text medquad_dev.jsonl`.

What it is: the demo (or any checkpoint that fits in memory) quantized by every shipped recipe, by
mlx-lm and llama.cpp, and by `fit` at the sizes of the others, and compared with its 16-bit weights
on held-out questions and answers. What it is not: a measure of medical knowledge. Prints a table
last, and writes it as JSON for the README.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.gguf_quality import KINDS, quantize_by_gguf
from bench.machine import describe_machine
from bench.mlx_peer import quantize_by_mlx
from m1local.checkpoint import load_model, parameter_shapes
from m1local.formats import LinearSpec
from m1local.home import DEMO
from m1local.model import M1Model
from m1local.tokenizer import M1Tokenizer, Message
from m1local_quantize.evaluate import Divergence, Sample, compare
from m1local_quantize.fit import Sensitivities, fitted
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.plan import Plan
from m1local_quantize.recipe import Recipe, Rule, shipped_recipes
from m1local_quantize.sensitivity import MatrixMeasured, measure_sensitivity
from m1local_quantize.source import Source
from m1local_quantize.text import CALIBRATION

FEW_BITS = 3.9  # what bench.decode_speed has beside int4
DECODED_ROWS = 3  # token by token is slow: the first few answers are enough to see a difference


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


class Remembered:
    """A model's logits, computed once for each sample."""

    def __init__(self, model: M1Model) -> None:
        """Nothing is known yet."""
        self._model = model
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(1, T) -> (1, T, V)."""
        key = tuple(token_ids[0].tolist())
        if key not in self._known:
            self._known[key] = self._model(token_ids)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Held:
    """What all contestants share."""

    source: Source
    samples: list[Sample]
    calibration: Path
    reference: Remembered
    parameters: int

    def row(self, name: str, model: M1Model, nbytes: int) -> dict[str, object]:
        """One row of the table."""
        found: Divergence = compare(self.reference, model, self.samples)
        decode = compare(self.reference, model, self.samples[:DECODED_ROWS], decode=True)
        row = {
            "recipe": name,
            "bits_per_weight": round(8 * nbytes / self.parameters, 2),
            "mib": round(nbytes / 2**20, 2),
            **{key: round(value, 5) for key, value in asdict(found).items()},
            "mean_kl_decoding": round(decode.mean_kl, 5),
        }
        print(
            f"{name:28} {row['bits_per_weight']:6} {found.perplexity:8.3f} "
            f"{found.reference_perplexity:8.3f} {found.mean_kl:9.5f} {found.p99_kl:8.4f} "
            f"{100 * found.top1_agreement:6.2f}%",
            flush=True,
        )
        return row

    def quantized(self, name: str, recipe: Recipe) -> dict[str, object]:
        """The row of a recipe."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "quantized"
            for _ in quantize_checkpoint(
                self.source, target, recipe, text=None, calibration=self.calibration
            ):
                pass
            model = load_model(target, dtype=torch.float32)
            return self.row(name, model, Plan.of(self.source, recipe).target_bytes)


def everywhere(format_name: str, method: str, group_size: int = 64) -> Recipe:
    """One format for every matrix, embedding and head included."""
    spec = LinearSpec(format_name, group_size)
    return Recipe(name=format_name, method=method, rules=(Rule("*", spec, method),))


def contestants(held: Held) -> Iterator[dict[str, object]]:
    """All rows: shipped recipes, uniform ones, mlx-lm's, and fit at the size of each."""
    sizes: dict[str, int] = {}
    for name in shipped_recipes():
        recipe = Recipe.find(name)
        if not recipe.candidates:
            sizes[name] = Plan.of(held.source, recipe).target_bytes
            yield held.quantized(f"`{name}`", recipe)
    by_mlx = quantize_by_mlx(held.source.folder, bits=4, group_size=64)
    yield held.row(f"mlx-lm {by_mlx.version}, 4 bits, groups of 64", by_mlx.model, by_mlx.nbytes)
    for kind in KINDS:
        by_gguf = quantize_by_gguf(held.source.folder, kind)
        yield held.row(f"llama.cpp {kind}", by_gguf.model, by_gguf.nbytes)
    yield held.quantized("int4 everywhere, refit", everywhere("int4", "refit"))
    for method in ("refit", "gptq"):
        recipe = everywhere("int4", method, 128)
        sizes["int4 in groups of 128 everywhere"] = Plan.of(held.source, recipe).target_bytes
        yield held.quantized(f"int4 in groups of 128 everywhere, {method}", recipe)
    for name in ("int3", "int4", "int5", "int6"):
        recipe = everywhere(name, "gptq")
        sizes[f"{name} everywhere"] = Plan.of(held.source, recipe).target_bytes
        yield held.quantized(f"{name} everywhere, gptq", recipe)
    fit = Recipe.find("fit")
    text = held.source.read_text(held.calibration)
    measured = measure_sensitivity(held.source, text.samples, fit.candidates)
    costs = {e.module: e.costs for e in measured if isinstance(e, MatrixMeasured)}
    found = Sensitivities(costs)
    for name in (
        "int3 everywhere",
        "int4 in groups of 128 everywhere",
        "int4 everywhere",
        "int5 everywhere",
        "int4",
        "int6 everywhere",
        "int8",
    ):
        recipe = fitted(fit, held.source, found, sizes[name])
        yield held.quantized(f"`fit`, size of {name}", recipe)
    recipe = fitted(fit, held.source, found, int(held.parameters * FEW_BITS / 8))
    yield held.quantized(f"`fit`, {FEW_BITS} bits", recipe)


def main() -> None:
    """Read the command line, measure every recipe, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="questions and answers, .jsonl")
    parser.add_argument("--model", type=Path, default=DEMO, help="an original checkpoint")
    parser.add_argument("--system", default="Answer in detail.", help="the demo answers at length")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="for gptq and fit")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    source = Source.open(arguments.model)
    samples = read_samples(
        arguments.text,
        source.tokenizer,
        system=arguments.system,
        rows=arguments.rows,
        length=source.config.max_position_embeddings,
    )
    shapes = parameter_shapes(source.config).values()
    print(f"{'recipe':28} {'bits':>6} {'ppl':>8} {'bf16':>8} {'KL':>9} {'KL 99%':>8} {'top-1':>7}")
    with tempfile.TemporaryDirectory() as folder:
        calibration = every_nth_row(arguments.calibration, arguments.calibration_rows, Path(folder))
        reference = Remembered(load_model(arguments.model, dtype=torch.float32))
        parameters = sum(torch.Size(shape).numel() for shape in shapes)
        rows = list(contestants(Held(source, samples, calibration, reference, parameters)))
    result = {
        "command": (
            f"python -m bench.quality --text {arguments.text.name} --rows {arguments.rows} "
            f"--calibration {arguments.calibration.name} "
            f"--calibration-rows {arguments.calibration_rows}"
        ),
        "machine": describe_machine(),
        "text": f"{len(samples)} answers of {arguments.text.name}, given their questions",
        "decoded_rows": DECODED_ROWS,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
