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

from bench.gpu_parts import PARTS, WHOLE
from bench.gpu_subject import Subject
from bench.machine import describe_machine
from m1local.cuda import support

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results/gpu.json"
TESTS = "tests"
BY_HAND = ("later", "tensor cores", "without Triton")
LATE = "decode nf4"  # the parts from here on are less telling than the tests
KERNEL_TESTS = (
    "gpu", "cuda_overlap", "cuda_activation", "cuda_card", "cuda_embedding", "cuda_rows",
    "cuda_products", "cuda_fused", "cuda_decode", "cuda_drawing",
)  # fmt: skip
MINUTES = 14.0
LEAST_SECONDS = 20.0  # a part is not begun with less
MOST_SECONDS = 240.0  # of one part
SHOWN = 12  # kernels of a step
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


def everything() -> list[str]:
    """All parts, the most telling first: time may be up."""
    names = list(PARTS)
    names.insert(names.index(LATE), TESTS)
    return names


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


def kernel_tests(seconds: float, now: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """The tests of every kernel, which run on the card where there is one, file by file.

    What a file's tests found is kept where the time of the next is up. Warnings are no errors here:
    a card has some of its own.
    """
    end, found = now() + seconds, dict[str, Any]()
    wrong: list[str] = []
    for name in KERNEL_TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-Wdefault"]
        try:
            done = subprocess.run(
                [*command, f"tests/test_{name}.py"],
                cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, end - now()),
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            wrong.append(f"{name}: the time was up")
            continue
        counts = re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)
        found[name] = {kind: int(count) for count, kind in counts}
        said = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
        if done.returncode and not said:
            said = [f"{name}: {(done.stdout + done.stderr).strip()[-SAID:]}"]
        wrong += [line[:SAID] for line in said]
    return found | {"wrong": wrong}


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
                f"copy; one by one {1000 / row['plain_ms']:7.1f}{_without(row)}"
            )
        if "prompt_ms" in part:
            lines.append(_prompt_line(part, _whole_prompt(found)))
    for kernel in _of(found, "profile").get("kernels", ())[:SHOWN]:
        lines.append("a token: {microseconds:8.1f} us in {times:5.1f} of {kernel}".format(**kernel))
    ours = {"bitsandbytes NF4": "m1local nf4", "int4pack": "m1local int4"}
    for name, figures in _of(found, "peers").items():
        token = figures.get("token_ms")
        said = f"{token:.2f} ms a token's matrices" if token else str(figures)
        ratio = _against(found, name, ours.get(name, ""))
        lines.append(
            f"{name}: {said}" + (f", {ratio:.2f} x ours" if ratio else "") + _without(figures)
        )
    for name, tried in _of(found, "shapes").items():
        lines.append(f"us of {name} by groups x turns: {tried}")
    capped = found.get("capped")
    lines += [f"under 7.2 GiB: {row}" for row in capped] if isinstance(capped, list) else []
    lines += [f"{TESTS}: {found[TESTS]}"] if TESTS in found else []
    lines += [f"{name}: {why}" for name, why in missing(found).items()]
    return "\n".join([*lines, *verdicts(found)])


def verdicts(found: Found) -> list[str]:
    """What is wanted of the card, what was found, and whether that is enough."""
    prompt, whole = _of(found, "prompt int4"), _whole_prompt(found)
    short: Found = next(iter(_of(found, "decode int4").get("rows", ())), {})
    capped = found.get("capped")
    peak, plan = prompt.get("peak_on_the_card"), prompt.get("percent_of_plan")
    slowest = min((row["tokens_per_second"] for row in capped), default=None) if isinstance(
        capped, list
    ) else None  # fmt: skip
    rows: list[tuple[str, float | None, str, Callable[[float], bool]]] = [
        ("int4 decode, % of the copy", short.get("percent_of_copy"), ">= 80", lambda x: x >= 80),
        ("bitsandbytes NF4 / nf4", _against(found, "bitsandbytes NF4", "m1local nf4"), ">= 1.5",
         lambda x: x >= 1.5),
        ("int4pack / int4", _against(found, "int4pack", "m1local int4"), "> 1", lambda x: x > 1),
        ("int4 prompt / bf16", prompt["prompt_ms"] / whole if prompt and whole else None, "<= 1.5",
         lambda x: x <= 1.5),
        ("int4 with 8k, GiB of the card", peak / 2**30 if peak else None, "< 10",
         lambda x: x < 10),
        ("its peak, % of the plan", plan, "95 to 105", lambda x: abs(x - 100) < 5),
        ("tokens/s under 7.2 GiB", slowest, "> 0", lambda x: x > 0),
    ]  # fmt: skip
    said = []
    for what, figure, wanted, enough in rows:
        shown = "not measured" if figure is None else f"{figure:.2f}"
        answer = "" if figure is None else ", yes" if enough(figure) else ", NO"
        said.append(f"wanted {what} {wanted}: {shown}{answer}")
    return said


