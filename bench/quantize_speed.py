"""How fast `m1 quantize` is beside llama.cpp: `python -m bench.quantize_speed SYNTHETIC WORK ...`.

What it is: whole commands as a user gives them, start-up included, in turns, several rounds of all;
the median of each, in GB of its source per second. Ours quantize the M1 checkpoint SYNTHETIC;
`llama-quantize` a LLaMA with the same dimensions (bench/gguf_peer.py), made in WORK if it is not
there. Every source is read once right before, so that no one waits for the disk to read. Ours check
every value, hash source and result and wait for the disk at the end; the peer does none of these.
What it is not: a measure of quality; that is bench/quality.py.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gguf_peer import parameters_in, write_llama
from bench.machine import describe_machine
from m1local.checkpoint import parameter_shapes
from m1local.config import M1Config

M1 = (sys.executable, "-c", "from m1local_app.cli import cli; cli()")
READ_BLOCK = 1 << 24
ROUND_TO_NEAREST = """\
# The shipped int4 recipe's formats, every value rounded to nearest.
method = "rtn"

[[rules]]
match = "model.embed_tokens"
format = "int8"

[[rules]]
match = "lm_head"
format = "int8"

[[rules]]
match = "*"
format = "int4"
group_size = 64
"""


@dataclass(slots=True)
class Contestant:
    """One command, what it reads and writes, and what its runs took."""

    name: str
    command: Sequence[str]
    source: Sequence[Path]
    target: Path
    parameters: int
    seconds: list[float] = field(default_factory=list)
    target_bytes: int = 0

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights it reads."""
        return sum(path.stat().st_size for path in self.source)

    @property
    def rate(self) -> float:
        """GB of the source per second, by the median of the runs."""
        return self.source_bytes / 1e9 / statistics.median(self.seconds)

    def run(self) -> None:
        """Run once with a warm source, note seconds and size, and remove what was written."""
        for path in self.source:
            with path.open("rb") as file:
                while file.read(READ_BLOCK):
                    pass
        os.sync()  # nobody pays for what was written before
        begun = time.perf_counter()
        ended = subprocess.run(self.command, stdin=subprocess.DEVNULL, capture_output=True)
        self.seconds.append(time.perf_counter() - begun)
        if ended.returncode:
            said = ended.stderr.decode(errors="replace")
            raise SystemExit(f"{' '.join(self.command)} failed with {ended.returncode}:\n{said}")
        if self.target.is_dir():
            self.target_bytes = sum(p.stat().st_size for p in self.target.glob("*.safetensors"))
            shutil.rmtree(self.target)
        else:
            self.target_bytes = self.target.stat().st_size
            self.target.unlink()

    def row(self) -> dict[str, object]:
        """What the JSON says of it."""
        return {
            "name": self.name,
            "source_gb": round(self.source_bytes / 1e9, 3),
            "seconds": round(statistics.median(self.seconds), 2),
            "all_seconds": [round(seconds, 2) for seconds in self.seconds],
            "gb_per_second": round(self.rate, 4),
            "bits_per_weight": round(8 * self.target_bytes / self.parameters, 2),
        }


def our_contestants(source: Path, work: Path) -> list[Contestant]:
    """The three recipes; that of rounding to nearest is written into `work`."""
    rounding = work / "int4-rtn.toml"
    rounding.write_text(ROUND_TO_NEAREST, encoding="utf-8")
    shapes = parameter_shapes(M1Config.from_file(source / "config.json"))
    parameters = parameters_in(shapes.values())
    files, target = sorted(source.glob("*.safetensors")), work / "m1"
    command = (*M1, "quantize", str(source), str(target), "--no-certify", "--recipe")
    return [
        Contestant(name, (*command, recipe), files, target, parameters)
        for name, recipe in (("int4 by rtn", str(rounding)), ("int4", "int4"), ("int8", "int8"))
    ]


def peer_contestants(
    binary: Path, source: Path, work: Path, parameters: int, threads: int
) -> list[Contestant]:
    """Q4_0 with llama.cpp's defaults, and with every matrix in Q4_0."""
    target = work / "llama.gguf"
    ending = (str(source), str(target), "Q4_0", str(threads))
    return [
        Contestant(name, (str(binary), *options, *ending), [source], target, parameters)
        for name, options in (("Q4_0", ()), ("Q4_0 --pure", ("--pure",)))
    ]


def peer_version(binary: Path) -> str:
    """What the library behind `binary` calls itself when it begins to work."""
    try:
        # Without its files it says its version, and fails.
        ended = subprocess.run(
            [binary, os.devnull, "nowhere.gguf", "Q4_0"], capture_output=True, text=True
        )
    except OSError as error:
        raise SystemExit(f"{binary} cannot be run: {error.strerror}.") from None
    found = re.search(r"version: *(.+)|build = (.+)", ended.stdout + ended.stderr)
    return "unknown" if found is None else (found[1] or found[2]).strip()


def ratios(ours: list[Contestant], peers: list[Contestant]) -> dict[str, dict[str, float]]:
    """How many times as fast each of ours is as each of theirs."""
    return {
        one.name: {other.name: round(one.rate / other.rate, 2) for other in peers} for one in ours
    }


def measure(contestants: list[Contestant], rounds: int) -> None:
    """Run all of them in turns."""
    for number in range(1, rounds + 1):
        for contestant in contestants:
            contestant.run()
            print(f"round {number}: {contestant.name} {contestant.seconds[-1]:.1f} s", flush=True)


def show(ours: list[Contestant], peers: list[Contestant]) -> None:
    """Print the table: a line for everyone, ours with their ratios."""
    heads = "".join(f"{'/ ' + peer.name:>15}" for peer in peers)
    print(f"{'':12} {'seconds':>8} {'GB/s':>7} {'bits':>6}{heads}")
    compared = ratios(ours, peers)
    for one in (*ours, *peers):
        row = one.row()
        times = "".join(f"{ratio:15.2f}" for ratio in compared.get(one.name, {}).values())
        print(f"{one.name:12} {row['seconds']:8} {one.rate:7.3f} {row['bits_per_weight']:6}{times}")


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="made by bench.synthetic; or any M1, to try it")
    parser.add_argument("work", type=Path, help="keeps the peer's source; the rest is removed")
    parser.add_argument("--llama-quantize", type=Path, required=True, help="the peer's binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the peer")
    parser.add_argument("--output", type=Path, default=Path("bench/results/quantize_speed.json"))
    arguments = parser.parse_args()
    version = peer_version(arguments.llama_quantize)
    config = M1Config.from_file(arguments.source / "config.json")
    arguments.work.mkdir(parents=True, exist_ok=True)
    peer_source, parameters = write_llama(config, arguments.work)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        ours = our_contestants(arguments.source, work)
        peers = peer_contestants(
            arguments.llama_quantize, peer_source, work, parameters, arguments.threads
        )
        measure([*ours, *peers], arguments.rounds)
    result = {
        "command": "python -m bench.synthetic S && python -m bench.quantize_speed S W "
        "--llama-quantize PATH",
        "machine": describe_machine(),
        "peer": f"llama-quantize of llama.cpp {version}, {arguments.threads} threads",
        "layers": config.num_hidden_layers,
        "rounds": arguments.rounds,
        "timed": "whole commands in turns, medians; sources read once before, so warm",
        "rows": [contestant.row() for contestant in (*ours, *peers)],
        "ratios": ratios(ours, peers),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    show(ours, peers)


if __name__ == "__main__":
    main()
