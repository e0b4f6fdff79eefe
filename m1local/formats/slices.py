"""A matrix in slices of rows: worked on by several threads, had back in order.

What it is: the threads of everything that is done to one matrix at a time. What it is not: the
work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ROWS_QUANTIZED = 64  # at a time: quantizing holds several copies of a slice, in 32 bits
AHEAD = 2  # slices that a thread may be ahead of whoever takes the results


def for_slices(work: Callable[[int, int], T], rows: int, rows_per_slice: int) -> list[T]:
    """`work(start, stop)` for all slices of so many rows; their results in order."""
    return list(in_order(work, slices_of(rows, rows_per_slice)))


def slices_of(rows: int, rows_per_slice: int) -> list[tuple[int, int]]:
    """Where slices of so many rows start and stop."""
    return [(at, min(at + rows_per_slice, rows)) for at in range(0, rows, rows_per_slice)]


def in_order(
    work: Callable[[int, int], T], slices: Sequence[tuple[int, int]], threads: int | None = None
) -> Iterator[T]:
    """`work(start, stop)` for all `slices`: results in order, a few of them before they are due.

    They go to as many threads as torch has, or to none but the caller's where `threads` is 1. Each
    computes alone: torch's own threads would wait for each other after every small operation, most
    of the time where another program uses a core too.
    """
    count = torch.get_num_threads()
    if count == 1 or threads == 1:
        yield from (work(*part) for part in slices)
        return
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    begun: deque[Future[T]] = deque()
    try:
        for part in slices:
            begun.append(pool.submit(work, *part))
            if len(begun) > AHEAD * count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)  # which the pool's threads changed for those begun later


def joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same name, one below the other."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            found.setdefault(name, []).append(tensor)
    return {
        name: several[0] if len(several) == 1 else torch.cat(several)
        for name, several in found.items()
    }
