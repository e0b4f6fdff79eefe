"""The command line's options for checkpoints, once for all commands.

What it is: types for Typer, and what a model's name was found to mean. What it is not: the options
of a conversation; those are in chat_options.py.
"""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from m1local_app.language import tr

DEFAULT_RECIPE = "int4"
MOST_BYTES = 1 << 60
UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of "7GiB" (1024^3) or "8GB" (1000^3); raises typer.BadParameter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise typer.BadParameter(tr("{text!r} is no size; write it as 7GiB or 8GB.", text=text))
    number = float(found[1]) * UNITS[found[2].lower()]
    if not number < MOST_BYTES:
        raise typer.BadParameter(tr("{text!r} is more than any machine has.", text=text[:40]))
    return int(number)


def parse_speed(text: str) -> int:
    """Bytes per second of "360GB/s"; raises typer.BadParameter."""
    speed = parse_size(text.strip().removesuffix("/s"))
    if speed == 0:
        raise typer.BadParameter(tr("{text!r} is no speed; write it as 360GB/s.", text=text))
    return speed


def quoted(path: Path) -> str:
    """`path` as a shell takes it."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


Model = Annotated[
    str | None,
    typer.Argument(
        help="A checkpoint's folder, or a name under M1_HOME/models; without one, the demo.",
        show_default=False,
    ),
]
FetchedModel = Annotated[
    str | None,
    typer.Argument(
        help="A checkpoint's folder, a name under M1_HOME/models, or OWNER/NAME on the model hub; "
        "without one, the demo.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="int4 (default), int4-gptq, fit, int8, bnb-nf4, bnb-int8, or a .toml file.",
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Text to measure on, .txt or .jsonl. (default: a short medical one, English, Chinese)",
        show_default=False,
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--budget", parser=parse_size, metavar="SIZE", help="fit: bytes of all weights, as 7GiB."
    ),
]
Device = Annotated[
    int | None,
    typer.Option(
        "--for", parser=parse_size, metavar="SIZE",
        help="fit: memory of the device that weights and context shall fit, as 8GB.",
    ),
]  # fmt: skip
ContextSize = Annotated[
    int | None,
    typer.Option(
        "--ctx-size", "-c", min=16, metavar="N", help="fit: tokens of context. (default: 8192)"
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory", parser=parse_size, metavar="SIZE",
        help="Plan for a card with so much memory, as 8GB. (default: what is free here)",
    ),
]  # fmt: skip
Bandwidth = Annotated[
    int | None,
    typer.Option(
        "--bandwidth", parser=parse_speed, metavar="SPEED",
        help="How fast its memory is read, as 360GB/s. (default: measured)",
    ),
]  # fmt: skip
PlannedContext = Annotated[
    int | None,
    typer.Option("--ctx-size", "-c", min=16, metavar="N", help="Only this many tokens of context."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a report.")]
GpuLayers = Annotated[
    str,
    typer.Option(
        "--gpu-layers", "-ngl", metavar="N", show_default=False,
        help="Layers that the graphics card computes: auto (default, what fits), all or N.",
    ),
]  # fmt: skip
KvType = Annotated[
    Literal["f16", "q8_0"],
    typer.Option(
        "--kv-type", "-ctk", metavar="TYPE", show_default=False,
        help="How the context is kept: f16 (default), or q8_0 in half the memory.",
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, max=1024, metavar="N", help="CPU threads. (default: all cores)"
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Fetch nothing; fail where something is missing.")
]
Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit. (default: main, then as it was)")
]
KeepSource = Annotated[
    bool,
    typer.Option(
        "--keep-source", help="Fetch the whole original first, and keep it; else it is dropped."
    ),
]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The folder to load, and what to call it."""

    folder: Path
    label: str
    repository: str | None = None  # whose weights are still to be fetched into the folder


def use_threads(threads: int | None) -> None:
    """Let torch and the compiled library compute on so many threads; None leaves it to torch."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
