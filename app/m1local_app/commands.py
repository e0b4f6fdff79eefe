"""The commands of `m1` that deal with checkpoints: made, shown, fetched, listed, checked, measured.

What it is: Typer commands, each only wiring; cli.py joins them to `m1`. torch is imported inside
functions, since `m1 --help` must answer at once. What it is not: where anything is decided.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from m1local_app import library, options
from m1local_app.boundary import ask, usage_error
from m1local_app.language import tr
from m1local_app.options import DEFAULT_RECIPE, quoted


class Measure(StrEnum):
    """What `m1 eval` computes."""

    ppl = "ppl"
    kld = "kld"


if TYPE_CHECKING:
    from m1local_quantize.recipe import Recipe
    from m1local_quantize.source import Source

checkpoints = typer.Typer()


@checkpoints.command()
def quantize(
    source: Annotated[
        str, typer.Argument(help="The original: its folder, or OWNER/NAME on the model hub.")
    ],
    target: Annotated[Path, typer.Argument(help="New folder for the quantized one.")],
    recipe: options.RecipeName = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")
    ] = False,
    text: options.TextFile = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text gptq learns from, .txt or .jsonl; not the one measured on."),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify/--no-certify", help="Measure the result's quality.")
    ] = True,
    offline: options.Offline = False,
    keep_source: options.KeepSource = False,
    revision: options.Revision = None,
    budget: options.Budget = None,
    device: options.Device = None,
    ctx_size: options.ContextSize = None,
    only_say: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")
    ] = False,
) -> None:
    """Turn a 16-bit checkpoint into a 4- or 8-bit one.

    A run that was cut off is continued by the same command.

    Examples:  m1 quantize ./Baichuan-M1-14B-Instruct ./m1-int4 --recipe int4  ·
    m1 quantize ./Baichuan-M1-14B-Instruct ./m1-8gb --recipe fit --for 8GB --ctx-size 8192
    """
    from m1local_app.fetching import fetched, open_source
    from m1local_app.fitting import Size, fitted_recipe
    from m1local_app.progress import dry_run, quantize_with_progress
    from m1local_quantize.recipe import Recipe

    chosen = Recipe.find(recipe or DEFAULT_RECIPE)  # before gigabytes are fetched
    found = fetched(
        source, offline=offline, keep_source=keep_source and not only_say, revision=revision
    )
    original = open_source(found, offline=offline, whole=not only_say)
    from m1local_quantize.target import check_contents  # torch, while the original is being read

    if chosen.candidates or budget is not None or device is not None:
        check_contents(target, overwrite=overwrite or only_say)  # before an hour is spent
        size = Size(budget, device, ctx_size)
        chosen = fitted_recipe(chosen, original, size, calibration=calibration)
    elif calibration is not None:
        _check_that_it_learns(chosen, original)
    if only_say:
        typer.echo(dry_run(original, chosen, calibration))
        return
    try:
        quantize_with_progress(
            original,
            target,
            chosen,
            overwrite=overwrite,
            text=text,
            calibration=calibration,
            certify=certify,
        )
    except KeyboardInterrupt:
        said = tr("{target} is unfinished; the same command continues it.", target=target)
        typer.echo(said, err=True)
        raise
    said = tr("Wrote {target}. Chat with it: m1 chat {name}", target=target, name=quoted(target))
    typer.echo(said, err=True)


def _check_that_it_learns(recipe: "Recipe", original: "Source") -> None:
    """Leave with exit code 2 where `recipe` learns from no text."""
    from m1local_quantize.plan import Plan

    if not Plan.of(original, recipe).needs_calibration:
        raise usage_error(
            tr(
                "the recipe {recipe} learns from no text; leave --calibration out, or take "
                "int4-gptq.",
                recipe=recipe.name,
            )
        )


@checkpoints.command()
def show(model: options.Model = None) -> None:
    """Say what a checkpoint is: origin, formats, size, context, licence.

    Example:  m1 show ./m1-int4
    """
    from m1local_app.describe import describe

    typer.echo(describe(library.find(model).folder))


@checkpoints.command()
def plan(
    model: options.Model = None,
    memory: options.Memory = None,
    speed: options.Bandwidth = None,
    ctx_size: options.PlannedContext = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what fits into this machine's memory, and how fast it can be at most.

    Nothing but the model's config is read.

    Examples:  m1 plan ./Baichuan-M1-14B-Instruct  ·
    m1 plan ./m1-int4 --memory 8GB --bandwidth 360GB/s
    """
    from m1local_app import idle_card, planning

    if memory is None:
        idle_card.tell()
    machine = planning.Machine.found(memory, speed)
    rows = planning.plan(library.find(model).folder, machine, ctx_size)
    show_rows = planning.as_json if as_json else planning.as_text
    typer.echo(show_rows(rows, machine))


