"""The embedding of one token, in Triton; its table may lie in pinned host memory.

What it is: a kernel that reads the row of a token whose number is on the card, so that the next
step can begin before the host knows the token. A few kilobytes come over the bus, and the table
need not take room on the card. What it is not: for several tokens; prefill uses the module itself.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

from m1local.cuda.card import WARPS
from m1local.cuda.overlap import begun_early, settled
from m1local.formats.base import QuantizedEmbedding
from m1local.formats.groups import Int4Linear
from m1local.formats.int8 import Int8Linear

BLOCK = 512
FLOAT, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def row_kernel(
    token_at, codes, scales, zeros, out, columns, group,
    KIND: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (C,) float32 becomes the token's row."""
    settled(OVERLAP)
    token = tl.load(token_at).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < columns
    if KIND == FLOAT:
        value = tl.load(codes + token * columns + at, mask=here, other=0.0).to(tl.float32)
    elif KIND == INT8:
        code = tl.load(codes + token * columns + at, mask=here, other=0)
        value = code.to(tl.float32) * tl.load(scales + token)
    else:
        pair = tl.load(codes + token * (columns // 2) + at // 2, mask=here, other=0).to(tl.int32)
        code = (pair >> (at % 2 * 4)) & 15
        place = token * (columns // group) + at // group
        scale = tl.load(scales + place, mask=here, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=here, other=0.0).to(tl.float32)
        value = (code - 8).to(tl.float32) * scale + zero
    tl.store(out + at, value, mask=here)


class EmbeddingRows:
    """Rows of a model's embedding, looked up on the card."""

    def __init__(self, module: nn.Module) -> None:
        """Read the table of `module`; raises ValueError for a format the kernel does not know."""
        self.group = 1
        table = module.table if isinstance(module, QuantizedEmbedding) else module
        if isinstance(table, Int8Linear):
            self.kind, tensors = INT8, (table.weight, table.scales, table.scales)
        elif isinstance(table, Int4Linear) and not table.packed:
            self.kind, tensors = INT4, (table.codes, table.scales, table.zeros)
            self.group = table.spec.group_size or 1
        elif isinstance(table, nn.Embedding):
            self.kind, tensors = FLOAT, (table.weight, table.weight, table.weight)
        else:
            raise ValueError(f"rows of {type(table).__name__} cannot be looked up on the card")
        self.tensors: tuple[Tensor, ...] = tensors
        self.columns = tensors[0].shape[1] * (2 if self.kind == INT4 else 1)

    def write(self, token: Tensor, out: Tensor) -> None:
        """The row of `token` (1,) into `out` (C,) float32."""
        row_kernel[(triton.cdiv(self.columns, BLOCK),)](
            token, *self.tensors, out, self.columns, self.group,
            KIND=self.kind.value, BLOCK=BLOCK, num_warps=WARPS, **begun_early(out.device),
        )  # fmt: skip
