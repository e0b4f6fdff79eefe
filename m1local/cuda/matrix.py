"""A stored matrix as the kernels read it.

What it is: views of a format's own tensors, and the numbers that go with them. Scales and zeros of
groups are put into tiles once (`tiled`), as the threads of a warp read them. Where tiles are
decoded for several rows, columns are taken in the order of planes: first all that are a word's
first column, then all second ones, up to the eighth; activations are put into that order
(`planar`), so that both are read in long vectors although the codes stay as stored. What it is
not: a copy; only the few numbers of nested scales, and sixteen levels, are put together anew.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

INT4, INT8, LEVELS, NESTED, INT3, INT5, INT6 = range(
    7
)  # as words.py has them, which cannot be had without Triton
BLOCK = 32  # columns
WORD = 8
TILE_ROWS, TILE_GROUPS = 8, 4
MOST_WHOLE = 127 * 256  # so that both halves fit into a signed byte
MOST_WEIGHTS = 2**31  # places in a matrix are counted in 32 bits


@dataclass(frozen=True, slots=True)
class Matrix:
    """W (N, K): `codes` (N, K/8) words, `scales`, and what the kind besides needs.

    `levels` are those of a kind that has some, or the upper plane of one with two planes;
    `per_group` is how many blocks of 32 columns share a scale; `scales` stands in for what a kind
    does not have. `outer` are the numbers of nested scales (words.py), `table` levels as whole
    numbers (`level_table`), `levels_name` which levels they are. `is_tiled` says that scales and
    zeros lie as `tiled` puts them.
    """

    kind: int
    shape: tuple[int, int]
    per_group: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    levels: Tensor
    outer: Tensor
    table: Tensor
    levels_name: str = ""
    is_tiled: bool = False

    @property
    def rows(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[1]

    @property
    def blocks(self) -> int:
        """Of 32 columns, in a row."""
        return self.shape[1] // BLOCK

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which every kernel takes them."""
        return self.codes, self.scales, self.zeros, self.levels, self.outer

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """What holds codes."""
        return (self.codes, self.levels) if self.kind in (INT3, INT5, INT6) else (self.codes,)

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """Scales, and zeros where there are some."""
        has_zeros = self.zeros.data_ptr() != self.scales.data_ptr()
        return (self.scales, self.zeros) if has_zeros else (self.scales,)


def fits(shape: tuple[int, int]) -> bool:
    """Whether the kernels take a matrix of `shape` (N, K)."""
    return shape[1] % BLOCK == 0 and 0 < shape[0] * shape[1] < MOST_WEIGHTS


def can_be_tiled(statistics: tuple[int, int]) -> bool:
    """Whether numbers (N, groups) are whole tiles."""
    return statistics[0] % TILE_ROWS == 0 and statistics[1] % TILE_GROUPS == 0


def tiled(statistics: Tensor) -> Tensor:
    """Scales or zeros (N, groups), those of a tile of rows and groups one after another.

    A warp reads eight rows at once, of groups of 64 four of each: so they come from one place in
    memory, and else from eight. The shape stays, since nothing is added.
    """
    rows, groups = statistics.shape
    tiles = statistics.reshape(rows // TILE_ROWS, TILE_ROWS, groups // TILE_GROUPS, TILE_GROUPS)
    return tiles.transpose(1, 2).reshape(rows, groups)


def untiled(statistics: Tensor) -> Tensor:
    """What `tiled` was given."""
    rows, groups = statistics.shape
    tiles = statistics.reshape(rows // TILE_ROWS, groups // TILE_GROUPS, TILE_ROWS, TILE_GROUPS)
    return tiles.transpose(1, 2).reshape(rows, groups)


def int4_matrix(
    codes: Tensor, scales: Tensor, zeros: Tensor, shape: tuple[int, int], group_size: int
) -> Matrix:
    """Groups of four bits as m1local/formats/groups.py stores them."""
    words = codes.view(torch.int32)
    per_group = group_size // BLOCK
    return Matrix(INT4, shape, per_group, words, scales, zeros, scales, scales, scales)


def planes_matrix(
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    shape: tuple[int, int],
    group_size: int,
    planes: tuple[int, int],
) -> Matrix:
    """Groups whose codes lie in two planes of so many bits, as groups.py stores them."""
    kind = {(2, 1): INT3, (4, 1): INT5, (4, 2): INT6}[planes]
    low = codes.view(torch.int16 if planes[0] == 2 else torch.int32)
    high = upper.view(torch.int16) if planes[1] == 2 else upper
    return Matrix(kind, shape, group_size // BLOCK, low, scales, zeros, high, scales, scales)


def int8_matrix(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Matrix:
    """Rows of bytes as m1local/formats/int8.py stores them."""
    words = codes.view(torch.int64)
    return Matrix(INT8, shape, 1, words, scales, scales, scales, scales, scales)


def levels_matrix(
    codes: Tensor,
    scales: Tensor,
    levels: Tensor,
    shape: tuple[int, int],
    block_size: int,
    name: str,
) -> Matrix:
    """Sixteen `levels` (16,) with a float32 for each block, as bitsandbytes stores NF4 and FP4."""
    words = codes.view(shape[0], shape[1] // 2).view(torch.int32)
    table = level_table(levels)
    per_group = block_size // BLOCK
    return Matrix(LEVELS, shape, per_group, words, scales, scales, levels, scales, table, name)


def nested_matrix(
    codes: Tensor,
    scales: Tensor,
    levels: Tensor,
    shape: tuple[int, int],
    block_size: int,
    *,
    scale_levels: Tensor,
    scale_scales: Tensor,
    offset: float,
    name: str,
) -> Matrix:
    """The same with scales in 8 bits: level (256,) times a float32 for each 256, plus `offset`."""
    middle = scale_levels.new_tensor([offset])
    outer = torch.cat((scale_levels.float(), middle.float(), scale_scales.float()))
    words = codes.view(shape[0], shape[1] // 2).view(torch.int32)
    table = level_table(levels)
    per_group = block_size // BLOCK
    return Matrix(NESTED, shape, per_group, words, scales, scales, levels, outer, table, name)


def level_table(levels: Tensor) -> Tensor:
    """Sixteen levels as whole numbers of 16 bits: (9,) int32.

    Their upper bytes, their lower ones, and the bits of the float32 by which they are multiplied,
    256 times over since a product leaves its last eight bits out (row_sums.py).
    """
    greatest = levels.float().abs().max()
    whole = (levels.float() * (MOST_WHOLE / greatest)).round().int()
    upper = (whole + 128) >> 8
    halves = torch.cat((upper, whole - 256 * upper)).to(torch.int8).view(torch.int32)
    unit = (greatest * (256 / MOST_WHOLE)).reshape(1).view(torch.int32)
    return torch.cat((halves, unit))


def planar(x: Tensor) -> Tensor:
    """x (M, K) with its columns in the order of planes: (M, K), contiguous."""
    rows, columns = x.shape
    return x.reshape(rows, columns // WORD, WORD).transpose(1, 2).reshape(rows, columns)
