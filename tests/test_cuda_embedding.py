"""Rows of an embedding, by the kernels and from the host's memory, against the module's own."""

import pytest
import torch
from torch import nn

from m1local.cuda import support
from m1local.cuda.host_embedding import HostEmbedding, pin
from m1local.formats import LinearSpec, format_class
from m1local.formats.base import QuantizedEmbedding
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda.decode import rows_of  # isort: skip
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
    rows = EmbeddingRows(module.to(CARD))
    for tokens in ([0], [1], [ROWS - 1], [5, 0, ROWS - 1, 5]):
        ids, out = torch.tensor(tokens, device=CARD), torch.zeros((len(tokens), columns)).to(CARD)
        rows.write(ids, out)
        torch.testing.assert_close(out, module(ids).float())


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


def test_memory_that_may_not_be_pinned_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    table = stored("int8", 64)
    before = [tensor.data_ptr() for tensor in table.buffers()]
    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    assert not pin(table)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    assert pin(table)
    assert [tensor.data_ptr() for tensor in table.buffers()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [True, False])
@torch.inference_mode()
def test_a_table_in_the_host_s_memory(
    kernels: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "usable", lambda device: kernels)
    ids = torch.tensor([[5, 0, ROWS - 1, 5]])
    for table in (stored("int8", 64), stored("int4", 96), stored("int8", 40), nn.Embedding(37, 33)):
        wanted = table(ids).to(dtype)
        module = HostEmbedding(table, wanted.shape[-1], CARD, dtype)
        assert (module.rows is not None) is kernels
        found = module(ids.to(CARD))
        assert (found.device.type, found.dtype) == (CARD.type, dtype)
        # Triton's interpreter cuts off where a card rounds.
        rounded = 2**-7 if kernels and dtype == torch.bfloat16 else 0
        torch.testing.assert_close(found.cpu(), wanted, atol=0, rtol=rounded)
        row = torch.zeros((1, module.columns), device=CARD)
        rows_of(module).write(ids[0, :1].to(CARD), row)  # for a decode step
        of_type = 2**-7 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(row.cpu(), table(ids[:, :1])[0], atol=0, rtol=of_type)
