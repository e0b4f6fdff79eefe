"""How fast answers are beside llama.cpp: `python -m bench.decode_speed --ours … --gguf …`.

What it is: `m1 bench` on our checkpoints and `llama-bench` on LLaMAs with the same dimensions
(bench/gguf_peer.py), in turns, several rounds of all; the medians of the ratios of one round. A
checkpoint in a format of bitsandbytes runs on its own kernels, and so is a peer too. What it is
not: a comparison of the models' quality: bits per weight stand beside the speed, what they cost in
bench/quality.py. Nothing else may run meanwhile; all models are read anew into the page cache first
(bench/page_cache.py).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.machine import describe_machine
from bench.page_cache import read_anew, share_in_huge_pages
from m1local.checkpoint import parameter_shapes
from m1local.config import M1Config

M1 = "from m1local_app.cli import cli; cli()"
# The library compiled for other instructions than this processor's own.
M1_FOR = (
    "from m1local.native import library; library.FLAGS = ("
    "tuple(flag.replace('native', {march!r}) for flag in library.FLAGS[0]),); "
)
PROMPT, ANSWER = 512, 64


@dataclass(slots=True)
class Contestant:
    """A command that measures one model, what it is called, and what it has said so far."""

    name: str
    ours: bool
    model: Path
    command: Sequence[str]
    deep: Sequence[str]  # the same after so many tokens of context
    bits_per_weight: float
    prompt: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)  # of the bandwidth, ours only
    held: int = 0  # bytes, ours only
    resident: int = 0  # the same with what is mapped
    huge_pages: float | None = None  # share of the model that is mapped by them

    @property
    def files(self) -> list[Path]:
        """Its weights."""
        return sorted(self.model.glob("*.safetensors")) if self.ours else [self.model]

    def look(self) -> None:
        """Note how much of the weights is mapped by huge pages."""
        shares = {path: share_in_huge_pages(path) for path in self.files}
        known = {path: share for path, share in shares.items() if share is not None}
        if known:
            sizes = {path: path.stat().st_size for path in known}
            mapped = sum(share * sizes[path] for path, share in known.items())
            self.huge_pages = round(mapped / sum(sizes.values()), 2)

    def run(self, depth: int) -> None:
        """Measure once more."""
        for row in self._rows(self.command):
            (self.answer if row["is_answer"] else self.prompt).append(float(row["rate"]))
            if row["is_answer"] and "share" in row:
                self.share.append(float(row["share"]))
        if depth:
            self.late += [float(row["rate"]) for row in self._rows(self.deep) if row["is_answer"]]

    def _rows(self, command: Sequence[str]) -> list[dict[str, float]]:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
        said = json.loads(ended.stdout)
        if not self.ours:
            return [{"is_answer": row["n_gen"] > 0, "rate": row["avg_ts"]} for row in said]
        self.held = max(self.held, said["held_bytes"])
        self.resident = max(self.resident, said["resident_bytes"])
        return [
            {
                "is_answer": row["test"].startswith("tg"),
                "rate": row["tokens_per_second"],
                "share": row["share_of_bandwidth"],
            }
            for row in said["results"]
        ]

    def row(self) -> dict[str, object]:
        """What the JSON says of it."""
        return {
            "name": self.name,
            "ours": self.ours,
            "bits_per_weight": self.bits_per_weight,
            "prompt": round(statistics.median(self.prompt), 2),
            "answer": round(statistics.median(self.answer), 2),
            "late": round(statistics.median(self.late), 2) if self.late else None,
            "share_of_bandwidth": round(statistics.median(self.share), 3) if self.share else None,
            "held_gib": round(self.held / 2**30, 2) if self.held else None,
            "resident_gib": round(self.resident / 2**30, 2) if self.resident else None,
            "huge_pages": self.huge_pages,
            "all_prompt": [round(rate, 2) for rate in self.prompt],
            "all_answer": [round(rate, 2) for rate in self.answer],
            "all_late": [round(rate, 2) for rate in self.late],
        }


def our_contestant(folder: Path, depth: int, march: str) -> Contestant:
    """A checkpoint of ours, its library compiled for `march`."""
    shapes = parameter_shapes(M1Config.from_file(folder / "config.json")).values()
    parameters = sum(_product(shape) for shape in shapes)
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    program = (M1_FOR.format(march=march) if march else "") + M1
    asked = ("bench", str(folder), "-r", "1", "-o", "json", "-n", str(ANSWER))
    command = (sys.executable, "-c", program, *asked)
    return Contestant(
        folder.name,
        True,
        folder,
        (*command, "-p", str(PROMPT)),
        (*command, "-p", "", "-d", str(depth)),
        round(8 * nbytes / parameters, 2),
    )


def peer_contestant(
    binary: Path, model: Path, parameters: int, threads: int, depth: int
) -> Contestant:
    """A GGUF file for llama-bench, with its flash attention."""
    command = (str(binary), "-m", str(model), "-r", "1", "-o", "json", "-fa", "1")
    both = (*command, "-t", str(threads), "-n", str(ANSWER))
    return Contestant(
        f"llama.cpp {model.stem}",
        False,
        model,
        (*both, "-p", str(PROMPT)),
        (*both, "-p", "0", "-d", str(depth)),
        round(8 * model.stat().st_size / parameters, 2),
    )


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def ratios(contestants: Sequence[Contestant]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each of ours by each other: the median of what the rounds gave."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours in (one for one in contestants if one.ours):
        found[ours.name] = {
            peer.name: {
                kind: round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3)
                for kind, mine, theirs in (
                    ("prompt", ours.prompt, peer.prompt),
                    ("answer", ours.answer, peer.answer),
                    ("late", ours.late, peer.late),
                )
                if mine and theirs
            }
            for peer in contestants
            if peer is not ours
        }
    return found


def command_line() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=Path, nargs="+", required=True, help="checkpoints")
    parser.add_argument("--llama-bench", type=Path, help="the peer's binary")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="its models")
    parser.add_argument("--gguf-parameters", type=int, default=0)
    parser.add_argument("--peer", default="llama.cpp", help="its version, in words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=0, help="measure answers after so many, too")
    parser.add_argument("--output", type=Path, default=Path("bench/results/decode_speed.json"))
    parser.add_argument("--march", default="", help="ours for these instructions: x86-64-v3")
    return parser.parse_args()


def main() -> None:
    """Read the command line, run the rounds, print and write."""
    given = command_line()
    contestants = [our_contestant(folder, given.depth, given.march) for folder in given.ours]
    contestants += [
        peer_contestant(given.llama_bench, path, given.gguf_parameters, given.threads, given.depth)
        for path in given.gguf
    ]
    read_anew(path for one in contestants for path in one.files)
    for one in contestants:
        one.look()
        print(f"{one.name:26} {one.huge_pages} in huge pages", flush=True)
    for number in range(given.rounds):
        for one in (
            contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
        ):
            one.run(given.depth)
            print(f"{number + 1} {one.name:24} {one.prompt[-1]:8.1f} {one.answer[-1]:7.2f} "
                  f"{one.late[-1] if one.late else 0:7.2f}", flush=True)  # fmt: skip
    layers = M1Config.from_file(given.ours[0] / "config.json").num_hidden_layers
    result = {
        "command": "python -m bench.decode_speed --ours …"
        + (" --llama-bench PATH --gguf …" if given.gguf else "")
        + (f" --depth {given.depth}" if given.depth else ""),
        "machine": describe_machine(),
        "peer": given.peer,
        "layers": layers,
        "rounds": given.rounds,
        "prompt_tokens": PROMPT,
        "answer_tokens": ANSWER,
        "depth": given.depth,
        "instructions": given.march or "native",
        "rows": [one.row() for one in contestants],
        "ratios": ratios(contestants),
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
