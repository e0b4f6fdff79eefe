"""GPTQ through optimum beside our own: `python -m bench.optimum_gptq --text … --calibration …`.

What it is: the demo (or any checkpoint that fits in memory) in int4 groups of one size, its values
chosen by rtn, refit, gptq and optimum-gptq from the same calibration text, and each compared with
the 16-bit weights on held-out questions and answers as bench.quality does. What it is not: a
measure of time; optimum keeps the whole model in memory and gptq one layer. Needs
`pip install -e '.[optimum]'`. Prints a table and writes it as JSON.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from bench.machine import describe_machine
from bench.quality import Held, Remembered, every_nth_row, read_samples
from m1local.checkpoint import EMBEDDING, HEAD, load_model, parameter_shapes
from m1local.formats import LinearSpec
from m1local.home import DEMO
from m1local_quantize.recipe import Recipe, Rule
from m1local_quantize.source import Source

METHODS = ("rtn", "refit", "gptq", "optimum-gptq")
PACKAGES = ("optimum", "gptqmodel", "transformers")


def recipe_of(method: str, group_size: int) -> Recipe:
    """int4 by `method`; embedding and head in 8 bits, as in the shipped recipes."""
    int8, int4 = LinearSpec("int8"), LinearSpec("int4", group_size)
    rules = (Rule(EMBEDDING, int8, "rtn"), Rule(HEAD, int8, "rtn"), Rule("*", int4, method))
    return Recipe(name=method, method=method, rules=rules)


def main() -> None:
    """Read the command line, measure every method, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="questions and answers, .jsonl")
    parser.add_argument("--calibration", type=Path, required=True, help="the same, others")
    parser.add_argument("--model", type=Path, default=DEMO, help="an original checkpoint")
    parser.add_argument("--system", default="Answer in detail.", help="the demo answers at length")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("bench/results/optimum_gptq.json"))
    arguments = parser.parse_args()
    source, text, learned = Source.open(arguments.model), arguments.text, arguments.calibration
    length = source.config.max_position_embeddings
    samples = read_samples(
        text, source.tokenizer, system=arguments.system, rows=arguments.rows, length=length
    )
    reference = Remembered(load_model(arguments.model, dtype=torch.float32))
    parameters = sum(torch.Size(s).numel() for s in parameter_shapes(source.config).values())
    with tempfile.TemporaryDirectory() as folder:
        calibration = every_nth_row(learned, arguments.calibration_rows, Path(folder))
        held = Held(source, samples, calibration, reference, parameters)
        rows = [held.quantized(name, recipe_of(name, arguments.group_size)) for name in METHODS]
    result = {
        "command": (
            f"python -m bench.optimum_gptq --text {text.name} --rows {arguments.rows} "
            f"--calibration {learned.name}"
        ),
        "machine": describe_machine() | {package: version(package) for package in PACKAGES},
        "text": f"{len(samples)} answers of {text.name}, given their questions",
        "calibration": f"{arguments.calibration_rows} rows spread over {learned.name}",
        "group_size": arguments.group_size,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
