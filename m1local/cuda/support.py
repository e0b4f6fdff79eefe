"""Whether the Triton kernels can be used, and if not, why.

What it is: one answer for formats, the decode step and `m1 doctor`, asked without importing Triton.
What it is not: a check of the card itself; a kernel that fails says so when it is launched.
"""

from functools import cache
from importlib.util import find_spec

import torch

from m1local.cuda.card import OLDEST, card


@cache
def missing(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on `device`, in words; None where they do."""
    if device.type != "cuda":
        return f"the kernels are for CUDA, not {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Windows triton-windows)"
    capability = card(device).capability
    if capability < OLDEST:
        return "compute capability {}.{} is older than {}.{}".format(*capability, *OLDEST)
    return None


def usable(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    return missing(device) is None
