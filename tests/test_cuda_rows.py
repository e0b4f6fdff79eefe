"""Norm, gate and heads of several rows by the kernels, against torch in float32."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m1local import neighbours
from m1local.cuda import support
from m1local.model import short_convolution
from m1local.native.neighbours import HeadTurn
from m1local.rope import rotate, rotation
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD

from m1local.cuda import rows  # isort: skip

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounded once; the interpreter cuts bfloat16 off.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EPS = 1e-3  # beside rows that are small it shows


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(CARD, dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype] / 4)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 31, 64, 328])
def test_norm(columns: int, dtype: torch.dtype) -> None:
    weight = (1 + noise(columns, seed=1) / 4).to(dtype)
    for shape in ((1, 1, columns), (1, 5, columns), (2, 3, columns)):
        for size in (3.0, 0.02):
            x = (noise(*shape) * size).to(dtype)
            wide = x.float()
            wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
            close(rows.norm(x, weight, EPS), wanted * weight.float(), dtype)


def test_norm_of_every_other_column() -> None:
    x, weight = noise(1, 3, 128)[..., ::2], torch.ones(64, device=CARD)
    wanted = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    close(rows.norm(x, weight, EPS), wanted, torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 100), (1, 7, 1096)])
def test_gate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    gated, up = noise(*shape, dtype=dtype) * 4, noise(*shape, seed=1, dtype=dtype)
    close(rows.gate(gated, up), functional.silu(gated.float()) * up.float(), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 32), (3, 1, 24), (2, 2, 2)])
@pytest.mark.parametrize("length", [1, 2, 16, 37])
def test_heads_are_mixed_and_turned(
    heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype
) -> None:
    packed = noise(1, length, (heads + 2 * kv_heads) * width, dtype=dtype)
    taps = [0.5 + 0.3 * noise(1, 1, kv_heads, 1, 2, seed=seed, dtype=dtype) for seed in (1, 2)]
    before = [noise(1, kv_heads, 1, width, seed=seed, dtype=dtype) for seed in (3, 4)]
    turn = rotation(torch.arange(4000, 4000 + length, device=CARD), width, 1e4)
    found = rows.turn_heads(
        packed, HeadTurn((taps[0], taps[1]), (before[0], before[1]), turn, kv_heads)
    )
    parts = packed.float().view(1, length, -1, width).transpose(1, 2)
    q, k, v = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    mixed = [
        short_convolution(part, last.float(), tap.float())
        for part, last, tap in zip((k, v), before, taps, strict=True)
    ]
    for one, wanted in zip(found, (rotate(q, turn), rotate(mixed[0], turn), mixed[1]), strict=True):
        close(one, wanted, dtype)


def test_where_the_kernels_do_not_serve_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(1, 3, 64, device="meta"), torch.ones(64, device="meta")
    monkeypatch.setattr(rows, "norm_rows_kernel", {(3,): lambda *_, **__: None})
    monkeypatch.setattr(support, "missing", lambda device: "no kernels here")
    with torch.inference_mode():
        assert neighbours.norm(x, weight, EPS) is None
        monkeypatch.setattr(support, "missing", lambda device: None)
        assert neighbours.norm(x, weight, EPS) is not None
        for wrong in (x.half(), x[:, :0], x.double()):
            assert neighbours.norm(wrong, weight, EPS) is None
            assert neighbours.gate(wrong, x) is None
        assert neighbours.norm(x, torch.ones(64), EPS) is None
    assert neighbours.norm(x, weight, EPS) is None  # gradients