def _against(found: Found, name: str, ours: str) -> float | None:
    """How many times the milliseconds of `ours` another's products take."""
    peers = _of(found, "peers")
    token, mine = (peers.get(one, {}).get("token_ms") for one in (name, ours))
    return token / mine if token and mine else None


def _without(figures: dict[str, Any]) -> str:
    reason = figures.get("why_no_graph")
    return f" (no graph: {reason})" if reason else ""


def _of(found: Found, name: str) -> dict[str, Any]:
    part = found.get(name, {})
    return part if isinstance(part, dict) and "failed" not in part else {}


def _whole_prompt(found: Found) -> float | None:
    """Milliseconds of the prompt in bfloat16: the model's, or else those of its products."""
    model = _of(found, f"prompt {WHOLE}").get("prompt_ms")
    products: float | None = _of(found, "peers").get("bf16 cuBLAS", {}).get("prompt_ms")
    return model or products


def _prompt_line(row: dict[str, Any], whole: float | None) -> str:
    gib = {name: row[name] / 2**30 for name in row if name.startswith(("peak", "context_"))}
    ratio = f", {row['prompt_ms'] / whole:.2f} x {WHOLE}" if whole else ""
    memory = ", ".join(f"{name} {size:.2f} GiB" for name, size in gib.items())
    speed = row.get("answer_tokens_per_second")
    answer = f"; then {speed:.1f} tokens/s drawn on the card" if speed else ""
    said = f"{row['format']:5} prompt: {row['prompt_ms']:.0f} ms{ratio}{answer}{_without(row)}"
    return f"{said}; {memory}"


def missing(found: Found) -> dict[str, str]:
    """What has no figures or wrong ones, and why."""
    said = {}
    for name, part in found.items():
        if not isinstance(part, dict):
            continue
        if wrong := part.get("wrong"):
            said[name] = f"wrong: {'; '.join(wrong)}"
        elif why := part.get("failed") or part.get("left_out"):
            said[name] = f"failed: {why}" if "failed" in part else f"left out: {why}"
    return said


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
    if given.part:  # here alone, since trying a kernel takes a context's memory of the card
        if reason := support.missing(device):
            sys.exit(f"bench.gpu measures the Triton kernels: {reason}.")
        with torch.inference_mode():
            sys.stdout.write(json.dumps(PARTS[given.part](Subject(device))) + "\n")
        return
    names = [name.strip() for name in given.parts.split(",")] if given.parts else everything()
    if unknown := set(names) - {*PARTS, TESTS}:
        parser.error(f"no such part: {min(unknown)}; there is {', '.join([*PARTS, TESTS])}")
    name = torch.cuda.get_device_name(device)
    before = _kept(given.out, name)
    if not given.parts:  # what was measured by hand stays
        before = {part: kept for part, kept in before.items() if part in BY_HAND}
    capability = torch.cuda.get_device_capability(device)
    begun = before | {"card": name, "capability": capability, "machine": describe_machine()}

    def keep(found: Found) -> None:
        text = json.dumps(found, indent=1, default=str)
        given.out.write_text(text + "\n", encoding="utf-8")

    found = run_parts(names, in_a_process, keep, seconds=60 * given.minutes, found=begun)
    sys.stdout.write(table(found) + "\n")
    if any(why.startswith(("failed", "wrong")) for why in missing(found).values()):
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
