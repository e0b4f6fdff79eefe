"""What lies between the products of a decode step, and attention, against m1local/model.py."""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from m1local.cache import LayerCache
from m1local.config import HeadLayout, M1Config
from m1local.kv_store import BYTES, FLOAT, KVStore
from m1local.model import Chunk, M1Attention, RMSNorm
from m1local.rope import rotate, rotation
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD, TINY

from m1local.cuda import attention, fused, prefill  # isort: skip
from m1local.cuda.activation import Activation  # isort: skip

THETA = 10000.0
IN_BYTES = {  # groups of 32 that both halves of a turned head share, and others; padded widths
    "global 64/32": HeadLayout(6, 2, 32, None),
    "global 10/96": HeadLayout(10, 2, 96, None),
    "sliding 3/64": HeadLayout(3, 1, 64, 7),
    "sliding 2/160": HeadLayout(2, 1, 160, 5),
}
LAYOUTS = {
    "global 40/8": HeadLayout(10, 2, 16, None),
    "sliding 20/2": HeadLayout(10, 1, 24, 7),  # a width that is no power of two
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(CARD, dtype)


def both(out: Activation, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.natural, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_residual_and_norm(parts: int, dtype: torch.dtype) -> None:
    columns = 328  # no power of two, whole words
    norm = RMSNorm(columns, 1e-6).to(CARD)
    norm.weight.data = 1 + 0.2 * noise(columns, seed=1)
    x, product = noise(columns), noise(parts, columns, seed=2)
    wanted_x = x + product.sum(0)
    out = Activation(columns, dtype=dtype, device=CARD)
    fused.add_and_norm(x, product if parts else None, norm.weight, norm.eps, out)
    torch.testing.assert_close(x, wanted_x)
    both(out, norm(wanted_x)[None].to(dtype), 1e-6 if dtype == torch.float32 else 1e-2)


def test_silu_times_up() -> None:
    columns = 1096  # two blocks, the second not whole
    gate, up = noise(2, columns), noise(3, columns, seed=1)
    out = Activation(columns, dtype=torch.float32, device=CARD)
    fused.silu_up(gate, up, out)
    both(out, (functional.silu(gate.sum(0)) * up.sum(0))[None], 1e-6)


def held(layer: LayerCache, name: str) -> Tensor:
    """A buffer of a cache, by its name; what lies in bytes as the codes."""
    found = getattr(layer, name)
    return found.values if isinstance(found, KVStore) else found


class Both:
    """One layer's attention twice: as the model computes it, and by the kernels."""

    def __init__(self, name: str, slots: int, dtype: torch.dtype, kv_type: str = FLOAT) -> None:
        self.layout = layout = (LAYOUTS if kv_type == FLOAT else IN_BYTES)[name]
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
        self.cache = LayerCache(
            layout, slots, batch_size=1, dtype=dtype, device=str(CARD), kv_type=kv_type
        )

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
        out = self.by_kernels(packed, position)
        self.same_cache(expected_cache, tolerance)
        both(out, wanted, tolerance)

    def by_kernels(self, packed: Tensor, position: int) -> Activation:
        """The token whose product is `packed` (parts, width), by the kernels."""
        at = torch.tensor([position], device=CARD)
        taps, turn = (
            (self.model.conv_k, self.model.conv_v),
            rotation(at, self.layout.head_dim, THETA),
        )
        out = Activation(self.model.split_sizes[0], dtype=self.dtype, device=CARD)
        attention.attend(packed, self.cache, taps, turn, at, attention.buffers(self.cache), out)
        return out

    def same_cache(self, expected_cache: LayerCache, tolerance: float) -> None:
        """What was written is what the model writes."""
        for name in ("k", "v", "raw_k", "raw_v"):
            found, expected = held(self.cache, name), held(expected_cache, name)
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=name)
        pairs = (self.cache.k, expected_cache.k), (self.cache.v, expected_cache.v)
        for kept, wanted in pairs:
            if kept.scales is not None:
                assert wanted.scales is not None
                torch.testing.assert_close(kept.scales, wanted.scales, atol=0, rtol=tolerance)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("position", [0, 1, 6, 7, 21])  # before, at and behind the window's edge
def test_attention_of_one_token(name: str, position: int) -> None:
    slots = 24 if LAYOUTS[name].window is None else 9
    one = Both(name, slots, torch.float32)
    one.read(position)
    one.compare(position, parts=2, tolerance=2e-5)


@pytest.mark.parametrize("name", IN_BYTES)
@pytest.mark.parametrize("position", [0, 1, 6, 7, 21])
def test_attention_of_one_token_over_bytes(name: str, position: int) -> None:
    slots = 24 if IN_BYTES[name].window is None else 9
    one = Both(name, slots, torch.float32, BYTES)
    one.read(position)
    one.compare(position, parts=2, tolerance=2e-5)


def test_a_part_without_keys_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Both("global 40/8", 40, torch.float32)
    one.read(3)
    made = attention.buffers

    def stale(layer: LayerCache) -> attention.AttentionBuffers:
        kept = made(layer)
        kept.partial.fill_(float("nan"))  # as of memory that something else has used
        return kept

    monkeypatch.setattr(attention, "buffers", stale)
    one.compare(3, parts=1, tolerance=2e-5)


def test_bytes_of_values_that_are_nearly_or_wholly_nothing() -> None:
    one = Both("global 10/96", 8, torch.float32, BYTES)
    one.model.conv_k.data *= 1e-35
    one.model.conv_v.data *= 0
    one.read(2)
    one.compare(2, parts=1, tolerance=2e-5)
    assert not one.cache.v.values.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_over_bytes_in_16_bits(dtype: torch.dtype) -> None:
    one = Both("global 10/96", 40, dtype, BYTES)
    one.read(34)
    before = copy.deepcopy(one.cache)
    packed = noise(1, one.width, seed=9)
    wanted = one.model(packed[None].to(dtype), one.chunk(34, 1), before)[0]
    found = one.by_kernels(packed, 34)
    torch.testing.assert_close(found.natural, wanted, atol=4e-2, rtol=4e-2)
    for name in ("k", "v"):  # the oracle rounds to 16 bits before, so a code may differ by one
        kept, expected = getattr(one.cache, name), getattr(before, name)
        step = expected.scales.float().repeat_interleave(32, -1)
        off = (kept.read(35).float() - expected.read(35).float()).abs()
        assert (off <= 1.6 * step[:, :, :35]).all()


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


@pytest.mark.skipif(CARD.type == "cuda", reason="a card orders its programs itself")
def test_no_part_needs_another_to_be_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    forwards = builder.set_grid_idx

    def backwards(*at: int) -> None:
        forwards(*(size - 1 - here for size, here in zip(builder.grid_dim, at, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    test_more_keys_than_one_part_reads_at_a_time()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 5), (3, 4), (11, 3), (9, 70)])
def test_attention_of_a_chunk(name: str, start: int, length: int) -> None:
    compare_chunk(name, start, length, FLOAT)


@pytest.mark.parametrize("name", IN_BYTES)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 4), (9, 70)])
def test_attention_of_a_chunk_over_bytes(name: str, start: int, length: int) -> None:
    compare_chunk(name, start, length, BYTES)


def compare_chunk(name: str, start: int, length: int, kv_type: str) -> None:
    layout = (LAYOUTS if kv_type == FLOAT else IN_BYTES)[name]
    slots = 96 if layout.window is None else 6 + max(length, 16)
    one = Both(name, slots, torch.float32, kv_type)
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
    found = prefill.attend_chunk(q, one.cache, start)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
