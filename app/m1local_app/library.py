"""Which checkpoint a command means, and the ones `m1 run` has made.

What it is: names to folders, and quantizing once what was never quantized. What it is not: a
download; that is fetching.py.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from m1local import home
from m1local.errors import CheckpointError
from m1local.manifest import FORMAT_VERSION
from m1local_app.columns import printable
from m1local_app.language import tr
from m1local_app.options import Chosen
from m1local_quantize.hub import RECORD, Record
from m1local_quantize.recipe import Recipe

ORIGINAL = "baichuan-inc/Baichuan-M1-14B-Instruct"
DEMO_NAME = "m1-tiny"
READ_FILES = ("*.json", "*.safetensors", "tokenizer.model")
SMALL_BYTES = 64 << 20
SHOWN_CHARACTERS = 60


def find(model: str | None) -> Chosen:
    """The folder that `model` names; the built-in demo without a name.

    Raises CheckpointError when there is none.
    """
    if model is None or model == DEMO_NAME:
        if not (home.DEMO / "config.json").is_file():
            raise CheckpointError(
                tr("The built-in demo is missing in {folder}; install again.", folder=home.DEMO)
            )
        return Chosen(home.DEMO, DEMO_NAME)
    folder = _folder(model)
    if folder is not None:
        return Chosen(folder, folder.resolve().name)
    kept = None if "/" in model or "\\" in model else _folder(str(home.models() / model))
    if kept is not None:
        return Chosen(kept, model)
    if is_repository(model):
        record = Record.read(source_folder(model))
        if record is not None and record.complete:
            return Chosen(source_folder(model), model.partition("/")[2])
        raise CheckpointError(
            tr(
                "There is no folder {model}, and no repository of that name was fetched. `m1 run "
                "{model}` fetches and quantizes it; `m1 pull {model}` only fetches.",
                model=model,
            )
        )
    shown = model if len(model) <= SHOWN_CHARACTERS else f"{model[:SHOWN_CHARACTERS]}…"
    raise CheckpointError(
        tr(
            "There is no folder {name}, and no checkpoint of that name in {folder}. Give the "
            "folder of a Baichuan-M1 checkpoint, or nothing for the demo; a question goes after "
            "-p.",
            name=shown,
            folder=home.models(),
        )
    )


def identity(folder: Path) -> str:
    """What tells the checkpoint in `folder` from others of its name: its place, or "m1-tiny".

    What a user accepted and chose is kept by it; a fingerprint would forget both when the folder
    is quantized again. The demo's place is another after each installation.
    """
    if folder == home.DEMO:
        return DEMO_NAME
    place = str(folder.resolve()).encode("utf-8", "backslashreplace").decode("utf-8")
    return printable(place)


def is_repository(model: str) -> bool:
    """Whether `model` has the form of a repository's name, and is no folder."""
    return (
        model.count("/") == 1
        and not model.startswith((".", "/", "~"))
        and "\\" not in model
        and not model.endswith("/")
        and _folder(model) is None
    )


def source_folder(repository: str) -> Path:
    """Where the files of `repository` are kept."""
    return home.sources() / repository.replace("/", "--")


def _folder(name: str) -> Path | None:
    """The folder `name`, or None where there is none, or no such name can be."""
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def kept_folder(
    chosen: Chosen, recipe: Recipe, budget: int | None = None, elsewhere: Collection[str] = ()
) -> Path:
    """Where the checkpoint made from `chosen` by `recipe` is kept under M1_HOME.

    `budget` is how many bytes its weights may take, where the recipe chooses formats by that, but
    for matrices that lie `elsewhere`.

    The name ends in a fingerprint of the recipe's rules, the checkpoint format and the files that
    are read (their content where they are small, else size and time), so that a changed source or
    another of the same name is never mistaken for it. Of a repository, the commit stands for the
    weights, which need not be there any more.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {recipe.method} {recipe.rules}\n".encode())
    name = f"{chosen.label}-{recipe.name}"
    if budget is not None:
        beside = f" {sorted(elsewhere)}" if elsewhere else ""
        digest.update(f"{recipe.candidates} {budget}{beside}\n".encode())
        name += f"-{budget / 2**30:.2f}GiB"
    record = Record.read(chosen.folder)
    if record is not None:
        digest.update(f"{record.repository} {record.revision}\n".encode())
    read = {path for pattern in READ_FILES for path in chosen.folder.glob(pattern)}
    for path in sorted(read):
        if path.name == RECORD or (record is not None and path.suffix == ".safetensors"):
            continue
        status = path.stat()
        digest.update(f"{path.name} {status.st_size}\n".encode())
        small = status.st_size <= SMALL_BYTES
        digest.update(path.read_bytes() if small else f"{status.st_mtime_ns}\n".encode())
    return home.models() / f"{name}-{digest.hexdigest()[:8]}"
