"""From a mapped file to the card, through two pinned buffers, into one allocation.

What it is: while the card fetches one buffer over the bus, the next part is read from the file into
the other, so that disk and bus work at once and no weight is in the computer's memory twice. On the
card all lie in one allocation, since torch's allocator leaves a gap behind each. What it is not: a
conversion; every tensor arrives as it is stored.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUFFER_BYTES = 32 << 20
LEAST_BYTES = 1 << 20  # below, a buffer gains nothing
ALIGNMENT = 256  # bytes


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes of an allocation that it shares."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Shared:
    """One allocation for many tensors."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        """Allocate, each tensor counted as it is `aligned`."""
        self.device = device
        self._left = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An empty tensor; of its own memory where no room is left."""
        size = math.prod(shape) * dtype.itemsize
        if aligned(size) > self._left.numel():
            return torch.empty(shape, dtype=dtype, device=self.device)
        found, self._left = self._left[:size], self._left[aligned(size) :]
        return found.view(dtype).view(shape)


@dataclass(slots=True)
class Moved:
    """What was moved so far."""

    nbytes: int = 0
    seconds: float = 0.0


class Transfer:
    """Moves tensors to one device."""

    def __init__(
        self, device: torch.device, nbytes: int = 0, *, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        """Allocate the buffers, pinned where `device` is a card, and room for `nbytes` there."""
        self.device, self._shared = device, Shared(device, nbytes)
        self.moved = Moved()
        pinned = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        ]
        self._free: list[torch.cuda.Event | None] = [None, None]

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, with the same shape and values; contiguous."""
        begun = time.perf_counter()
        found = self._move(tensor.contiguous())
        self.moved.nbytes += tensor.numel() * tensor.element_size()
        self.moved.seconds += time.perf_counter() - begun
        return found

    def finish(self) -> Moved:
        """Wait for what is under way; returns what was moved."""
        begun = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.moved.seconds += time.perf_counter() - begun
        return self.moved

    def _move(self, tensor: Tensor) -> Tensor:
        target = self._shared.take(tensor.shape, tensor.dtype)
        if tensor.numel() * tensor.element_size() < LEAST_BYTES:
            return target.copy_(tensor)
        source, arriving = (part.view(-1).view(torch.uint8) for part in (tensor, target))
        for start in range(0, source.numel(), self._buffers[0].numel()):
            turn = start // self._buffers[0].numel() % 2
            free = self._free[turn]
            if free is not None:
                free.synchronize()
            part = source[start : start + self._buffers[turn].numel()]
            buffer = self._buffers[turn][: part.numel()]
            buffer.copy_(part)
            arriving[start : start + part.numel()].copy_(buffer, non_blocking=True)
            if self.device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                self._free[turn] = event
        return target
