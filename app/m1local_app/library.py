"""Which checkpoint a command means, and the ones `m1 run` has made.

What it is: names to folders, and quantizing once what was never quantized. What it is not: a
download; that is one line of advice until it is built.
"""

import hashlib
from pathlib import Path

from m1local import home
from m1local.errors import CheckpointError
from m1local_app.options import Chosen

ORIGINAL = "baichuan-inc/Baichuan-M1-14B-Instruct"
DEMO_NAME = "m1-tiny"
SMALL_BYTES = 64 << 20


def find(model: str | None) -> Chosen:
    """The folder that `model` names; the built-in demo without a name.

    Raises CheckpointError when there is none.
    """
    if model is None or model == DEMO_NAME:
        if not (home.DEMO / "config.json").is_file():
            raise CheckpointError(f"The built-in demo is missing in {home.DEMO}; install again.")
        return Chosen(home.DEMO, DEMO_NAME)
    if Path(model).expanduser().is_dir():
        return Chosen(Path(model).expanduser(), Path(model).expanduser().resolve().name)
    kept = home.models() / model
    if "/" not in model and "\\" not in model and kept.is_dir():
        return Chosen(kept, model)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"There is no folder {model}. If it is a repository of the model hub, fetch it first: "
            f"`hf download {model} --local-dir {model.split('/')[1]}`, then name that folder."
        )
    raise CheckpointError(
        f"There is no folder {model}, and no checkpoint of that name in {home.models()}. Give the "
        "folder of a Baichuan-M1 checkpoint, or nothing for the built-in demo."
    )


def kept_folder(chosen: Chosen, recipe: str) -> Path:
    """Where the checkpoint made from `chosen` by `recipe` is kept under M1_HOME.

    The name ends in a fingerprint of the source's files (their content where they are small, else
    size and time), so that a changed source or another of the same name is never mistaken for it.
    """
    digest = hashlib.sha256()
    for path in sorted(chosen.folder.iterdir()):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size}\n".encode())
            small = status.st_size <= SMALL_BYTES
            digest.update(path.read_bytes() if small else f"{status.st_mtime_ns}\n".encode())
    recipe_path = Path(recipe)
    if recipe_path.is_file():
        digest.update(recipe_path.read_bytes())
    return home.models() / f"{chosen.label}-{recipe_path.stem}-{digest.hexdigest()[:8]}"
