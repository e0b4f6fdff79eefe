"""What `m1 show` says of a checkpoint.

What it is: facts from its files as aligned lines. What it is not: a check of its weights.
"""

from pathlib import Path

from m1local.checkpoint import CONFIG, is_quantized, parameter_shapes
from m1local.config import M1Config
from m1local.formats import LinearSpec
from m1local.generation_config import GenerationConfig
from m1local.manifest import CheckpointManifest
from m1local_app.columns import aligned
from m1local_app.language import series, tr
from m1local_app.notices import medical_notice
from m1local_app.progress import quality_line
from m1local_quantize.card import format_shares

LICENCE_FILES = ("NOTICE", "LICENSE", "LICENSE.txt", "LICENSE.md")


def describe(folder: Path) -> str:
    """Aligned lines about the checkpoint in `folder`; raises CheckpointError for a bad one."""
    return aligned(facts(folder))


def facts(folder: Path) -> list[tuple[str, str]]:
    """The same as names and values."""
    config = M1Config.from_file(folder / CONFIG)
    generation = GenerationConfig.from_folder(folder)
    parameters = sum(_size(shape) for shape in parameter_shapes(config).values())
    rows = [(tr("folder"), str(folder)), (tr("parameters"), f"{parameters:,}")]
    if is_quantized(folder):
        manifest = CheckpointManifest.read(folder)
        nbytes = sum(r.nbytes for n, r in manifest.files.items() if n.endswith(".safetensors"))
        rows += [
            (tr("source"), manifest.source),
            (tr("recipe"), f"{manifest.recipe} ({manifest.method})"),
            (tr("formats"), _formats(manifest, config)),
            (tr("made by"), f"m1local {manifest.m1local_version}"),
            (tr("quality"), _quality(manifest)),
        ]
    else:
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows.append((tr("formats"), tr("original, not quantized")))
    use = tr("chat") if generation.is_chat else tr("raw completion (a Base model)")
    rows += [
        (tr("size"), _weight(nbytes, parameters)),
        (tr("layers"), _layers(config)),
        (tr("context"), tr("{count:,} tokens", count=config.max_position_embeddings)),
        (tr("use"), use),
        (tr("sampling"), _sampling(generation)),
    ]
    notes = [path.name for path in sorted(folder.iterdir()) if path.name in LICENCE_FILES]
    found = tr("see {files}", files=series(notes)) if notes else tr("see the model's source")
    return [*rows, (tr("licence"), found)]


def formats(folder: Path) -> frozenset[str]:
    """The formats of the matrices of the checkpoint in `folder`; none of an original's."""
    if not is_quantized(folder):
        return frozenset()
    return frozenset(spec.format for spec in CheckpointManifest.read(folder).linears.values())


def licence(folder: Path) -> str:
    """The licence texts that came with the checkpoint in `folder`, and the medical notice."""
    texts = [
        path.read_text(encoding="utf-8", errors="replace").strip()
        for path in sorted(folder.iterdir())
        if path.name in LICENCE_FILES
    ]
    none = tr("The checkpoint came without a licence; see where it is from.")
    return "\n\n".join([*(texts or [none]), medical_notice()])


def quality(folder: Path) -> str:
    """What quantizing has cost, by the certificate in the manifest."""
    if not is_quantized(folder):
        return tr("This is an original, not quantized.")
    return _quality(CheckpointManifest.read(folder))


def _quality(manifest: CheckpointManifest) -> str:
    if manifest.certificate is None:
        return tr("not measured; `m1 eval kld` does it")
    return tr("{quality}, against its original", quality=quality_line(manifest.certificate))


def _weight(nbytes: int, parameters: int) -> str:
    return tr(
        "{size:,.1f} MiB, {bits:.2f} bits per weight",
        size=nbytes / 2**20,
        bits=8 * nbytes / parameters,
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _formats(manifest: CheckpointManifest, config: M1Config) -> str:
    shares = format_shares(manifest, config)
    return series(
        tr("{format} {percent:.0f} %", format=_spec(spec), percent=100 * share)
        for spec, _, share in shares
    )


def _spec(spec: LinearSpec) -> str:
    return spec.format if spec.group_size is None else f"{spec.format} g{spec.group_size}"


def _layers(config: M1Config) -> str:
    sliding = len(config.sliding_window_layers)
    return tr(
        "{layers}: {full} global, {sliding} sliding (window {window:,})",
        layers=config.num_hidden_layers,
        full=config.num_hidden_layers - sliding,
        sliding=sliding,
        window=config.sliding_window,
    )


def _sampling(generation: GenerationConfig) -> str:
    params = generation.sampling
    values = [tr("temperature {value:g}", value=params.temperature)]
    values += [f"top-k {params.top_k}"] if params.top_k else []
    values += [f"top-p {params.top_p:g}"] if params.top_p < 1 else []
    values += [f"min-p {params.min_p:g}"] if params.min_p else []
    if params.repetition_penalty != 1:
        values.append(tr("repeat penalty {value:g}", value=params.repetition_penalty))
    return series(values)
