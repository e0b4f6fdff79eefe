"""Norm, heads and gate in the compiled library, against the same in torch.

In float32 they differ by the order of sums. In bfloat16 the library computes in float32 and rounds
once, where torch rounds after every step: it is compared with torch's float32 result of the same
values.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m1local.model import RMSNorm, short_convolution
from m1local.native import library, neighbours
from m1local.native.neighbours import HeadTurn
from m1local.rope import Rotation, rotate, rotation

TYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative to the greatest, or to each
EPS = 1e-6

pytestmark = pytest.mark.skipif(library.library() is None, reason=library.status().text)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert found is not None
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] / 4)


def norm_by_torch(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 48, 100, 5120])
def test_norm(dtype: torch.dtype, width: int) -> None:
    weight = (1 + draw(width, seed=1) / 4).to(dtype)
    for rows in (1, 2, 8, 61):  # 61 of 5120 take two threads
        x = (draw(1, rows, width) * 3).to(dtype)
        assert_close(neighbours.norm(x, weight, EPS), norm_by_torch(x, weight), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norm_of_zeros_of_little_and_of_every_other_column(dtype: torch.dtype) -> None:
    weight = torch.ones(64, dtype=dtype)
    assert_close(neighbours.norm(torch.zeros(1, 2, 64, dtype=dtype), weight, EPS),
                 torch.zeros(1, 2, 64), dtype)  # fmt: skip
    for x in (draw(1, 2, 64).to(dtype) * 1e-30, draw(1, 2, 128).to(dtype)[..., ::2]):
        assert_close(neighbours.norm(x, weight, EPS), norm_by_torch(x, weight), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("count", [1, 15, 17, 100])
def test_gate(dtype: torch.dtype, count: int) -> None:
    for rows in (1, 3, 8, 701):
        gated, up = (draw(1, rows, count) * 4).to(dtype), draw(1, rows, count, seed=1).to(dtype)
        expected = functional.silu(gated.float()) * up.float()
        assert_close(neighbours.gate(gated, up), expected, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gate_of_what_is_far_from_zero(dtype: torch.dtype) -> None:
    gated = torch.tensor([[[0.0, -0.0, 88.0, -88.0, 100.0, -100.0, 3e38, -3e38, 20.0]]]).to(dtype)
    up = torch.full_like(gated, 0.5)
    expected = functional.silu(gated.float()) * 0.5
    assert_close(neighbours.gate(gated, up), expected, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype, value: float) -> None:
    x, ones = torch.ones(1, 2, 32, dtype=dtype), torch.ones(1, 2, 32, dtype=dtype)
    x[0, 1, 3] = value
    for found in (neighbours.norm(x, ones[0, 0], EPS), neighbours.gate(x, ones),
                  neighbours.gate(ones, x)):  # fmt: skip
        assert found is not None
        assert not found[0, 1, 3].isfinite()
        assert found[0, 0].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_product_that_is_too_large_is_infinite_as_torchs(dtype: torch.dtype) -> None:
    large = torch.full((1, 1, 16), 3e30).to(dtype)
    found = neighbours.gate(large, large)
    assert found is not None
    assert torch.equal(found, functional.silu(large) * large)


class Packed:
    """A chunk's q, k and v side by side, and what they are mixed and turned by."""

    def __init__(
        self, rows: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, start: int
    ) -> None:
        self.kv_heads, self.width, self.rows = kv_heads, width, rows
        self.sizes = [heads * width, kv_heads * width, kv_heads * width]
        self.packed = draw(1, rows, sum(self.sizes), seed=rows).to(dtype)
        taps = (1, 1, kv_heads, 1, 2)
        self.taps = (draw(*taps, seed=2).to(dtype), draw(*taps, seed=3).to(dtype))
        before = (1, kv_heads, 1, width)
        self.before = (draw(*before, seed=4).to(dtype), draw(*before, seed=5).to(dtype))
        self.turn = rotation(torch.arange(start, start + rows), width, 1e6)

    def by_torch(self) -> tuple[Tensor, Tensor, Tensor]:
        """As m1local/model.py computes them, in float32."""
        q, k, v = (
            part.reshape(1, self.rows, -1, self.width).transpose(1, 2).float()
            for part in torch.split(self.packed, self.sizes, dim=-1)
        )
        k_before, v_before = (tensor.float() for tensor in self.before)
        k_taps, v_taps = (tensor.float() for tensor in self.taps)
        k = short_convolution(k, k_before, k_taps)
        return rotate(q, self.turn), rotate(k, self.turn), short_convolution(v, v_before, v_taps)

    def by_library(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return neighbours.turn_heads(
            self.packed, HeadTurn(self.taps, self.before, self.turn, self.kv_heads)
        )

    def assert_same(self) -> None:
        found = self.by_library()
        assert found is not None
        for one, expected in zip(found, self.by_torch(), strict=True):
            assert one.shape == expected.shape
            assert_close(one.contiguous(), expected, self.packed.dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "heads", [(40, 8, 128), (20, 2, 256), (3, 1, 16), (2, 2, 6), (1, 1, 2)], ids=str
)
def test_heads(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    for rows in (1, 2, 3, 8, 37):
        for start in (0, 1, 31000):
            Packed(rows, *heads, dtype, start).assert_same()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_without_rotation_only_the_convolution_is_left(dtype: torch.dtype) -> None:
    chunk = Packed(3, 4, 2, 32, dtype, 0)
    chunk.turn = Rotation(torch.ones(3, 16), torch.zeros(3, 16))
    chunk.assert_same()
    found = chunk.by_library()
    assert found is not None
    assert torch.equal(found[0], chunk.packed[..., : 4 * 32].view(1, 3, 4, 32).transpose(1, 2))


def test_a_quarter_turn_exchanges_the_halves() -> None:
    chunk = Packed(2, 4, 2, 32, torch.float32, 0)
    chunk.turn = Rotation(torch.zeros(2, 16), torch.ones(2, 16))
    chunk.assert_same()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_first_token_of_a_chunk_is_mixed_with_the_one_before_it(dtype: torch.dtype) -> None:
    whole = Packed(6, 4, 2, 32, dtype, 10)
    expected = whole.by_library()
    assert expected is not None
    cut = Packed(2, 4, 2, 32, dtype, 14)  # the last two tokens alone
    cut.packed, cut.taps = whole.packed[:, 4:], whole.taps
    _, k, v = torch.split(whole.packed[:, 3:4], whole.sizes, dim=-1)
    cut.before = (k.reshape(1, 2, 1, 32), v.reshape(1, 2, 1, 32))
    found = cut.by_library()
    assert found is not None
    for one, all_of_it in zip(found, expected, strict=True):
        assert torch.equal(one, all_of_it[:, :, 4:])


def test_the_beginning_is_mixed_with_nothing() -> None:
    chunk = Packed(1, 4, 2, 32, torch.float32, 0)
    chunk.before = (torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32))
    chunk.assert_same()


def test_what_it_does_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(1, 8, 32), torch.ones(32)
    assert neighbours.norm(x, weight, EPS) is not None
    assert neighbours.norm(x.double(), weight.double(), EPS) is None
    assert neighbours.norm(x, weight.bfloat16(), EPS) is None
    assert neighbours.norm(x[:, :0], weight, EPS) is None
    assert neighbours.gate(x[..., ::2], x[..., ::2]) is None
    with torch.inference_mode(mode=False), torch.enable_grad():
        assert neighbours.norm(x, weight, EPS) is None
        module = RMSNorm(32, EPS)
        assert module(torch.ones(1, 1, 32)).requires_grad
    monkeypatch.setattr(neighbours, "library", lambda: None)
    assert neighbours.norm(x, weight, EPS) is None
    assert neighbours.gate(x, x) is None
    assert Packed(1, 4, 2, 32, torch.float32, 0).by_library() is None
