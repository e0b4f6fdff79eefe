"""What lies between the products of a decode step, and attention, against m1local/model.py."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from m1local.cache import LayerCache
from m1local.config import HeadLayout, M1Config
from m1local.cuda.matrix import planar
from m1local.kv_store import KVStore
from m1local.model import Chunk, M1Attention, RMSNorm
from m1local.rope import rotate, rotation
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD, TINY

from m1local.cuda import attention, fused, prefill  # isort: skip

THETA = 10000.0
LAYOUTS = {
    "global 40/8": HeadLayout(10, 2, 16, None),
    "sliding 20/2": HeadLayout(10, 1, 24, 7),  # a width that is no power of two
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(CARD, dtype)


def both(out: fused.Activation, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.natural, wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(out.planes, planar(out.natural))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_residual_and_norm(parts: int, dtype: torch.dtype) -> None:
    columns = 328  # no power of two, whole words
    norm = RMSNorm(columns, 1e-6).to(CARD)
    norm.weight.data = 1 + 0.2 * noise(columns, seed=1)
    x, product = noise(columns), noise(parts, columns, seed=2)
    wanted_x = x + product.sum(0)
    out = fused.Activation(columns, dtype=dtype, device=CARD)
    fused.add_and_norm(x, product if parts else None, norm.weight, norm.eps, out)
    torch.testing.assert_close(x, wanted_x)
    both(out, norm(wanted_x)[None].to(dtype), 1e-6 if dtype == torch.float32 else 1e-2)


def test_silu_times_up() -> None:
    columns = 1096  # two blocks, the second not whole
    gate, up = noise(2, columns), noise(3, columns, seed=1)
    out = fused.Activation(columns, dtype=torch.float32, device=CARD)
    fused.silu_up(gate, up, out)
    both(out, (functional.silu(gate.sum(0)) * up.sum(0))[None], 1e-6)


def held(layer: LayerCache, name: str) -> Tensor:
    """A buffer of a cache, by its name."""
    found = getattr(layer, name)
    return found.values if isinstance(found, KVStore) else found


class Both:
    """One layer's attention twice: as the model computes it, and by the kernels."""

    def __init__(self, name: str, slots: int, dtype: torch.dtype) -> None:
        self.layout = layout = LAYOUTS[name]
        raw = TINY | {"hidden_size": layout.num_heads * layout.head_dim, "rope_theta": THETA}
        self.model = M1Attention(M1Config.from_dict(raw), layout)
        taps = (1, 1, layout.num_kv_heads, 1, 2)
        self.model.conv_k.data = 0.5 + 0.3 * noise(*taps, seed=3)
        self.model.conv_v.data = 0.5 + 0.3 * noise(*taps, seed=4)
        self.width = sum(self.model.split_sizes)
        self.model.W_pack = nn.Identity()  # type: ignore[assignment]
        self.model.o_proj = nn.Identity()  # type: ignore[assignment]
        self.model.to(CARD, dtype).requires_grad_(False)
        self.dtype = dtype
        self.cache = LayerCache(layout, slots, batch_size=1, dtype=dtype, device=str(CARD))

    def chunk(self, start: int, length: int) -> Chunk:
        positions = torch.arange(start, start + length, device=CARD)
        turn = rotation(positions, self.layout.head_dim, THETA)
        return Chunk(start, positions, {self.layout.head_dim: turn})

    def read(self, length: int) -> None:
        """Fill the cache as prefill does, token by token."""
        for at in range(length):
            self.model(noise(1, 1, self.width, seed=at, dtype=self.dtype), self.chunk(at, 1),
                       self.cache)  # fmt: skip

    def compare(self, position: int, parts: int, tolerance: float) -> None:
        """One more token at `position`, both ways."""
        packed = noise(parts, self.width, seed=1000 + position)
        expected_cache = copy.deepcopy(self.cache)
        x = packed.sum(0)[None, None].to(self.dtype)
        wanted = self.model(x, self.chunk(position, 1), expected_cache)[0]
        q = torch.zeros(self.model.split_sizes[0], dtype=self.dtype, device=CARD)
        at = torch.tensor([position], device=CARD)
        taps, turn = (
            (self.model.conv_k, self.model.conv_v),
            rotation(at, self.layout.head_dim, THETA),
        )
        fused.place(packed, q, self.cache, taps, turn, at)
        for name in ("k", "v", "raw_k", "raw_v"):
            found, expected = held(self.cache, name), held(expected_cache, name)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=name)
        out = fused.Activation(self.model.split_sizes[0], dtype=self.dtype, device=CARD)
        attention.attend(q, self.cache, at, attention.buffers(self.cache), out)
        both(out, wanted, tolerance)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("position", [0, 1, 6, 7, 21])  # before, at and behind the window's edge
def test_attention_of_one_token(name: str, position: int) -> None:
    slots = 24 if LAYOUTS[name].window is None else 9
    one = Both(name, slots, torch.float32)
    one.read(position)
    one.compare(position, parts=2, tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bits(dtype: torch.dtype) -> None:
    one = Both("global 40/8", 40, dtype)
    one.read(34)
    one.compare(34, parts=1, tolerance=4e-2)


def test_more_keys_than_one_part_reads_at_a_time() -> None:
    one = Both("global 40/8", 300, torch.float32)
    one.cache.k.values.copy_(noise(*one.cache.k.values.shape, seed=5))
    one.cache.v.values.copy_(noise(*one.cache.v.values.shape, seed=6))
    one.compare(290, parts=1, tolerance=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 5), (3, 4), (11, 3), (9, 70)])
def test_attention_of_a_chunk(name: str, start: int, length: int) -> None:
    slots = 96 if LAYOUTS[name].window is None else 6 + max(length, 16)
    one = Both(name, slots, torch.float32)
    one.read(start)
    packed = noise(1, length, one.width, seed=7)
    chunk = one.chunk(start, length)
    wanted = one.model(packed, chunk, one.cache)
    heads = (
        packed[..., : one.model.split_sizes[0]]
        .view(1, length, -1, one.layout.head_dim)
        .transpose(1, 2)
    )
    q = rotate(heads, chunk.rotations[one.layout.head_dim])
    found = prefill.attend_chunk(q, one.cache, start).transpose(1, 2).reshape(1, length, -1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
