"""The options of a conversation, once for `m1 run`, `m1 chat` and `m1 ui`; named as llama.cpp's.

What it is: types for Typer, gathered in dataclasses that a command takes whole. What it is not:
defaults of sampling; those are the checkpoint's own (generation_config.json), which only a given
flag overrides.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from m1local.errors import SamplingError
from m1local_app.language import tr
from m1local_app.options import Threads

SAMPLING, CONVERSATION = "Sampling", "Conversation"


def parse_bias(text: str) -> tuple[int, float]:
    """A token id and its bias of "15043+1" or "15043-inf"; raises SamplingError."""
    at = max(text.find("+", 1), text.find("-", 1))
    try:
        if at < 1:
            raise ValueError(text)
        return int(text[:at]), float(text[at:])
    except ValueError as error:
        raise SamplingError(
            tr(
                "logit-bias is {text!r}; write TOKEN+BIAS, as 15043+1.5, or 15043-inf to ban a "
                "token.",
                text=text,
            )
        ) from error


def sampling_option(*names: str, text: str, metavar: str = "N", **more: Any) -> Any:
    """An option in the help's panel on sampling."""
    return typer.Option(
        *names, help=text, metavar=metavar, rich_help_panel=SAMPLING, show_default=False, **more
    )


def conversation_option(*names: str, text: str, **more: Any) -> Any:
    """An option in the help's panel on the conversation."""
    return typer.Option(*names, help=text, rich_help_panel=CONVERSATION, show_default=False, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to load and to answer; None leaves the checkpoint's default."""

    system: Annotated[
        str,
        conversation_option(
            "--system-prompt", "-sys", metavar="TEXT", text="What the model is told first."
        ),
    ] = ""
    system_file: Annotated[
        Path | None,
        conversation_option(
            "--system-prompt-file", "-sysf", metavar="FILE", text="The same, from a file."
        ),
    ] = None
    context_tokens: Annotated[
        int | None,
        conversation_option(
            "--ctx-size",
            "-c",
            min=16,
            metavar="N",
            text="Tokens of prompt and answers. (default: 8192)",
        ),
    ] = None
    gpu_layers: Annotated[
        str,
        conversation_option(
            "--gpu-layers",
            "-ngl",
            metavar="N",
            text="Layers that the graphics card computes: auto (default, what fits), all or N.",
        ),
    ] = "auto"
    kv_type: Annotated[
        Literal["f16", "q8_0"] | None,
        conversation_option(
            "--kv-type",
            "-ctk",
            metavar="TYPE",
            text="How the context is kept: f16 (default), or q8_0 in half the memory.",
        ),
    ] = None
    overflow: Annotated[
        Literal["stop", "truncate-middle", "rolling"],
        conversation_option(
            "--overflow",
            metavar="POLICY",
            text="When the context is full: stop (default), rolling drops the oldest turns, "
            "truncate-middle those after the first.",
        ),
    ] = "stop"
    max_new_tokens: Annotated[
        int | None,
        conversation_option(
            "--predict",
            "--max-tokens",
            "-n",
            min=1,
            metavar="N",
            text="Tokens of an answer at most.",
        ),
    ] = None
    loop_guard: Annotated[
        bool,
        conversation_option(
            "--loop-guard/--no-loop-guard",
            text="End an answer that repeats itself without end. (default: on)",
        ),
    ] = True
    lookup: Annotated[
        bool,
        conversation_option(
            "--lookup/--no-lookup",
            text="Propose tokens that came before, when that is faster. (default: on)",
        ),
    ] = True
    temperature: Annotated[
        float | None,
        sampling_option("--temp", "--temperature", text="0 takes the most likely token."),
    ] = None
    top_k: Annotated[
        int | None, sampling_option("--top-k", text="Draw from this many tokens; 0: from all.")
    ] = None
    top_p: Annotated[
        float | None, sampling_option("--top-p", text="Draw from this much probability.")
    ] = None
    min_p: Annotated[
        float | None, sampling_option("--min-p", text="Drop tokens this much less likely.")
    ] = None
    repetition_penalty: Annotated[
        float | None,
        sampling_option("--repeat-penalty", text="Discourage tokens that came before."),
    ] = None
    repeat_last_n: Annotated[
        int | None,
        sampling_option(
            "--repeat-last-n", text="The penalties look at so many tokens; -1 (default): at all."
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        sampling_option("--presence-penalty", text="Subtract from tokens that came before."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        sampling_option("--frequency-penalty", text="The same, each time that they came."),
    ] = None
    dry_multiplier: Annotated[
        float | None,
        sampling_option(
            "--dry-multiplier", text="Discourage sequences that came before (DRY); 0: off, try 0.8."
        ),
    ] = None
    dry_base: Annotated[
        float | None, sampling_option("--dry-base", text="DRY's growth per token. (default: 1.75)")
    ] = None
    dry_allowed_length: Annotated[
        int | None,
        sampling_option("--dry-allowed-length", text="DRY lets so many pass. (default: 2)"),
    ] = None
    dry_penalty_last_n: Annotated[
        int | None,
        sampling_option("--dry-penalty-last-n", text="DRY looks at so many tokens; -1: at all."),
    ] = None
    dry_sequence_breakers: Annotated[
        list[str] | None,
        sampling_option(
            "--dry-sequence-breaker",
            metavar="TEXT",
            text="A text over which DRY does not look. May be repeated.",
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        sampling_option(
            "--logit-bias",
            "-l",
            metavar="TOKEN+BIAS",
            text="Make a token likelier, or ban it: 15043+1, 15043-inf. May be repeated.",
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        sampling_option(
            "--reverse-prompt",
            "--stop",
            metavar="TEXT",
            text="End an answer before this text. May be repeated.",
        ),
    ] = None
    seed: Annotated[
        int | None, sampling_option("--seed", "-s", text="Draw the same tokens again.")
    ] = None
    threads: Threads = None

    def changes(self) -> dict[str, object]:
        """What differs from the checkpoint's settings, by the names of `Engine.settings`."""
        given: dict[str, object] = {
            field.name: value
            for field in fields(EngineOptions)
            if field.name not in NOT_SETTINGS
            if (value := getattr(self, field.name)) is not None
        }
        if self.logit_bias is not None:
            given["logit_bias"] = tuple(map(parse_bias, self.logit_bias))
        for name in ("dry_sequence_breakers", "stop"):
            if name in given:
                given[name] = tuple(getattr(self, name))
        return given


NOT_SETTINGS = frozenset(
    {"system", "system_file", "context_tokens", "gpu_layers", "kv_type", "overflow", "threads"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(EngineOptions):
    """What a conversation in the terminal takes besides."""

    prompt: Annotated[
        str | None,
        conversation_option(
            "--prompt",
            "-p",
            metavar="TEXT",
            text="Answer this one question and leave. Piped text is added.",
        ),
    ] = None
    prompt_file: Annotated[
        Path | None,
        conversation_option(
            "--file", "-f", metavar="FILE", text="Read the question, or more of it, from a file."
        ),
    ] = None
    json_schema: Annotated[
        str | None,
        sampling_option(
            "--json-schema",
            "-j",
            metavar="TEXT",
            text="Answer in JSON of this schema; {} for any. Needs the extra json.",
        ),
    ] = None
    json_schema_file: Annotated[
        Path | None,
        sampling_option("--json-schema-file", "-jf", metavar="FILE", text="The same, from a file."),
    ] = None
    resume: Annotated[
        bool, conversation_option("--continue", text="Go on with the latest conversation.")
    ] = False
    session: Annotated[
        str | None,
        conversation_option(
            "--session",
            metavar="NAME",
            text="Go on with the conversation of this number or title; a new title begins one.",
        ),
    ] = None
    keep: Annotated[
        bool,
        conversation_option(
            "--history/--no-history", text="Keep the conversation under M1_HOME. (default: keep)"
        ),
    ] = True
    markdown: Annotated[
        bool | None,
        conversation_option(
            "--markdown/--no-markdown", text="Render Markdown. (default: on a terminal)"
        ),
    ] = None
    stats: Annotated[
        bool | None,
        conversation_option(
            "--stats/--no-stats", text="Speed after each answer. (default: in a conversation)"
        ),
    ] = None
    timings: Annotated[
        bool, conversation_option("--timings", text="Say what the time of the start went into.")
    ] = False
    raw: Annotated[
        bool,
        conversation_option("--raw", text="Continue the text as it is, without the chat template."),
    ] = False


def takes(options: type[EngineOptions]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a Typer command take `options` whole, as its argument `wanted`."""
    hints = get_type_hints(options, include_extras=True)
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "wanted"]

        def expanded(**given: Any) -> None:
            values = {parameter.name: given.pop(parameter.name) for parameter in added}
            command(**given, wanted=options(**values))

        expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
        expanded.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return expanded

    return decorate