@checkpoints.command("pull")
def pull_model(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the model hub.")],
    revision: options.Revision = None,
) -> None:
    """Fetch a model from the hub and check every file; called again, it goes on.

    Example:  m1 pull baichuan-inc/Baichuan-M1-14B-Instruct
    """
    from m1local_app.fetching import pull_with_progress

    if not library.is_repository(repository):
        raise usage_error(
            tr("{repository} is no repository's name; give OWNER/NAME.", repository=repository)
        )
    folder = library.source_folder(repository)
    pull_with_progress(repository, folder, revision=revision)
    said = tr(
        "{folder} holds {repository}. Chat with it: m1 run {repository}",
        folder=folder,
        repository=repository,
    )
    typer.echo(said, err=True)


@checkpoints.command()
def push(
    model: Annotated[str, typer.Argument(help="The quantized checkpoint's folder or name.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the model hub.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who sees a new repository.")
    ] = True,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Publish a quantized checkpoint on the model hub, with a model card; asks first.

    The login is that of `hf auth login`. Called again after a cut, it goes on.

    Example:  m1 push ./m1-int4 me/Baichuan-M1-14B-int4
    """
    from m1local_app.publishing import push as push_checkpoint

    push_checkpoint(library.find(model).folder, repository, private=private, ask=not yes)


@checkpoints.command("list")
def list_kept() -> None:
    """List the checkpoints that are kept: made here by `m1 run`, or pulled from the hub."""
    from m1local_app import kept

    typer.echo(kept.table())


@checkpoints.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="A name that `m1 list` shows.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a kept checkpoint, made here or pulled; what it was made of stays.

    Examples:  m1 rm m1-tiny-int4-1a2b3c4d  ·  m1 rm OWNER/NAME
    """
    from m1local_app import kept

    found = kept.find(name)
    if not yes:
        ask(
            tr("Delete {folder}?", folder=found.folder),
            tr("nobody can be asked here; add --yes to delete for good."),
        )
    freed = kept.size_text(found.remove())
    typer.echo(tr("Deleted {name}: {size} freed.", name=name, size=freed), err=True)


@checkpoints.command()
def verify(model: options.Model = None) -> None:
    """Check every file of a quantized checkpoint against its SHA-256, and its structure.

    Example:  m1 verify ./m1-int4
    """
    from m1local_app.checks import verify_checkpoint

    typer.echo(verify_checkpoint(library.find(model).folder))


@checkpoints.command("eval")
def evaluate(
    measure: Annotated[Measure, typer.Argument(help="ppl or kld.")],
    model: Annotated[str, typer.Argument(help="The checkpoint's folder or name.")],
    source: Annotated[
        str | None, typer.Option("--source", help="kld: the original it was made of.")
    ] = None,
    text: options.TextFile = None,
) -> None:
    """Perplexity of a checkpoint on a text (ppl), or how far it is from its original (kld).

    Examples:  m1 eval ppl ./m1-int4  ·  m1 eval kld ./m1-int4 --source ./Baichuan-M1-14B-Instruct
    """
    from m1local_app.checks import perplexity_line
    from m1local_app.progress import measure_with_progress, quality_line

    folder = library.find(model).folder
    if measure is Measure.ppl and source is not None:
        raise usage_error(tr("ppl compares with nothing: leave --source out, or take kld."))
    if measure is Measure.ppl:
        typer.echo(perplexity_line(folder, text))
        return
    if source is None:
        raise usage_error(tr("kld compares with the original: add --source FOLDER."))
    typer.echo(quality_line(measure_with_progress(library.find(source).folder, folder, text)))


@checkpoints.command()
def bench(
    model: options.Model = None,
    prompts: Annotated[
        str, typer.Option("--prompt-tokens", "-p", metavar="N,…", help="Lengths of prompts.")
    ] = "512",
    answers: Annotated[
        str, typer.Option("--new-tokens", "-n", metavar="N,…", help="Lengths of answers.")
    ] = "64",
    depths: Annotated[
        str, typer.Option("--depth", "-d", metavar="N,…", help="Tokens of context before them.")
    ] = "0",
    repetitions: Annotated[
        int,
        typer.Option("--repetitions", "-r", min=1, metavar="N", help="How often each is measured."),
    ] = 3,
    gpu_layers: options.GpuLayers = "auto",
    kv_type: options.KvType = "f16",
    threads: options.Threads = None,
    output: Annotated[
        Literal["table", "json", "csv"], typer.Option("--output", "-o", help="How it is printed.")
    ] = "table",
) -> None:
    """Measure how fast a checkpoint reads prompts and answers on this machine.

    Examples:  m1 bench ./m1-int4  ·  m1 bench ./m1-int4 -p 128,512 -n 64 -d 0,4096 -o json
    """
    from m1local_app import benchmarking

    folder = library.find(model).folder
    options.use_threads(threads)
    benchmarking.run(
        folder,
        prompts=prompts,
        answers=answers,
        depths=depths,
        repetitions=repetitions,
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        output=output,
    )


@checkpoints.command()
def doctor(
    as_json: options.AsJson = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask whether the hub can be reached.")
    ] = False,
) -> None:
    """Say what this machine has: versions, device, kernels and why, memory, disk, hub.

    Examples:  m1 doctor  ·  m1 doctor --json --offline
    """
    from m1local_app import doctor

    facts = doctor.examine(offline=offline)
    typer.echo(doctor.as_json(facts) if as_json else doctor.as_text(facts))
