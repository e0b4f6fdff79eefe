"""What to say when a card has no room: before anything is read, or when something fails after all.

What it is: errors that name the next setting to try. What it is not: the plan (memory.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from m1local.errors import MemoryLimitError
from m1local.memory import Model, Setting

AUTO = "--gpu-layers auto, which leaves as many layers to the CPU as it must"


def check(model: Model, setting: Setting, device: torch.device, free: int) -> None:
    """Raise MemoryLimitError unless `setting` fits into `free` bytes of `device`.

    It says what is needed, what there is, and the next setting to try.
    """
    needed = model.demand(setting, device).device
    if needed > free:
        raise MemoryLimitError(
            f"{needed / 2**30:.1f} GiB are needed on the card, {free / 2**30:.1f} GiB are free. "
            f"Try {next_step(setting) if setting.gpu_layers is not None else AUTO}."
        )


def next_step(setting: Setting) -> str:
    """What to try when `setting` did not fit after all, as words with an option."""
    layers = setting.gpu_layers
    if setting.context_tokens > 2048:
        return f"a smaller context: --ctx-size {max(2048, setting.context_tokens // 2)}"
    if layers is None or layers > 0:
        fewer = "0" if layers is not None and layers < 8 else str((layers or 40) - 8)
        return f"fewer layers on the card: --gpu-layers {fewer}"
    return "closing other programs, or a checkpoint of fewer bits (m1 plan shows them)"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a card had no room, whoever asked: torch's allocator, the driver, Triton or cuBLAS.

    Only the first has an exception of its own.
    """
    said = str(error)
    of_driver = "CUDA" in said and "out of memory" in said
    return isinstance(error, torch.OutOfMemoryError) or of_driver or "ALLOC_FAILED" in said


@contextmanager
def telling(setting: Setting) -> Iterator[None]:
    """Turn a failed allocation into a message that names the next setting to try."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        raise MemoryLimitError(
            f"The card's memory is used up ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are "
            f"free). What was said is kept. Try {next_step(setting)}."
        ) from error
