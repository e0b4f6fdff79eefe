"""The command `m1`, and those of its commands that converse: run, chat, ui.

What it is: Typer commands, each only wiring; those that deal with checkpoints are in commands.py,
those about past conversations in history_commands.py.
torch, gradio and bitsandbytes are imported inside functions, since `m1 --help` must answer at once.
What it is not: where anything is decided.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from m1local import __version__
from m1local_app import commands, history_commands, library, options
from m1local_app.answer_view import note
from m1local_app.boundary import M1Group, usage_error, use_utf8
from m1local_app.chat_options import ChatOptions, EngineOptions, takes
from m1local_app.language import tr
from m1local_app.options import DEFAULT_RECIPE, Chosen

if TYPE_CHECKING:
    from m1local_quantize.recipe import Recipe

DEFAULT_PORT = 7860

cli = typer.Typer(
    cls=M1Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals would print what a user wrote
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
    __: Annotated[
        str | None,
        typer.Option(
            "--lang",
            metavar="en|zh",
            help="Speak English or Chinese, after any command. (default: the system's language)",
        ),
    ] = None,
) -> None:
    use_utf8()


@cli.command()
@takes(ChatOptions)
def run(
    model: options.Model = None,
    recipe: options.RecipeName = None,
    ui: Annotated[bool, typer.Option("--ui", help="Chat in the browser instead.")] = False,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    *,
    wanted: ChatOptions,
) -> None:
    """Fetch and quantize a model if that was not done before, then chat with it.

    Examples:  m1 run  ·  m1 run baichuan-inc/Baichuan-M1-14B-Instruct  ·  m1 run ./FOLDER --ui
    """
    from m1local_app.conversing import check_options, checked, converse, serve_page

    if model is None or not library.is_repository(model):
        library.find(model)  # a wrong name is the first thing to be said
    if ui:
        check_options(wanted)
        chosen, wanted = _prepared(model, recipe, wanted, offline=offline, keep_source=keep_source)
        serve_page(chosen, wanted, port=DEFAULT_PORT, browser=True)
        return
    wish = checked(wanted)
    chosen, wanted = _prepared(model, recipe, wanted, offline=offline, keep_source=keep_source)
    converse(chosen, replace(wish, options=wanted))


@cli.command()
@takes(ChatOptions)
def chat(model: options.Model = None, *, wanted: ChatOptions) -> None:
    """Chat with a checkpoint as it is, quantized or not.

    Examples:  m1 chat ./m1-int4  ·  m1 chat ./m1-int4 --continue  ·
    cat note.txt | m1 chat ./m1-int4 -p "Summarise this report."
    """
    from m1local_app.conversing import checked, converse

    chosen = library.find(model)
    converse(chosen, checked(wanted))


@cli.command()
@takes(EngineOptions)
def ui(
    model: options.Model = None,
    recipe: options.RecipeName = None,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    port: Annotated[
        int, typer.Option(help="Port of the page; 0: any.", min=0, max=65535)
    ] = DEFAULT_PORT,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; any but this machine's own demands --auth."),
    ] = "127.0.0.1",
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD", help="Ask for this name and password.", show_default=False
        ),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    *,
    wanted: EngineOptions,
) -> None:
    """Chat in the browser, on this machine only.

    Example:  m1 ui ./Baichuan-M1-14B-Instruct
    """
    from m1local_app.conversing import check_host, check_options, serve_page

    check_options(wanted)
    check_host(host, auth)
    chosen, wanted = _prepared(model, recipe, wanted, offline=offline, keep_source=keep_source)
    serve_page(chosen, wanted, host=host, auth=auth, port=port, browser=browser)


cli.add_typer(commands.checkpoints)
cli.add_typer(history_commands.history)


Options = TypeVar("Options", bound=EngineOptions)


def _prepared(
    model: str | None,
    recipe_name: str | None,
    wanted: Options,
    *,
    offline: bool,
    keep_source: bool,
) -> tuple[Chosen, Options]:
    """What `model` names, quantized; fetched and made now if need be, and how to load it.

    On a card what `wanted` and `recipe_name` leave open follows from the memory that is free.
    """
    from m1local_app.fetching import fetched
    from m1local_quantize.recipe import Recipe, shipped_recipes

    recipe = Recipe.find(recipe_name or DEFAULT_RECIPE)
    recipe.check_closed()  # before gigabytes are fetched
    found = fetched(model, offline=offline, keep_source=keep_source)
    if model is None:
        note(
            tr(
                "No model named: this is the built-in demo, {demo}, small and often wrong. For the "
                "real one: m1 run FOLDER, with the files of {original}.",
                demo=library.DEMO_NAME,
                original=library.ORIGINAL,
            )
        )
    named = recipe_name is not None
    if not named and wanted.context_tokens is None and wanted.gpu_layers == "auto":
        from m1local_app import choosing

        if (choice := choosing.choose(found, wanted.kv_type)) is not None:
            note(choosing.line(choice))
            taken = choice.setting
            kept: Any = taken.kv_type  # one of the option's
            wanted = replace(wanted, context_tokens=taken.context_tokens, kv_type=kept)
            if choice.recipe in shipped_recipes():
                recipe = Recipe.find(choice.recipe)
    return _quantized(found, recipe, named=named, offline=offline), wanted


def _quantized(chosen: Chosen, recipe: "Recipe", *, named: bool, offline: bool) -> Chosen:
    """The quantized form of `chosen`, made or fetched now if need be; `named` by the user."""
    from m1local.checkpoint import is_quantized
    from m1local.manifest import CheckpointManifest
    from m1local_app.fetching import completed, open_source
    from m1local_app.progress import quantize_with_progress

    if is_quantized(chosen.folder):
        made_by = CheckpointManifest.read(chosen.folder).recipe
        if named and recipe.name != made_by:
            raise usage_error(
                tr(
                    "{folder} was quantized by the recipe {recipe}; leave --recipe out, or name "
                    "the original checkpoint.",
                    folder=chosen.folder,
                    recipe=made_by,
                )
            )
        return completed(chosen, offline=offline)
    target = library.kept_folder(chosen, recipe)
    if not (target / "m1local.json").is_file():
        original = open_source(chosen, offline=offline)
        quantize_with_progress(original, target, recipe)
    return Chosen(target, f"{chosen.label} ({recipe.name})")
