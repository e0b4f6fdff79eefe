"""Memory for results, used again as soon as nothing holds a result any more.

What it is: for what is computed and written piece by piece, thousands of times. The allocator would
give each megabyte back to the system, which clears it for the next piece: a tenth of the time that
quantizing takes. What it is not: a cache that grows; it holds as much as was in use at once.
"""

import ctypes
import math
import weakref
from collections import defaultdict

import torch
from torch import Tensor

SMALLEST, LARGEST = 1 << 16, 1 << 23  # bytes of a result that are worth it, and that are kept

_free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by their bytes, a power of two


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on the CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= nbytes <= LARGEST:
        return torch.empty(shape, dtype=dtype)
    size = 1 << (nbytes - 1).bit_length()
    try:
        block = _free[size].pop()
    except IndexError:
        block = torch.empty(size, dtype=torch.uint8)
    # The tensor and all its views hold this; when the last of them goes, the block is free.
    held = (ctypes.c_ubyte * nbytes).from_address(block.data_ptr())
    weakref.finalize(held, _free[size].append, block).atexit = False
    return torch.frombuffer(held, dtype=dtype).view(shape)
