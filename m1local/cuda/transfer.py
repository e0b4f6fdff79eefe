"""From a mapped file to the card, through two pinned buffers.

What it is: while the card fetches one buffer over the bus, the next part is read from the file into
the other, so that disk and bus work at once and no weight is in the computer's memory twice. What
it is not: a conversion; every tensor arrives as it is stored.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

BUFFER_BYTES = 32 << 20
LEAST_BYTES = 1 << 20  # below, a buffer gains nothing


@dataclass(slots=True)
class Moved:
    """What was moved so far."""

    nbytes: int = 0
    seconds: float = 0.0


class Transfer:
    """Moves tensors to one device."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Allocate the buffers, pinned where `device` is a card."""
        self.device = device
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
        if tensor.numel() * tensor.element_size() < LEAST_BYTES:
            return tensor.to(self.device)
        target = torch.empty_like(tensor, device=self.device)
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
