"""The embedding of a model on a card: its table stays in the host's memory.

What it is: the module that takes its place where all layers are on the card. A token needs one row
of it, a few kilobytes, so that 0.6 GiB of the 14B's (int8) need not take room there; kernels read
the rows over the bus from pinned memory (embedding.py), and where there are none the host looks
them up. What it is not: a format; the table is stored as it was.
"""

from itertools import chain

import torch
from torch import Tensor, nn

from m1local.cuda import support


class HostEmbedding(nn.Module):
    """Rows of `table`, a module (V, C) in the host's memory, for token ids that lie on a card."""

    def __init__(self, table: nn.Module, columns: int, card: torch.device, dtype: torch.dtype):
        """Hand rows of `columns` = C numbers out on `card`, as `dtype`; pins what is read there."""
        super().__init__()
        self.table, self.columns, self.card, self.dtype = table, columns, card, dtype
        self.host = next(chain(table.parameters(), table.buffers())).device
        self.rows = None
        if support.usable(card) and (card.type != "cuda" or pin(table)):
            from m1local.cuda.embedding import EmbeddingRows  # Triton, only there with a card

            self.rows = EmbeddingRows(table)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        if self.rows is None:
            looked_up: Tensor = self.table(token_ids.to(self.host)).to(self.card, self.dtype)
            return looked_up
        shape = (*token_ids.shape, self.columns)
        found = torch.empty(shape, dtype=self.dtype, device=self.card)
        self.rows.write(token_ids.flatten(), found.view(-1, self.columns))
        return found


def pin(table: nn.Module) -> bool:
    """Move what `table` holds to memory that a card reads; False where the system refuses it."""
    tensors = list(chain(table.parameters(), table.buffers()))
    try:
        found = [tensor.data.pin_memory() for tensor in tensors]
    except RuntimeError:  # so much may not be pinned here; then the host looks rows up
        return False
    for tensor, one in zip(tensors, found, strict=True):
        tensor.data = one
    return True
