"""Everything that only a CUDA card can say, in one command: `python -m bench.gpu`.

What it is: the copy bandwidth first; every kernel against the dequantized matrix at the dimensions
of the 14B; a 14B of random weights in int4, int8 and nf4 at several contexts, with the step as a
captured graph and launched one by one; the prompt; the peak of memory; the plan under a hard cap;
and beside it bitsandbytes' NF4, torch's int4pack and bfloat16 cuBLAS on the same matrices. A short
table comes last, and bench/results/gpu.json. What it is not: a measurement of quality.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_model import FORMATS, M1_14B, filled_cache, random_matrix, random_model, specs
from bench.machine import describe_machine
from m1local.cuda import int4pack, support
from m1local.cuda.card import card
from m1local.formats.bnb import bitsandbytes
from m1local.memory import Model, Setting, bandwidth, settle
from m1local.placement import Placement, settled

RESULT = Path(__file__).parent / "results/gpu.json"
CONTEXTS = (128, 4096, 16384, 32640)
REPEATS = 20
PROMPT, CHUNK = 2048, 512
COPIED_BYTES = 1 << 30
HARD_CAP = int(7.2 * 2**30)
SHAPES = {  # of one pair of layers: how often each matrix occurs in the 14B
    (6144, 5120): 20, (7168, 5120): 20, (5120, 5120): 40, (17408, 5120): 80, (5120, 17408): 40,
}  # fmt: skip
HEAD_SHAPE = (133120, 5120)


def milliseconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median of `work`'s time on the card."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def check_kernels(device: torch.device) -> dict[str, float]:
    """Relative error of each format's product for 1, 5 and 512 rows; raises where one is wrong."""
    errors = {}
    for name, spec in FORMATS.items():
        module = random_matrix((5120, 5120), spec, device)
        whole = module.dequantize().float()
        for rows in (1, 5, CHUNK):
            x = torch.randn((rows, 5120), device=device).to(card(device).dtype)
            wanted = x.float() @ whole.T
            error = float((module(x).float() - wanted).norm() / wanted.norm())
            errors[f"{name}, {rows} rows"] = round(error, 5)
            if not error < 0.02:
                raise SystemExit(f"{name} with {rows} rows is off by {error}")
    return errors


def decode_rows(name: str, device: torch.device, speed: float) -> list[dict[str, Any]]:
    """Decode of the 14B in the format `name`, at each context, as a graph and without."""
    from m1local.cuda.decode import Decoder, Replay

    placement = Placement(device, 0, False, Setting(M1_14B.max_position_embeddings))
    model = random_model(M1_14B, name, placement, card(device).dtype)
    planned = Model(M1_14B, specs(M1_14B, name), card(device).dtype)
    cache, rows = filled_cache(M1_14B, placement, 0), []
    step = Decoder(model, cache).step
    replay = Replay(step, device)
    for context in CONTEXTS:
        graph = milliseconds(partial(_at, step.position, context, replay))
        plain = milliseconds(partial(_at, step.position, context, step))
        read = planned.demand(replace(placement.setting, context_tokens=context), device).read
        rows.append(
            {
                "format": name, "context": context, "graph_ms": graph, "plain_ms": plain,
                "why_no_graph": replay.reason, "tokens_per_second": 1000 / graph,
                "gb_per_second": read / graph / 1e6,
                "percent_of_copy": 100 * read / graph * 1000 / speed,
            }
        )  # fmt: skip
    return rows


def _at(position: Tensor, context: int, work: Callable[[], None]) -> None:
    """One step at the end of so long a context."""
    position.fill_(context)
    work()


@torch.inference_mode()
def prompt_row(name: str, device: torch.device) -> dict[str, Any]:
    """Reading a prompt of 2,048 tokens, and the peak of memory with 8k of context."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    setting = Setting(8192)
    placement = Placement(device, 0, False, setting)
    model = random_model(M1_14B, name, placement, card(device).dtype)
    cache = filled_cache(M1_14B, placement, 0)
    ids = torch.randint(0, M1_14B.vocab_size, (1, PROMPT), device=device)

    def read() -> None:
        cache.position = 0
        for start in range(0, PROMPT, CHUNK):
            model(ids[:, start : start + CHUNK], cache, last_only=True)

    taken = milliseconds(read, repeats=3)
    planned = Model(M1_14B, specs(M1_14B, name), card(device).dtype).demand(setting, device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "format": name, "prompt_ms": taken,
        "peak_allocated": torch.cuda.max_memory_allocated(), "peak_planned": planned.device,
        "used_on_the_card": total - free,
    }  # fmt: skip


def peers(device: torch.device) -> dict[str, dict[str, Any]]:
    """Milliseconds that all matrices of a token take by each peer; and a prompt's in bfloat16."""
    found: dict[str, dict[str, Any]] = {}
    for name, multiply in {
        "bf16 cuBLAS": _bf16,
        "bitsandbytes NF4": _nf4,
        "int4pack": _pack,
    }.items():
        try:
            token = sum(n * _timed(multiply, shape, 1, device) for shape, n in SHAPES.items())
            found[name] = {"token_ms": token}
        except Exception as error:  # a peer that fails here is a finding, not the end
            found[name] = {"failed": str(error)[:200]}
    chunks = PROMPT // CHUNK
    prompt = sum(n * chunks * _timed(_bf16, shape, CHUNK, device) for shape, n in SHAPES.items())
    found["bf16 cuBLAS"]["prompt_ms"] = prompt
    return found


