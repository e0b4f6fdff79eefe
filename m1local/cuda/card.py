"""The graphics card, and the sizes of the pieces of work that suit it.

What it is: what the kernels must know of a card, and a table of configurations by its compute
capability, chosen here because Triton's own tuning needs the card at hand. What it is not:
measured, but for 9.0; the table follows from how many threads and registers a multiprocessor has.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

WARPS = 4
MOST_KEY_PARTS = 64
WEIGHTS_RESTORED = 5 << 16  # at a time for each multiprocessor: 640 KiB in 16 bits
CACHE_SHARE = 4  # of the second cache; what is read meanwhile should not push it out
SMALL_CARD = 32  # multiprocessors of one that is not there
WIDE = 128  # a head; wider ones take twice the room


class RowShape(NamedTuple):
    """A program that multiplies one row of activations: `groups` times `turns` warps.

    A group has sixteen rows of W, or eight of gate and eight of up; its warps take turns along the
    columns. `python -m bench.gpu --parts shapes` measures others.
    """

    groups: int
    turns: int

    @property
    def warps(self) -> int:
        """Of a program."""
        return self.groups * self.turns


class Tiles(NamedTuple):
    """Sizes for one compute capability.

    `tile_rows`, `tile_words`: of W, in units of eight columns, for several rows of activations, up
    to `most_rows` of them; above, restoring W once costs less than decoding it for each tile.
    `vector`, `gated` and `added`: the programs of these kernels (one_row.py).
    `resident`: programs of 128 threads that a multiprocessor holds with some 70 registers.
    `keys` that one step of attention looks at, with `key_warps`;
    `queries` of a prompt that look together, with `query_warps`. `byte_queries` and
    `byte_query_warps` are the same where keys and values are in bytes.
    """

    tile_rows: int
    tile_words: int
    # On an H200, 8 turns instead of 4 take 28.8 us instead of 39.4 for o_proj and down, whose rows
    # are few, and 38.4 instead of 36.8 for gate and up; several groups have not been measured.
    vector: RowShape = RowShape(1, 4)
    gated: RowShape = RowShape(1, 4)
    added: RowShape = RowShape(1, 8)
    resident: int = 7
    most_rows: int = 64
    keys: int = 32
    key_warps: int = WARPS
    queries: int = 64
    query_warps: int = 8
    byte_queries: int = 32
    byte_query_warps: int = WARPS

    def over(self, *, in_bytes: bool) -> "Tiles":
        """These, or those for keys and values in bytes, which take registers to restore."""
        if not in_bytes:
            return self
        return self._replace(
            keys=16,
            key_warps=8,
            queries=self.byte_queries,
            query_warps=self.byte_query_warps,
        )

    def queries_of(self, width: int) -> int:
        """How many queries of heads of `width` fit into shared memory with their keys."""
        return self.queries if width <= WIDE else max(16, self.queries // 2)


TILES = {
    # Triton's dot does not use the tensor cores of 7.5, and less fits into its shared memory.
    (7, 5): Tiles(
        tile_rows=32,
        tile_words=16,
        most_rows=16,
        keys=16,
        key_warps=8,
        queries=16,
        byte_queries=16,
        byte_query_warps=8,
    ),
    (8, 0): Tiles(tile_rows=64, tile_words=16),
    (8, 6): Tiles(tile_rows=64, tile_words=16),
    (8, 9): Tiles(tile_rows=64, tile_words=16),
    (9, 0): Tiles(tile_rows=64, tile_words=16),
    (12, 0): Tiles(tile_rows=64, tile_words=16),
}
OLDEST = min(TILES)


@dataclass(frozen=True, slots=True)
class Card:
    """A card's compute capability, number of multiprocessors and second cache."""

    capability: tuple[int, int]
    multiprocessors: int
    second_cache: int = 0  # bytes

    @property
    def tiles(self) -> Tiles:
        """The configuration of the nearest capability that is not newer."""
        known = [capability for capability in TILES if capability <= self.capability]
        return TILES[max(known, default=OLDEST)]

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: bfloat16 from 8.0 on, float16 before."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may begin while the one before it ends: from 9.0 on."""
        return self.capability >= (9, 0)

    @property
    def ahead(self) -> int:
        """Bytes of weights that are asked for before their kernel begins (ahead.py)."""
        return self.second_cache // CACHE_SHARE

    @property
    def has_small_pieces(self) -> bool:
        """Whether its tensor cores take bytes in quarters of what those from 8.0 on take."""
        return self.capability < (8, 0)

    def column_parts(self, programs: int, steps: int, running: int | None = None) -> int:
        """Into how many parts the columns are split so that `programs` times it fill the card.

        `steps` is how many there can be; the card runs so many programs at a time, by default
        those of four warps. More parts than needed would only add sums.
        """
        return _column_parts(running or self.resident(WARPS), programs, steps)

    def resident(self, warps: int, of_four: int | None = None) -> int:
        """How many programs of so many warps the card runs at a time.

        `of_four` is how many of four warps a multiprocessor holds; by default as the table says.
        """
        return self.multiprocessors * max(1, (of_four or self.tiles.resident) * WARPS // warps)

    def restored_weights(self) -> int:
        """How many weights are restored at a time for a prompt: the product should fill the card.

        A slice of so many is some 60 rows of 5120 columns for each multiprocessor, two tiles of
        cuBLAS' with 512 tokens.
        """
        return self.multiprocessors * WEIGHTS_RESTORED

    def key_parts(self, kv_heads: int) -> int:
        """Into how many parts the keys of one layer are split: a power of two."""
        wanted = max(1, 2 * self.multiprocessors // kv_heads)
        return min(MOST_KEY_PARTS, 1 << (wanted.bit_length() - 1))


@cache
def _column_parts(resident: int, programs: int, steps: int) -> int:
    """The parts with which `resident` programs at a time are done first; the fewest of such.

    They come in waves, and the last wave is seldom full: each takes as long as its steps, and about
    one more to begin and to sum. So two halves of a wave that is nearly full would take longer.
    """

    def taken(parts: int) -> int:
        return -(-programs * parts // resident) * (-(-steps // parts) + 1)

    parts = min(range(1, steps + 1), key=taken)
    return -(-steps // -(-steps // parts))  # no part without a step


def restored_weights(device: torch.device) -> int:
    """Of `device`, or of a small card where it is one that is not there, as `m1 plan` may ask."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return Card((8, 6), SMALL_CARD).restored_weights()
    return card(device).restored_weights()


@cache
def is_served(device: torch.device) -> bool:
    """Whether torch was built with code for the card: newer builds leave the oldest ones out.

    Code for a major version serves its later minor ones, and what is still to be compiled for the
    card ("compute_90") any newer (torch/cuda/__init__.py, `_check_cubins`).
    """
    found = torch.cuda.get_device_capability(device)
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    for kind, major, minor in built:
        of = int(major), int(minor)
        if of <= found and (kind == "compute" or of[0] == found[0]):
            return True
    return not built


@cache
def card(device: torch.device) -> Card:
    """The card behind `device`; for the CPU, in tests, a small imagined one."""
    if device.type != "cuda":
        return Card((8, 9), 4, 4096 * CACHE_SHARE)
    found = torch.cuda.get_device_properties(device)
    return Card((found.major, found.minor), found.multi_processor_count, found.L2_cache_size)
