"""`m1 bench`: tokens per second of a checkpoint on this machine, as table, JSON or CSV.

What it is: the options' lists read, and m1local/benchmark.py's figures laid out. What it is not: a
comparison with others; those are in bench/.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from m1local_app.boundary import usage_error
from m1local_app.columns import table
from m1local_app.kept import size_text
from m1local_app.language import tr

if TYPE_CHECKING:
    from m1local.benchmark import Measured
    from m1local.engine import Engine

Output = Literal["table", "json", "csv"]
LONGEST = 1 << 20
LEAST_CONTEXT = 16


def numbers(text: str, option: str, *, least: int = 1) -> list[int]:
    """Numbers of "128,512"; raises UsageError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and least <= int(part) <= LONGEST for part in parts):
        said = tr(
            "{option} is {text!r}; give numbers from {least} on, as 128,512.",
            option=option,
            text=text,
            least=least,
        )
        raise usage_error(said)
    return [int(part) for part in parts]


def run(
    folder: Path,
    *,
    prompts: str,
    answers: str,
    depths: str,
    repetitions: int,
    gpu_layers: str,
    kv_type: str,
    output: Output,
) -> None:
    """Measure and print; a line to stderr for every case as it is done."""
    from m1local import benchmark
    from m1local.checkpoint import CONFIG
    from m1local.config import M1Config
    from m1local.engine import Engine
    from m1local_app import idle_card
    from m1local_app.conversing import gpu_layers as parsed_layers

    layers = parsed_layers(gpu_layers)
    wanted = benchmark.cases(
        numbers(prompts, "--prompt-tokens"),
        numbers(answers, "--new-tokens"),
        numbers(depths, "--depth", least=0) or [0],
    )
    if not wanted:
        raise usage_error(tr("Nothing is to be measured; give --prompt-tokens or --new-tokens."))
    room = max(benchmark.room_for(wanted), LEAST_CONTEXT)
    longest = M1Config.from_file(folder / CONFIG).max_position_embeddings
    if room > longest:
        said = tr(
            "{room} tokens of context are wanted, this model takes {longest}; choose shorter "
            "prompts or answers, or less --depth.",
            room=room,
            longest=longest,
        )
        raise usage_error(said)
    if layers == "auto":
        idle_card.tell()
    engine = Engine.load(folder, context_tokens=room, gpu_layers=layers, kv_type=kv_type)
    found = []
    for measured in benchmark.measure(engine, wanted, repetitions):
        found.append(measured)
        if output != "table" or not sys.stdout.isatty():
            said = f"{measured.case.name}: {measured.tokens_per_second:.1f} tokens/s"
            typer.echo(said, err=True)
    shown = {"table": as_text, "json": as_json, "csv": as_csv}[output]
    typer.echo(shown(engine, found))


def held_bytes(*, mapped: bool = False) -> int:
    """Anonymous and shared memory of this process where the system tells, else all resident.

    Pages of mapped files, which can be dropped at any time, count on Linux where `mapped` says so.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
        kinds = ("RssAnon", "RssShmem", "RssFile") if mapped else ("RssAnon", "RssShmem")
        return sum(int(fields[name].split()[0]) << 10 for name in kinds)
    except (OSError, KeyError, ValueError):
        import psutil

        return int(psutil.Process(os.getpid()).memory_info().rss)


def _rows(found: Sequence["Measured"]) -> list[dict[str, object]]:
    return [
        {
            "test": one.case.name,
            "tokens": one.case.tokens,
            "depth": one.case.depth,
            "tokens_per_second": round(one.tokens_per_second, 3),
            "slowest": round(one.case.tokens / max(one.seconds), 3),
            "fastest": round(one.case.tokens / min(one.seconds), 3),
            "gb_per_second": round(one.bytes_per_second / 1e9, 3),
            "bandwidth_gb_per_second": round(one.bandwidth / 1e9, 3),
            "share_of_bandwidth": round(one.share, 4),
        }
        for one in found
    ]


def as_json(engine: "Engine", found: Sequence["Measured"]) -> str:
    """Everything, with what was measured on."""
    return json.dumps(
        {
            "device": str(engine.context.device),
            "card": _card(engine),
            "card_layers": _card_layers(engine),
            "card_peak_bytes": _card_peak(found),
            "why_no_graph": _why_no_graph(engine),
            "threads": _threads(),
            "weights_bytes": _weight_bytes(engine),
            "cache_bytes": engine.context.cache.nbytes,
            "held_bytes": held_bytes(),
            "resident_bytes": held_bytes(mapped=True),
            "results": _rows(found),
        },
        indent=1,
    )


def as_csv(engine: "Engine", found: Sequence["Measured"]) -> str:
    """A line for each case, with heads."""
    rows, text = _rows(found), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def as_text(engine: "Engine", found: Sequence["Measured"]) -> str:
    """The table, and below it memory and bandwidth."""
    heads = (tr("test"), tr("tokens/s"), tr("from – to"), "GB/s", tr("of the bandwidth"))
    rows = [
        (
            one.case.name,
            f"{one.tokens_per_second:.2f}",
            f"{one.case.tokens / max(one.seconds):.2f} – {one.case.tokens / min(one.seconds):.2f}",
            f"{one.bytes_per_second / 1e9:.1f}" if one.case.is_answer else "",
            f"{one.share:.0%}" if one.case.is_answer else "",
        )
        for one in found
    ]
    said = tr(
        "{weights} of weights, {cache} of context; {held} of memory held; {speed} GB/s can be "
        "read; {device}, {threads} threads",
        weights=size_text(_weight_bytes(engine)),
        cache=size_text(engine.context.cache.nbytes),
        held=size_text(held_bytes()),
        speed=f"{sorted(one.bandwidth for one in found)[len(found) // 2] / 1e9:.1f}",
        device=_card(engine) or str(engine.context.device),
        threads=_threads(),
    )
    if peak := _card_peak(found):
        said += tr(
            "; {count} of {layers} layers on the card, at most {size} of its memory",
            count=_card_layers(engine),
            layers=engine.model.config.num_hidden_layers,
            size=size_text(peak),
        )
    return f"{table(rows, heads=heads)}\n\n{said}"


def _card(engine: "Engine") -> str | None:
    """The card's name; None on the CPU."""
    import torch

    device = engine.context.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _card_layers(engine: "Engine") -> int:
    return sum(layer.raw_k.device.type == "cuda" for layer in engine.context.cache.layers)


def _card_peak(found: Sequence["Measured"]) -> int:
    """The most that was allocated on the card while something was measured; 0 on the CPU."""
    return max(one.card_bytes for one in found)


def _why_no_graph(engine: "Engine") -> str | None:
    """Why steps are not launched as one graph; "" where they are, None without a decoder."""
    decoder = engine.context.decoder
    return None if decoder is None else decoder.reason


def _weight_bytes(engine: "Engine") -> int:
    model = engine.model
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _threads() -> int:
    import torch

    return torch.get_num_threads()
