"""Rows of an embedding, in Triton; its table may lie in pinned host memory.

What it is: kernels that read the rows of tokens whose numbers are on the card, so that the next
step can begin before the host knows the token: of a table in 16 bits, or in any format that the
products know (words.py). A few kilobytes a token come over the bus, and the table need not take
room on the card. What it is not: the module that stands in a model (host_embedding.py).
"""

from itertools import chain

import triton
import triton.language as tl
from torch import Tensor, nn

from m1local.cuda.card import WARPS
from m1local.cuda.matrix import WORD, Matrix
from m1local.cuda.overlap import begun_early, settled
from m1local.cuda.words import load_words, statistics, weight
from m1local.formats.base import QuantizedEmbedding

COLUMNS = 1024  # of a program
_WORD = tl.constexpr(WORD)


@triton.jit
def row_kernel(token_at, table, out, columns, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr):
    """Row `program 1` of out (T, C) becomes its token's row of a table (V, C) in 16 or 32 bits."""
    settled(OVERLAP)
    token = tl.load(token_at + tl.program_id(1)).to(tl.int64)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = at < columns
    found = tl.load(table + token * columns + at, mask=here, other=0.0)
    tl.store(out + tl.program_id(1) * columns + at, found, mask=here)


@triton.jit
def stored_row_kernel(
    token_at, matrix, out, blocks,
    KIND: tl.constexpr, PER_GROUP: tl.constexpr, TILED: tl.constexpr, WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same of a stored matrix."""
    settled(OVERLAP)
    codes, scales, zeros, levels, outer = matrix
    token = tl.load(token_at + tl.program_id(1)).to(tl.int32)
    out += tl.program_id(1) * blocks * 4 * _WORD
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    here = word < blocks * 4
    raw = load_words(codes, levels, token * blocks * 4 + word, here, KIND)
    scale, zero = statistics(
        scales, zeros, outer, token, word // 4, blocks, here, KIND, PER_GROUP, TILED
    )
    for column in tl.static_range(_WORD):
        found = weight(raw, column, scale, zero, levels, KIND)
        tl.store(out + word * _WORD + column, found, mask=here)


class EmbeddingRows:
    """Rows of an embedding (V, C), looked up on the card."""

    def __init__(self, module: nn.Module) -> None:
        """Read the table of `module`."""
        self.module = module
        self.matrix: Matrix | None = None
        if isinstance(module, QuantizedEmbedding):
            self.matrix = module.table.cuda_matrix()

    def write(self, token_ids: Tensor, out: Tensor) -> None:
        """The rows of `token_ids` (T,) into `out` (T, C), which is contiguous."""
        tokens, columns = out.shape
        fixed = {"num_warps": WARPS} | begun_early(out.device)
        grid = (triton.cdiv(columns, COLUMNS), tokens)
        if isinstance(self.module, nn.Embedding):
            row_kernel[grid](token_ids, self.module.weight, out, columns, COLUMNS=COLUMNS, **fixed)
        elif self.matrix is None:  # columns that are no whole blocks, or the host is to do it
            tensors = chain(self.module.parameters(), self.module.buffers())
            out.copy_(self.module(token_ids.to(next(tensors).device)))
        else:
            stored_row_kernel[grid](
                token_ids, self.matrix.tensors, out, self.matrix.blocks,
                KIND=self.matrix.kind, PER_GROUP=self.matrix.per_group,
                TILED=self.matrix.is_tiled, WORDS=COLUMNS // WORD, **fixed,
            )  # fmt: skip
