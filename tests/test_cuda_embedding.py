"""The row of one token, by the kernels, against the embedding that prefill uses."""

import pytest
import torch
from torch import nn

from m1local.formats import LinearSpec, format_class
from m1local.formats.base import QuantizedEmbedding
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda.embedding import COLUMNS, EmbeddingRows  # isort: skip

ROWS = 37


def stored(format_: str, columns: int) -> QuantizedEmbedding:
    spec = LinearSpec(format_, None if format_ == "int8" else 32)
    chosen = format_class(spec.format)
    assert chosen.gathers
    weight = torch.randn((ROWS, columns), generator=torch.Generator().manual_seed(columns))
    return QuantizedEmbedding(
        chosen.table(chosen.quantize(weight, spec), (ROWS, columns), spec), torch.float32
    )


def same_rows(module: nn.Module, columns: int) -> None:
    rows, out = EmbeddingRows(module.to(CARD)), torch.zeros(columns, device=CARD)
    for token in (0, 1, ROWS - 1):
        ids = torch.tensor([token], device=CARD)
        rows.write(ids, out)
        torch.testing.assert_close(out, module(ids)[0].float())


@pytest.mark.parametrize("columns", [32, 96, COLUMNS + 160])
@pytest.mark.parametrize("format_", ["int3", "int4", "int5", "int6", "int8"])
@torch.inference_mode()
def test_every_format_that_an_embedding_may_have(format_: str, columns: int) -> None:
    module = stored(format_, columns)
    assert module.table.cuda_matrix() is not None
    same_rows(module, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_an_embedding_as_it_was(dtype: torch.dtype) -> None:
    same_rows(nn.Embedding(ROWS, COLUMNS + 7, dtype=dtype), COLUMNS + 7)


@torch.inference_mode()
def test_columns_that_are_no_whole_blocks() -> None:
    module = stored("int8", 40)
    assert module.table.cuda_matrix() is None
    same_rows(module, 40)
