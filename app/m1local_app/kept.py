"""The checkpoints kept under M1_HOME: what `m1 list` shows and `m1 rm` deletes.

What it is: names, sizes and quality from their manifests, of those made here and of those pulled
from the hub, originals included. What it is not: a look at anything outside M1_HOME; a folder of
one's own is deleted by its owner.
"""

from dataclasses import dataclass
from pathlib import Path

from m1local import home
from m1local.errors import CheckpointError
from m1local.manifest import NAME as MANIFEST
from m1local.manifest import CheckpointManifest
from m1local_app import columns, library
from m1local_app.language import series, tr
from m1local_quantize.hub import Record, remove_fetched

Cells = tuple[str, str, str, str, str, str]


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept checkpoint, finished or not; `record` says of what repository it was pulled."""

    name: str  # what commands and page call it
    folder: Path
    record: Record | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it is quantized, and whole."""
        whole = self.record is None or self.record.complete
        return whole and (self.folder / MANIFEST).is_file()

    def remove(self) -> int:
        """Delete it; returns the bytes that were freed.

        Raises StorageError or HubError where something else lies there or a run uses it.
        """
        if self.record is not None:
            return remove_fetched(self.folder)
        from m1local_quantize.target import remove_checkpoint

        return remove_checkpoint(self.folder)


def checkpoints() -> list[Kept]:
    """All kept checkpoints: those made here by name, then those pulled by repository."""
    made = [Kept(folder.name, folder) for folder in _folders(home.models())]
    pulled = []
    for folder in _folders(home.sources()):
        record = Record.read(folder)
        if record is None or library.source_folder(record.repository) != folder:
            continue  # no command finds it
        if _has_weights(folder):  # else a source that was dropped: a few small files
            pulled.append(Kept(record.repository, folder, record))
    return made + sorted(pulled, key=lambda kept: kept.name)


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _has_weights(folder: Path) -> bool:
    partial = (folder / ".cache").rglob("*.incomplete")
    return any(folder.glob("*.safetensors")) or any(path.stat().st_size for path in partial)


def table() -> str:
    """One aligned line for each kept checkpoint; a sentence where there is none."""
    rows = [_row(kept) for kept in checkpoints()]
    if not rows:
        return tr(
            "Nothing is kept in {folder} yet; `m1 run` and `m1 pull` keep what they make there.",
            folder=home.home(),
        )
    heads = (tr("NAME"), tr("ORIGIN"), tr("SIZE"), tr("RECIPE"), tr("KL"), tr("SAME TOP TOKEN"))
    return columns.aligned([heads, *rows])


def find(name: str) -> Kept:
    """The kept checkpoint `name`; raises CheckpointError where there is none."""
    known = checkpoints()
    for kept in known:
        if kept.name == name:
            return kept
    raise CheckpointError(
        tr(
            "No checkpoint {name} is kept in {folder}; there is {known}.",
            name=name,
            folder=home.home(),
            known=series(kept.name for kept in known) or tr("none"),
        )
    )


def size_text(nbytes: int) -> str:
    """Bytes for a person."""
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{nbytes / 2**20:.1f} MiB"


def _row(kept: Kept) -> Cells:
    folder = kept.folder
    size = size_text(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    origin = tr("made here") if kept.record is None else tr("pulled")
    begun = (kept.name, origin, size)
    if kept.record is not None and not kept.record.complete:
        return (*begun, tr("unfinished"), "", "")
    if not (folder / MANIFEST).is_file():
        return (*begun, tr("unfinished") if kept.record is None else tr("original"), "", "")
    try:
        manifest = CheckpointManifest.read(folder)
    except CheckpointError:
        return (*begun, tr("damaged"), "", "")
    if manifest.certificate is None:
        return (*begun, manifest.recipe, "", "")
    kl, agreement = manifest.certificate["mean_kl"], manifest.certificate["top1_agreement"]
    return (*begun, manifest.recipe, f"{kl:.4f}", f"{float(agreement):.1%}")
