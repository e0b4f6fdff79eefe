"""Reading memory as fast as it comes, in the compiled library.

What it is: all words of a tensor read once, which is what the bandwidth is measured by
(m1local/memory.py). What it is not: needed for any answer.
"""

import ctypes

import torch
from torch import Tensor

from m1local.native.library import address, library


def read_through(words: Tensor) -> bool:
    """Read all of `words` (n,) int64 once, on as many threads as torch has; whether it was done."""
    compiled = library()
    if compiled is not None:
        count = ctypes.c_int64(words.numel())
        compiled.m1_read(address(words), count, torch.get_num_threads())
    return compiled is not None
