"""Time and peak memory of real commands: `python -m bench.memory SYNTHETIC WORK`.

What it is: `m1 quantize` and one answer of `m1 chat` run as a user would, their memory sampled from
outside: anonymous and shared pages, which the machine must really hold, and mapped file pages,
which it may drop at any time, apart. What it is not: a benchmark of speed. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.machine import describe_machine

SAMPLE_SECONDS = 0.02
FIELDS = ("RssAnon", "RssShmem", "RssFile")


def peak_memory(command: list[str]) -> dict[str, float]:
    """Run `command`; seconds, and peaks in GiB of anonymous + shared and of mapped file pages."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
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


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="made by bench.synthetic")
    parser.add_argument("work", type=Path, help="where checkpoints are made, and removed again")
    parser.add_argument("--recipes", nargs="+", default=["int4", "int8", "bnb-nf4", "bnb-int8"])
    parser.add_argument("--output", type=Path, default=Path("bench/results/memory.json"))
    parser.add_argument("--only-quantize", action="store_true", help="no certificate, no answer")
    arguments = parser.parse_args()
    m1 = [sys.executable, "-c", "from m1local_app.cli import cli; cli()"]
    source_bytes = sum(path.stat().st_size for path in arguments.source.glob("*.safetensors"))
    rows: list[dict[str, object]] = []
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    for recipe in arguments.recipes:
        target = work / recipe
        folders = [str(arguments.source), str(target)]
        quantized = peak_memory([*m1, "quantize", *folders, "-r", recipe, "--no-certify"])
        row: dict[str, object] = {"recipe": recipe, "quantize": quantized}
        if not arguments.only_quantize:
            kld = [*m1, "eval", "kld", folders[1], "--source", folders[0]]
            chat = [*m1, "chat", str(target), "-p", "What is glaucoma?", "-n", "16"]
            row |= {"certify": peak_memory(kld), "load_and_16_tokens": peak_memory(chat)}
        nbytes = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        shutil.rmtree(target)
        rows.append({**row, "checkpoint_gib": round(nbytes / 2**30, 2)})
        print(json.dumps(rows[-1]), flush=True)
    config = json.loads((arguments.source / "config.json").read_text())
    result = {
        "command": (
            f"python -m bench.synthetic S --layers {config['num_hidden_layers']} && python -m "
            f"bench.memory S W --recipes {' '.join(arguments.recipes)}"
            + (" --only-quantize" if arguments.only_quantize else "")
        ),
        "machine": describe_machine(),
        "source": f"{config['num_hidden_layers']} layers of the 14B's dimensions, random weights",
        "source_gib": round(source_bytes / 2**30, 2),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
