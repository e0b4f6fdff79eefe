"""Time and peak memory of real commands: `python -m bench.memory SYNTHETIC WORK`.

What it is: `m1 quantize` and one answer of `m1 chat` run as a user would, their memory sampled from
outside: anonymous and shared pages, which the machine must really hold, and mapped file pages,
which it may drop at any time, apart. With `--calibration-tokens` the recipes read a text of that
length; of several lengths, the first is quantized with, and the others say what more of it takes.
What it is not: a benchmark of speed. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.machine import describe_machine
from m1local.tokenizer import M1Tokenizer
from m1local_quantize.recipe import Recipe
from m1local_quantize.text import CALIBRATION

SAMPLE_SECONDS = 0.02
FIELDS = ("RssAnon", "RssShmem", "RssFile")
M1 = (sys.executable, "-c", "from m1local_app.cli import cli; cli()")


def peak_memory(
    command: list[str], environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run `command`; seconds, and peaks in GiB of anonymous + shared and of mapped file pages."""
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    held = mapped = 0
    while process.poll() is None:
        pages = read_pages(process.pid)
        held = max(held, pages["RssAnon"] + pages["RssShmem"])
        mapped = max(mapped, pages["RssFile"])
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "anonymous_and_shared_gib": round(held / 2**20, 2),
        "mapped_files_gib": round(mapped / 2**20, 2),
    }


def read_pages(pid: int) -> dict[str, int]:
    """Resident KiB of a process by kind; zeros once it is gone."""
    pages = dict.fromkeys(FIELDS, 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return pages
    for line in lines:
        name, _, value = line.partition(":")
        if name in pages:
            pages[name] = int(value.split()[0])
    return pages


def text_of(tokens: int, source: Path, folder: Path) -> Path:
    """A file in `folder` with `tokens` tokens of the shipped calibration text, over and over."""
    tokenizer = M1Tokenizer.from_folder(source)
    rows = map(json.loads, CALIBRATION.read_text(encoding="utf-8").splitlines())
    words = " ".join(row.get("answer") or row["text"] for row in rows).split()
    text, low, high = words * (1 + tokens // len(words)), 0, tokens + 1
    while high - low > 1:  # as many words as stay within so many tokens
        middle = (low + high) // 2
        within = len(tokenizer.encode(" ".join(text[:middle]))) <= tokens
        low, high = (middle, high) if within else (low, middle)
    path = folder / f"{tokens}.txt"
    path.write_text(" ".join(text[:low]), encoding="utf-8")
    return path


def quantized(arguments: argparse.Namespace, recipe: str, work: Path) -> dict[str, object]:
    """Quantize by `recipe`, measure the result and let it answer; what each of these held."""
    source, target = str(arguments.source), work / recipe
    made = peak_memory([*M1, "quantize", source, str(target), "-r", recipe, "--no-certify"])
    row: dict[str, object] = {"recipe": recipe, "quantize": made}
    if not arguments.only_quantize:
        kld = [*M1, "eval", "kld", str(target), "--source", source]
        chat = [*M1, "chat", str(target), "-p", "What is glaucoma?", "-n", "16"]
        row |= {"certify": peak_memory(kld), "load_and_16_tokens": peak_memory(chat)}
    return row | {"checkpoint_gib": _emptied(target)}


def calibrated(
    arguments: argparse.Namespace, recipe: str, tokens: int, work: Path, *, first: bool
) -> dict[str, object]:
    """The same by a recipe that reads `tokens` of text; `fit` measures, and then quantizes.

    Of a length that is not the first only the part that holds the text is run.
    """
    target, text = work / recipe, text_of(tokens, arguments.source, work)
    home = {"M1_HOME": str(work / f"home-{recipe}-{tokens}")}  # where nothing is measured yet
    command = [*M1, "quantize", str(arguments.source), str(target), "-r", recipe, "--no-certify"]
    command += ["--calibration", str(text)]
    row: dict[str, object] = {"recipe": recipe, "calibration_tokens": tokens}
    fits = bool(Recipe.find(recipe).candidates)
    if fits:
        command += ["--budget", arguments.budget]
        row["measure"] = peak_memory([*command, "--dry-run"], home)
    if first or not fits:
        row["quantize"] = peak_memory(command, home)
        row["checkpoint_gib"] = _emptied(target)
    return row


def _emptied(folder: Path) -> float:
    """GiB of the weights in `folder`, which is deleted."""
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shutil.rmtree(folder)
    return round(nbytes / 2**30, 2)


def _rows(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, object]]:
    lengths = arguments.calibration_tokens
    if not lengths:
        yield from (quantized(arguments, recipe, work) for recipe in arguments.recipes)
    for tokens in lengths:
        for recipe in arguments.recipes:
            yield calibrated(arguments, recipe, tokens, work, first=tokens == lengths[0])


def _said(arguments: argparse.Namespace, layers: int) -> str:
    """The command, for whoever repeats it."""
    said = f"python -m bench.synthetic S --layers {layers} && python -m bench.memory S W --recipes "
    said += " ".join(arguments.recipes) + (" --only-quantize" if arguments.only_quantize else "")
    if arguments.calibration_tokens:
        said += f" --calibration-tokens {' '.join(map(str, arguments.calibration_tokens))}"
        said += f" --budget {arguments.budget}"
    return said


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="made by bench.synthetic")
    parser.add_argument("work", type=Path, help="where checkpoints are made, and removed again")
    parser.add_argument("--recipes", nargs="+", default=["int4", "int8", "bnb-nf4", "bnb-int8"])
    parser.add_argument("--output", type=Path, default=Path("bench/results/memory.json"))
    parser.add_argument("--only-quantize", action="store_true", help="no certificate, no answer")
    parser.add_argument("--calibration-tokens", type=int, nargs="+", default=[])
    parser.add_argument("--budget", default="1700MiB", help="of a recipe that is fitted")
    arguments = parser.parse_args()
    source_bytes = sum(path.stat().st_size for path in arguments.source.glob("*.safetensors"))
    config = json.loads((arguments.source / "config.json").read_text())
    layers, rows = config["num_hidden_layers"], []
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        for row in _rows(arguments, Path(work)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            result = {
                "command": _said(arguments, layers),
                "machine": describe_machine(),
                "source": f"{layers} layers of the 14B's dimensions, random weights",
                "layers": layers,
                "hidden_size": config["hidden_size"],
                "source_gib": round(source_bytes / 2**30, 2),
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
