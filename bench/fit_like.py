"""A recipe of what `fit` chooses for the demo: `python -m bench.fit_like --bits 3.9 … > fit.toml`.

What it is: the format of every matrix of the demo at so many bits per weight (sensitivities as in
bench.quality), as rules by rtn for a checkpoint with as many layers: random weights of the 14B's
dimensions have no sensitivities of their own, and bench.decode_speed wants a mixture that `fit`
would make. What it is not: what `fit` would choose for the 14B.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from bench.quality import every_nth_row
from m1local.checkpoint import matrix_names, parameter_shapes
from m1local.home import DEMO
from m1local_quantize.fit import Sensitivities, fitted
from m1local_quantize.recipe import Recipe
from m1local_quantize.sensitivity import MatrixMeasured, measure_sensitivity
from m1local_quantize.source import Source
from m1local_quantize.text import CALIBRATION


def chosen(source: Source, calibration: Path, bits: float) -> Recipe:
    """`fit` for `source` at `bits` per weight."""
    fit = Recipe.find("fit")
    text = source.read_text(calibration)
    measured = measure_sensitivity(source, text.samples, fit.candidates)
    costs = {e.module: e.costs for e in measured if isinstance(e, MatrixMeasured)}
    found = Sensitivities(costs)
    shapes = parameter_shapes(source.config).values()
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    return fitted(fit, source, found, int(parameters * bits / 8))


def as_toml(recipe: Recipe, modules: list[str]) -> str:
    """Its rules, by rtn."""
    lines = ['method = "rtn"']
    for module in modules:
        spec = recipe.rule_for(module).spec
        lines += ["", "[[rules]]", f'match = "{module}"', f'format = "{spec.format}"']
        if spec.group_size is not None:
            lines.append(f"group_size = {spec.group_size}")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, required=True, help="per weight, at most")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--calibration-rows", type=int, default=128)
    arguments = parser.parse_args()
    source = Source.open(DEMO)
    with tempfile.TemporaryDirectory() as folder:
        calibration = every_nth_row(arguments.calibration, arguments.calibration_rows, Path(folder))
        recipe = chosen(source, calibration, arguments.bits)
    print(as_toml(recipe, matrix_names(source.config)))


if __name__ == "__main__":
    main()
