"""The checkpoints kept under M1_HOME: what `m1 list` shows and `m1 rm` deletes.

What it is: names, sizes and quality from their manifests. What it is not: a look at anything
outside M1_HOME; a folder of one's own is deleted by its owner.
"""

from pathlib import Path

from m1local import home
from m1local.errors import CheckpointError
from m1local.manifest import NAME as MANIFEST
from m1local.manifest import CheckpointManifest
from m1local_app import columns
from m1local_app.language import series, tr


def folders() -> list[Path]:
    """The folders of all kept checkpoints, finished or not, by name."""
    models = home.models()
    return sorted(path for path in models.iterdir() if path.is_dir()) if models.is_dir() else []


def table() -> str:
    """One aligned line for each kept checkpoint; a sentence where there is none."""
    rows = [_row(folder) for folder in folders()]
    if not rows:
        return tr(
            "Nothing is kept in {folder} yet; `m1 run` keeps what it makes there.",
            folder=home.models(),
        )
    heads = (tr("NAME"), tr("SIZE"), tr("RECIPE"), tr("KL"), tr("SAME TOP TOKEN"))
    return columns.aligned([heads, *rows])


def find(name: str) -> Path:
    """The folder of the kept checkpoint `name`; raises CheckpointError where there is none."""
    for folder in folders():
        if folder.name == name:
            return folder
    raise CheckpointError(
        tr(
            "No checkpoint {name} is kept in {folder}; there is {known}.",
            name=name,
            folder=home.models(),
            known=series(folder.name for folder in folders()) or tr("none"),
        )
    )


def size_text(nbytes: int) -> str:
    """Bytes for a person."""
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{nbytes / 2**20:.1f} MiB"


def _row(folder: Path) -> tuple[str, str, str, str, str]:
    size = size_text(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))
    if not (folder / MANIFEST).is_file():
        return (folder.name, size, tr("unfinished"), "", "")
    try:
        manifest = CheckpointManifest.read(folder)
    except CheckpointError:
        return (folder.name, size, tr("damaged"), "", "")
    if manifest.certificate is None:
        return (folder.name, size, manifest.recipe, "", "")
    kl, agreement = manifest.certificate["mean_kl"], manifest.certificate["top1_agreement"]
    return (folder.name, size, manifest.recipe, f"{kl:.4f}", f"{float(agreement):.1%}")
