"""Whether the Triton kernels can be used, and if not, why.

What it is: one answer for formats, the decode step and `m1 doctor`. Triton is imported only where
there is a card, and then a small product is tried (trial.py). What it is not: a check of the other
kernels; one that cannot be launched says so when it is.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from m1local.cuda.card import OLDEST, card

SAID = 160  # characters of an error
NEEDED = (
    "try pip install -U triton-windows"
    if sys.platform == "win32"
    else "it takes a C compiler and Python's headers (apt install gcc python3-dev)"
)


@cache
def missing(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on `device`, in words; None where they do."""
    if device.type != "cuda":
        return f"the kernels are for CUDA, not {device.type}"
    if torch.version.hip:
        return "the kernels are for NVIDIA's cards"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Windows triton-windows)"
    capability = card(device).capability
    if capability < OLDEST:
        return "compute capability {}.{} is older than {}.{}".format(*capability, *OLDEST)
    try:
        right: bool = import_module("m1local.cuda.trial").is_right(device)
    except Exception as error:  # of a compiler, a linker, a driver: any leaves torch's own ways
        said = (str(error) or type(error).__name__).splitlines()[0]
        return f"Triton cannot launch a kernel; {NEEDED}: {said[:SAID]}"
    return None if right else "Triton's kernels multiply wrongly here; try another version of it"


def usable(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    return missing(device) is None
