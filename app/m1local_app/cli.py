"""The command `m1`, and those of its commands that converse: run, chat, ui.

What it is: Typer commands, each only wiring; those that deal with checkpoints are in commands.py.
torch, gradio and bitsandbytes are imported inside functions, since `m1 --help` must answer at once.
What it is not: where anything is decided.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m1local import __version__
from m1local.errors import SamplingError
from m1local_app import commands, library, options
from m1local_app.boundary import M1Group, usage_error, use_utf8
from m1local_app.options import DEFAULT_RECIPE, ChatOptions, Chosen

if TYPE_CHECKING:
    from m1local.engine import Engine


cli = typer.Typer(
    cls=M1Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals would print what a user wrote
    add_completion=False,
    help="Run Baichuan-M1, a medical language model, privately on this machine.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"m1local {__version__}")
        raise typer.Exit


@cli.callback()
def _main(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    use_utf8()


@cli.command()
def run(
    model: options.Model = None,
    recipe: options.RecipeName = None,
    ui: Annotated[bool, typer.Option("--ui", help="Chat in the browser instead.")] = False,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    prompt: options.Prompt = None,
    system: options.System = "",
    ctx_size: options.ContextSize = None,
    predict: options.MaxTokens = None,
    temp: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    stats: options.Stats = None,
    raw: options.RawText = False,
) -> None:
    """Fetch and quantize a model if that was not done before, then chat with it.

    Examples:  m1 run  ·  m1 run baichuan-inc/Baichuan-M1-14B-Instruct  ·  m1 run ./FOLDER --ui
    """
    from m1local_app.fetching import fetched
    from m1local_quantize.recipe import Recipe

    wanted = ChatOptions(
        prompt=prompt, system=system, context_tokens=ctx_size, max_new_tokens=predict,
        temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repeat_penalty,
        seed=seed, threads=threads, stats=stats, raw=raw,
    )  # fmt: skip
    if model is None or not library.is_repository(model):
        library.find(model)  # a wrong name is the first thing to be said
    question = None if ui else _question(wanted)
    Recipe.find(recipe or DEFAULT_RECIPE).check_closed()  # before gigabytes are fetched
    found = fetched(model, offline=offline, keep_source=keep_source)
    chosen = _quantized(found, recipe, announce_demo=model is None, offline=offline)
    _serve_page(chosen, wanted) if ui else _converse(chosen, wanted, question)


@cli.command()
def chat(
    model: options.Model = None,
    prompt: options.Prompt = None,
    system: options.System = "",
    ctx_size: options.ContextSize = None,
    predict: options.MaxTokens = None,
    temp: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    stats: options.Stats = None,
    raw: options.RawText = False,
) -> None:
    """Chat with a checkpoint as it is, quantized or not.

    Examples:  m1 chat ./m1-int4  ·  cat note.txt | m1 chat ./m1-int4 -p "Summarise this report."
    """
    wanted = ChatOptions(
        prompt=prompt, system=system, context_tokens=ctx_size, max_new_tokens=predict,
        temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repeat_penalty,
        seed=seed, threads=threads, stats=stats, raw=raw,
    )  # fmt: skip
    _converse(library.find(model), wanted, _question(wanted))


@cli.command()
def ui(
    model: options.Model = None,
    recipe: options.RecipeName = None,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    system: options.System = "",
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=0, max=65535)] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Chat in the browser, on this machine only.

    Example:  m1 ui ./Baichuan-M1-14B-Instruct
    """
    from m1local_app.fetching import fetched
    from m1local_quantize.recipe import Recipe

    Recipe.find(recipe or DEFAULT_RECIPE).check_closed()  # before gigabytes are fetched
    found = fetched(model, offline=offline, keep_source=keep_source)
    chosen = _quantized(found, recipe, announce_demo=model is None, offline=offline)
    wanted = ChatOptions(system=system, context_tokens=ctx_size, threads=threads)
    _serve_page(chosen, wanted, port=port, browser=browser)


cli.add_typer(commands.checkpoints)


def _quantized(
    chosen: Chosen, recipe_name: str | None, *, announce_demo: bool, offline: bool
) -> Chosen:
    """The quantized form of `chosen`, made or fetched now if need be."""
    from m1local.checkpoint import is_quantized
    from m1local.manifest import CheckpointManifest
    from m1local_app.fetching import completed, open_source
    from m1local_app.progress import quantize_with_progress
    from m1local_quantize.recipe import Recipe

    if announce_demo:
        typer.echo(
            f"No model named: this is the built-in demo, {library.DEMO_NAME}, small and often "
            f"wrong. For the real one: m1 run FOLDER, with the files of {library.ORIGINAL}.",
            err=True,
        )
    if is_quantized(chosen.folder):
        made_by = CheckpointManifest.read(chosen.folder).recipe
        if recipe_name is not None and Path(recipe_name).stem != made_by:
            raise usage_error(
                f"{chosen.folder} was quantized by the recipe {made_by}; leave --recipe out, or "
                "name the original checkpoint."
            )
        return completed(chosen, offline=offline)
    recipe = Recipe.find(recipe_name or DEFAULT_RECIPE)
    recipe.check_closed()
    target = library.kept_folder(chosen, recipe)
    if not (target / "m1local.json").is_file():
        original = open_source(chosen, offline=offline)
        quantize_with_progress(original, target, recipe)
    return Chosen(target, f"{chosen.label} ({recipe.name})")


def _load(chosen: Chosen, wanted: ChatOptions) -> "Engine":
    import torch

    from m1local.engine import Engine

    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    return Engine.load(chosen.folder, context_tokens=wanted.context_tokens)


def _question(wanted: ChatOptions) -> str | None:
    """The one question asked by flag or pipe, or None for a conversation.

    Also finds the mistakes in flags, before hours of work are spent on their account.
    """
    from m1local.sampling import SamplingParams
    from m1local_app.terminal import piped_text

    given = {name: value for name, value in wanted.changes().items() if value is not None}
    given.pop("max_new_tokens", None)
    try:
        SamplingParams(**given)  # type: ignore[arg-type]  # the names are those of `changes`
    except SamplingError as error:
        raise usage_error(str(error)) from error
    piped = piped_text()
    if wanted.prompt is None and piped is None:
        return None
    question = "\n\n".join(part for part in (wanted.prompt, piped) if part and part.strip())
    if not question:
        raise usage_error("there is no question: neither --prompt nor the pipe holds any text.")
    return question


def _converse(chosen: Chosen, wanted: ChatOptions, question: str | None) -> None:
    from m1local.chat import ChatSession
    from m1local_app.terminal import Terminal, note, print_answer

    engine = _load(chosen, wanted)
    settings = engine.settings(**wanted.changes())
    session = ChatSession(engine, system=wanted.system, settings=settings)
    raw = wanted.raw or not engine.generation.is_chat
    stats = sys.stderr.isatty() if wanted.stats is None else wanted.stats
    if question is not None:
        answer = engine.complete(question, settings) if raw else session.send(question)
        print_answer(answer, stats=wanted.stats is True)
        return
    note(f"{chosen.label}: {'continues your text' if raw else 'chat'}; not medical advice.")
    Terminal(session, raw=raw, stats=stats).run()


def _serve_page(
    chosen: Chosen, wanted: ChatOptions, *, port: int = 7860, browser: bool = True
) -> None:
    from m1local_app.web import serve

    engine = _load(chosen, wanted)
    settings = engine.settings(**wanted.changes())
    serve(engine, settings, chosen.label, system=wanted.system, port=port, browser=browser)
