"""What `m1 show` says of a checkpoint.

What it is: facts from its files as aligned lines. What it is not: a check of its weights.
"""

from pathlib import Path

from m1local.checkpoint import CONFIG, is_quantized, parameter_shapes
from m1local.config import M1Config
from m1local.formats import LinearSpec
from m1local.generation_config import GenerationConfig
from m1local.manifest import CheckpointManifest
from m1local_app.language import tr
from m1local_app.notices import medical_notice
from m1local_app.progress import quality_line
from m1local_quantize.card import format_shares

LICENCE_FILES = ("NOTICE", "LICENSE", "LICENSE.txt", "LICENSE.md")


def describe(folder: Path) -> str:
    """Aligned lines about the checkpoint in `folder`; raises CheckpointError for a bad one."""
    config = M1Config.from_file(folder / CONFIG)
    generation = GenerationConfig.from_folder(folder)
    parameters = sum(_size(shape) for shape in parameter_shapes(config).values())
    rows = [("folder", str(folder)), ("parameters", f"{parameters:,}")]
    if is_quantized(folder):
        manifest = CheckpointManifest.read(folder)
        nbytes = sum(r.nbytes for n, r in manifest.files.items() if n.endswith(".safetensors"))
        rows += [
            ("source", manifest.source),
            ("recipe", f"{manifest.recipe} ({manifest.method})"),
            ("formats", _formats(manifest, config)),
            ("made by", f"m1local {manifest.m1local_version}"),
            ("quality", _quality(manifest)),
        ]
    else:
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows.append(("formats", "original, not quantized"))
    rows += [
        ("size", f"{nbytes / 2**20:,.1f} MiB, {8 * nbytes / parameters:.2f} bits per weight"),
        ("layers", _layers(config)),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("use", "chat" if generation.is_chat else "raw completion (a Base model)"),
        ("sampling", _sampling(generation)),
    ]
    notes = [path.name for path in sorted(folder.iterdir()) if path.name in LICENCE_FILES]
    rows.append(("licence", f"see {', '.join(notes)}" if notes else "see the model's source"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


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
        return "not measured; `m1 eval kld` does it"
    return f"{quality_line(manifest.certificate)}, against its original"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _formats(manifest: CheckpointManifest, config: M1Config) -> str:
    shares = format_shares(manifest, config)
    return ", ".join(f"{_spec(spec)} {100 * share:.0f} %" for spec, _, share in shares)


def _spec(spec: LinearSpec) -> str:
    return spec.format if spec.group_size is None else f"{spec.format} g{spec.group_size}"


def _layers(config: M1Config) -> str:
    sliding = len(config.sliding_window_layers)
    return (
        f"{config.num_hidden_layers}: {config.num_hidden_layers - sliding} global, {sliding} "
        f"sliding (window {config.sliding_window:,})"
    )


def _sampling(generation: GenerationConfig) -> str:
    params = generation.sampling
    values = [f"temperature {params.temperature:g}"]
    values += [f"top-k {params.top_k}"] if params.top_k else []
    values += [f"top-p {params.top_p:g}"] if params.top_p < 1 else []
    values += [f"min-p {params.min_p:g}"] if params.min_p else []
    if params.repetition_penalty != 1:
        values.append(f"repeat penalty {params.repetition_penalty:g}")
    return ", ".join(values)
