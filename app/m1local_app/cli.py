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
from m1local.manifest import NAME as MANIFEST
from m1local_app import commands, history_commands, library, options
from m1local_app.answer_view import note
from m1local_app.boundary import M1Group, usage_error, use_utf8
from m1local_app.chat_options import ChatOptions, EngineOptions, takes
from m1local_app.language import tr
from m1local_app.options import DEFAULT_RECIPE, Chosen
from m1local_app.timings import Timings

if TYPE_CHECKING:
    from m1local_app.fitting import Size
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
    model: options.FetchedModel = None,
    recipe: options.RecipeName = None,
    ui: Annotated[bool, typer.Option("--ui", help="Chat in the browser instead.")] = False,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    budget: options.Budget = None,
    device: options.Device = None,
    *,
    wanted: ChatOptions,
) -> None:
    """Fetch and quantize a model if that was not done before, then chat with it.

    Examples:  m1 run  ·  m1 run baichuan-inc/Baichuan-M1-14B-Instruct  ·  m1 run ./FOLDER --ui
    ·  m1 run ./FOLDER -r fit --for 8GB --ctx-size 8192
    """
    timings = Timings()
    from m1local_app.conversing import check_options, checked, converse, serve_page
    from m1local_app.fitting import Size

    if model is None or not library.is_repository(model):
        library.find(model)  # a wrong name is the first thing to be said
    # The context is the conversation's, too; so it goes with a budget of weights alone.
    size = Size(budget, device, wanted.context_tokens if device is not None else None)
    if ui:
        check_options(wanted)
        chosen, wanted = _prepared(
            model, recipe, size, wanted, offline=offline, keep_source=keep_source
        )
        serve_page(chosen, wanted, port=DEFAULT_PORT, browser=True)
        return
    wish = checked(wanted)
    timings.done("torch")
    chosen, wanted = _prepared(
        model, recipe, size, wanted, offline=offline, keep_source=keep_source
    )
    timings.done("checkpoint")
    converse(chosen, replace(wish, options=wanted), timings)


@cli.command()
@takes(ChatOptions)
def chat(model: options.Model = None, *, wanted: ChatOptions) -> None:
    """Chat with a checkpoint as it is, quantized or not.

    Examples:  m1 chat ./m1-int4  ·  m1 chat ./m1-int4 --continue  ·
    cat note.txt | m1 chat ./m1-int4 -p "Summarise this report."
    """
    timings = Timings()
    from m1local_app.conversing import checked, converse

    chosen, wish = library.find(model), checked(wanted)
    timings.done("torch")
    converse(chosen, wish, timings)


@cli.command()
@takes(EngineOptions)
def ui(
    model: options.FetchedModel = None,
    recipe: options.RecipeName = None,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    port: Annotated[
        int, typer.Option(metavar="N", help="Port of the page; 0: any.", min=0, max=65535)
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
    chosen, wanted = _prepared(
        model, recipe, None, wanted, offline=offline, keep_source=keep_source
    )
    serve_page(chosen, wanted, host=host, auth=auth, port=port, browser=browser)


cli.add_typer(commands.checkpoints)
cli.add_typer(history_commands.history)


Options = TypeVar("Options", bound=EngineOptions)


def _prepared(
    model: str | None,
    recipe_name: str | None,
    size: "Size | None",
    wanted: Options,
    *,
    offline: bool,
    keep_source: bool,
) -> tuple[Chosen, Options]:
    """What `model` names, quantized; fetched and made now if need be, and how to load it.

    On a card what `wanted`, `recipe_name` and `size` leave open follows from the free memory.
    """
    from m1local_app import idle_card
    from m1local_app.fetching import fetched
    from m1local_quantize.recipe import Recipe

    recipe = Recipe.find(recipe_name or DEFAULT_RECIPE)
    # Before gigabytes are fetched.
    if wanted.gpu_layers == "auto":
        idle_card.tell()
    if size is None or not (recipe.candidates or size.budget or size.device):
        recipe.check_closed()
        size = None
    else:
        size.check(recipe)
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
    _check_named(found, recipe, size, named=recipe_name is not None)
    if recipe_name is None:  # so there is no size either
        recipe, wanted = _left_open(found, recipe, wanted)
    return _quantized(found, recipe, size, offline=offline), wanted


def _left_open(found: Chosen, recipe: "Recipe", wanted: Options) -> tuple["Recipe", Options]:
    """Recipe and options as a card's free memory asks for, where nobody named the context."""
    if wanted.context_tokens is not None or wanted.gpu_layers != "auto":
        return recipe, wanted
    from m1local_app import choosing
    from m1local_quantize.recipe import Recipe, shipped_recipes

    choice = choosing.choose(found, wanted.kv_type)
    if choice is None:
        return recipe, wanted
    note(choosing.line(choice))
    taken = choice.setting
    kept: Any = taken.kv_type  # one of the option's
    if choice.recipe in shipped_recipes():
        recipe = Recipe.find(choice.recipe)
    return recipe, replace(wanted, context_tokens=taken.context_tokens, kv_type=kept)


def _check_named(chosen: Chosen, recipe: "Recipe", size: "Size | None", *, named: bool) -> None:
    """Leave with exit code 2 where a recipe is named for what was quantized by another."""
    from m1local.checkpoint import is_quantized
    from m1local.manifest import CheckpointManifest

    if not named or not is_quantized(chosen.folder):
        return
    made_by = CheckpointManifest.read(chosen.folder).recipe
    if recipe.name != made_by or size is not None:
        raise usage_error(
            tr(
                "{folder} was quantized by the recipe {recipe}; leave --recipe out, or name "
                "the original checkpoint.",
                folder=chosen.folder,
                recipe=made_by,
            )
        )


def _quantized(chosen: Chosen, recipe: "Recipe", size: "Size | None", *, offline: bool) -> Chosen:
    """The quantized form of `chosen`, made or fetched now if need be."""
    from m1local.checkpoint import CONFIG, is_quantized
    from m1local.config import M1Config
    from m1local_app.fetching import completed, open_source
    from m1local_app.fitting import fitted_recipe
    from m1local_app.kept import size_text
    from m1local_app.progress import quantize_with_progress

    if is_quantized(chosen.folder):
        return completed(chosen, offline=offline)
    budget, label = None, f"{chosen.label} ({recipe.name})"
    if size is not None:
        budget = size.weights(M1Config.from_file(chosen.folder / CONFIG))
        label = f"{chosen.label} ({recipe.name}, {size_text(budget)})"
    elsewhere = frozenset() if size is None else size.elsewhere
    target = library.kept_folder(chosen, recipe, budget, elsewhere)
    if not (target / MANIFEST).is_file():
        source = chosen if budget is None else _whole(chosen, recipe, offline=offline)
        original = open_source(source, offline=offline)
        if size is not None:
            recipe = fitted_recipe(recipe, original, size)
        quantize_with_progress(original, target, recipe)
    return Chosen(target, label)


def _whole(chosen: Chosen, recipe: "Recipe", *, offline: bool) -> Chosen:
    """`chosen` with all its weights, for a recipe that reads them twice."""
    from m1local_app.fetching import completed

    if chosen.repository is not None and not offline:
        note(
            tr(
                "The recipe {recipe} reads the original twice, so the whole of it is fetched first "
                "and kept; `m1 rm {repository}` deletes it.",
                recipe=recipe.name,
                repository=chosen.repository,
            )
        )
    return completed(chosen, offline=offline)