Multiply = Callable[[tuple[int, int], torch.device], Callable[[Tensor], object]]


def _timed(multiply: Multiply, shape: tuple[int, int], rows: int, device: torch.device) -> float:
    product = multiply(shape, device)
    x = torch.randn((rows, shape[1]), dtype=card(device).dtype, device=device)
    return milliseconds(lambda: product(x))


def _bf16(shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], object]:
    weight = torch.randn(shape, dtype=card(device).dtype, device=device)
    return lambda x: x @ weight.T


def _nf4(shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], object]:
    module = random_matrix(shape, FORMATS["nf4"], device)
    assert bitsandbytes()
    inner: Callable[[Tensor], object] = module.inner  # type: ignore[assignment]  # a Linear4bit
    return inner


def _pack(shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], object]:
    codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device)
    packed = int4pack.pack(codes)
    scales = torch.ones((shape[1] // 64, shape[0], 2), dtype=torch.bfloat16, device=device)
    return lambda x: int4pack.multiply(x, packed, 64, scales)


@torch.inference_mode()
def capped(device: torch.device, speed: float) -> dict[str, Any]:
    """What the plan finds under a hard cap of 7.2 GiB, and how fast it runs."""
    from m1local.cuda.decode import Decoder

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    planned = Model(M1_14B, specs(M1_14B, "int4"), card(device).dtype)
    runtime = planned.demand(Setting(8192), device).runtime
    torch.cuda.set_per_process_memory_fraction((HARD_CAP - runtime) / total, device)
    try:
        setting = settle(planned, Setting(8192), device, HARD_CAP - runtime)
        placement = settled(setting, M1_14B.num_hidden_layers, device)
        model = random_model(M1_14B, "int4", placement, card(device).dtype)
        decoder = Decoder(model, filled_cache(M1_14B, placement, 64), placement.first)
        taken = milliseconds(lambda: decoder.feed(5), repeats=8)
        peak = torch.cuda.max_memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    on_card = M1_14B.num_hidden_layers - placement.first
    return {"gpu_layers": on_card, "tokens_per_second": 1000 / taken, "peak_allocated": peak}


def table(found: dict[str, Any]) -> str:
    """The short table that comes last."""
    lines = [f"{found['card']}: copies at {found['copy_gb_per_second']:.0f} GB/s"]
    lines += [
        f"{row['format']:5} context {row['context']:6}: {row['tokens_per_second']:7.1f} tokens/s, "
        f"{row['percent_of_copy']:5.1f} % of the copy; one by one {1000 / row['plain_ms']:7.1f}"
        for row in found["decode"]
    ]
    lines += [
        f"{row['format']:5} prompt of {PROMPT}: {row['prompt_ms']:.0f} ms; peak "
        f"{row['peak_allocated'] / 2**30:.2f} GiB, planned {row['peak_planned'] / 2**30:.2f}, "
        f"in use {row['used_on_the_card'] / 2**30:.2f}"
        for row in found["prompt"]
    ]
    lines += [f"{name}: {figures}" for name, figures in found["peers"].items()]
    return "\n".join([*lines, f"under 7.2 GiB: {found['capped']}"])


def main() -> None:
    """Measure everything; one line and exit code 1 without a card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA card, and torch finds none here.")
    device = torch.device("cuda", 0)
    if reason := support.missing(device):
        sys.exit(f"bench.gpu measures the Triton kernels: {reason}.")
    speed = bandwidth(device, COPIED_BYTES)
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "machine": describe_machine(),
        "copy_gb_per_second": speed / 1e9,
    }
    stages: dict[str, Callable[[], object]] = {
        "kernels": lambda: check_kernels(device),
        "decode": lambda: [row for name in FORMATS for row in decode_rows(name, device, speed)],
        "prompt": lambda: [prompt_row(name, device) for name in FORMATS],
        "peers": lambda: peers(device),
        "capped": lambda: capped(device, speed),
    }
    for name, stage in stages.items():
        with torch.inference_mode():
            found[name] = stage()
        arguments.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
