"""Everything that only a CUDA card can say, in one command: `python -m bench.gpu`.

What it is: the parts of gpu_parts.py, each in a process of its own, since an error on a card can
leave nothing else to run in the same one; and the tests of the kernels. What a part found is
written before the next begins, and a part that fails or takes too long is noted and the rest go on.
A short table comes last, and bench/results/gpu.json. What it is not: a measurement of quality.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts import PARTS, WHOLE, Subject
from bench.machine import describe_machine
from m1local.cuda import support

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results/gpu.json"
TESTS = "tests"  # the last part
KERNEL_TESTS = ("products", "fused", "decode", "drawing")
MINUTES = 14.0
LEAST_SECONDS = 20.0  # a part is not begun with less
MOST_SECONDS = 240.0  # of one part
SAID = 400  # characters of a failure that are kept

Found = dict[str, Any]
Run = Callable[[str, float], object]  # a part by its name, and the seconds it may take


def run_parts(
    names: Sequence[str],
    run: Run,
    keep: Callable[[Found], None],
    *,
    seconds: float,
    found: Found | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Found:
    """What each part found, kept after every one; those that failed or were left out say so."""
    found, end = {} if found is None else found, now() + seconds
    for name in names:
        begun = now()
        if end - begun < LEAST_SECONDS:
            found[name] = {"left_out": "the time was up"}
        else:
            sys.stderr.write(f"{name} …\n")
            try:
                found[name] = run(name, min(MOST_SECONDS, end - begun))
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                found[name] = {"failed": str(error)[-SAID:]}
            found.setdefault("seconds", {})[name] = round(now() - begun, 1)
        keep(found)
    return found


def in_a_process(name: str, seconds: float) -> object:
    """The part `name`, in a process of its own; raises ValueError with its last words."""
    if name == TESTS:
        return kernel_tests(seconds)
    command = [sys.executable, "-m", "bench.gpu", "--part", name]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        raise ValueError(done.stderr.strip()[-SAID:] or f"exit code {done.returncode}")
    found: object = json.loads(done.stdout.splitlines()[-1])
    return found


def kernel_tests(seconds: float) -> dict[str, Any]:
    """The tests of every kernel, which run on the card where there is one."""
    files = [f"tests/test_cuda_{name}.py" for name in KERNEL_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *files, "tests/test_gpu.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    wrong = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
    return {"exit_code": done.returncode, **counts, "wrong": [line[:SAID] for line in wrong]}


def table(found: Found) -> str:
    """The short table that comes last; a part that is missing is not in it."""
    speed = _of(found, "copy").get("gb_per_second")
    lines = [f"{found['card']}: copies at {speed:.0f} GB/s" if speed else str(found["card"])]
    for name in PARTS:
        part = _of(found, name)
        for row in part.get("rows", ()):
            lines.append(
                f"{row['format']:5} {row['kv_type']:5} context {row['context']:6}: "
                f"{row['tokens_per_second']:7.1f} tokens/s, {row['percent_of_copy']:5.1f} % of the "
                f"copy; one by one {1000 / row['plain_ms']:7.1f}"
            )
        if "prompt_ms" in part:
            lines.append(_prompt_line(part, _whole_prompt(found)))
    ours = {"bitsandbytes NF4": "m1local nf4", "int4pack": "m1local int4"}
    peers = _of(found, "peers")
    for name, figures in peers.items():
        token = figures.get("token_ms")
        said = f"{token:.2f} ms a token's matrices" if token else str(figures)
        mine = peers.get(ours.get(name, ""), {}).get("token_ms")
        lines.append(f"{name}: {said}" + (f", {token / mine:.2f} x ours" if token and mine else ""))
    capped = found.get("capped")
    lines += [f"under 7.2 GiB: {row}" for row in capped] if isinstance(capped, list) else []
    lines += [f"{TESTS}: {found[TESTS]}"] if TESTS in found else []
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in missing(found).items())])


def _of(found: Found, name: str) -> dict[str, Any]:
    part = found.get(name, {})
    return part if isinstance(part, dict) and "failed" not in part else {}


def _whole_prompt(found: Found) -> float | None:
    """Milliseconds of the prompt in bfloat16: the model's, or else those of its products."""
    model = _of(found, f"prompt {WHOLE}").get("prompt_ms")
    products: float | None = _of(found, "peers").get("bf16 cuBLAS", {}).get("prompt_ms")
    return model or products


def _prompt_line(row: dict[str, Any], whole: float | None) -> str:
    gib = {name: row[name] / 2**30 for name in row if name.startswith(("peak", "used"))}
    ratio = f", {row['prompt_ms'] / whole:.2f} x {WHOLE}" if whole else ""
    memory = ", ".join(f"{name} {size:.2f} GiB" for name, size in gib.items())
    return f"{row['format']:5} prompt: {row['prompt_ms']:.0f} ms{ratio}; {memory}"


def missing(found: Found) -> dict[str, str]:
    """What has no figures, and why."""
    said = {}
    for name, part in found.items():
        if isinstance(part, dict) and (why := part.get("failed") or part.get("left_out")):
            said[name] = f"failed: {why}" if "failed" in part else f"left out: {why}"
    tests = found.get(TESTS, {})
    return said | ({TESTS: "some are wrong"} if tests.get("exit_code") else {})


def main() -> None:
    """Measure everything; exit code 1 without a card, or where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what all may take")
    parser.add_argument("--parts", help="only these, separated by commas; the others are kept")
    parser.add_argument("--part", choices=[*PARTS], help="print what this one finds, as JSON")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA card, and torch finds none here.")
    device = torch.device("cuda", 0)
    if reason := support.missing(device):
        sys.exit(f"bench.gpu measures the Triton kernels: {reason}.")
    if given.part:
        with torch.inference_mode():
            sys.stdout.write(json.dumps(PARTS[given.part](Subject(device))) + "\n")
        return
    names = [name.strip() for name in given.parts.split(",")] if given.parts else [*PARTS, TESTS]
    if unknown := set(names) - {*PARTS, TESTS}:
        parser.error(f"no such part: {min(unknown)}; there is {', '.join([*PARTS, TESTS])}")
    name = torch.cuda.get_device_name(device)
    before = _kept(given.out, name) if given.parts else {}
    capability = torch.cuda.get_device_capability(device)
    begun = before | {"card": name, "capability": capability, "machine": describe_machine()}

    def keep(found: Found) -> None:
        text = json.dumps(found, indent=1, default=str)
        given.out.write_text(text + "\n", encoding="utf-8")

    found = run_parts(names, in_a_process, keep, seconds=60 * given.minutes, found=begun)
    sys.stdout.write(table(found) + "\n")
    if any("failed" in why or name == TESTS for name, why in missing(found).items()):
        sys.exit(1)


def _kept(path: Path, card: str) -> Found:
    """What an earlier run on the same card found."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("card") == card else {}


if __name__ == "__main__":
    main()
