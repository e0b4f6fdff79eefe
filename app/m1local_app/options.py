"""The command line's options, once for all commands; sampling flags bear llama.cpp's names.

What it is: types for Typer, and the values gathered. What it is not: defaults of sampling; those
are the checkpoint's own (generation_config.json), which only a given flag overrides.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_RECIPE = "int4"
MOST_BYTES = 1 << 60
UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of "7GiB" (1024^3) or "8GB" (1000^3); raises typer.BadParameter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise typer.BadParameter(f"{text!r} is no size; write it as 7GiB or 8GB.")
    number = float(found[1]) * UNITS[found[2].lower()]
    if not number < MOST_BYTES:
        raise typer.BadParameter(f"{text[:40]!r} is more than any machine has.")
    return int(number)


Model = Annotated[
    str | None,
    typer.Argument(
        help="A checkpoint's folder, or a name under M1_HOME/models; without one, the demo.",
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
        help="Text to measure on, .txt or .jsonl. [default: a short medical one, English, Chinese]",
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
Offline = Annotated[
    bool, typer.Option("--offline", help="Fetch nothing; fail where something is missing.")
]
KeepSource = Annotated[
    bool,
    typer.Option(
        "--keep-source", help="Fetch the whole original first, and keep it; else it is dropped."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="Answer this one question and leave. Piped text is added."),
]
System = Annotated[
    str, typer.Option("--system-prompt", "-sys", help="What the model is told beforehand.")
]
ContextSize = Annotated[
    int | None,
    typer.Option("--ctx-size", "-c", min=16, help="Tokens of prompt and answers. [default: 8192]"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--predict", "--max-tokens", "-n", min=1, help="Tokens of an answer at most."),
]
Temperature = Annotated[
    float | None, typer.Option("--temp", "--temperature", help="0 takes the most likely token.")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Draw from this many tokens; 0: from all.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from this much probability.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Drop tokens this much less likely.")]
RepeatPenalty = Annotated[
    float | None, typer.Option("--repeat-penalty", help="Discourage tokens that came before.")
]
Seed = Annotated[int | None, typer.Option("--seed", "-s", help="Draw the same tokens again.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="CPU threads. [default: all cores]")
]
Stats = Annotated[
    bool | None,
    typer.Option(
        "--stats/--no-stats", help="Speed after each answer. [default: in a conversation]"
    ),
]
RawText = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What `m1 run`, `m1 chat` and `m1 ui` were asked for; None leaves the checkpoint's default."""

    prompt: str | None = None
    system: str = ""
    context_tokens: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    threads: int | None = None
    stats: bool | None = None
    raw: bool = False

    def changes(self) -> dict[str, int | float | None]:
        """What differs from the checkpoint's settings, by the names of `Engine.settings`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class Chosen:
    """The folder to load, and what to call it."""

    folder: Path
    label: str
    repository: str | None = None  # whose weights are still to be fetched into the folder
