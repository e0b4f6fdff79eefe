"""Proves that the forward pass is Baichuan-M1's.

Against tests/golden (logits the vendor's published code produced for a tiny model), against
tests/reference.py (loops in NumPy) on many shapes, and by breaking the code in each known way.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from m1local import grouped
from m1local import model as model_module
from m1local.cache import KVCache
from m1local.config import M1Config
from m1local.grouped import visibility
from m1local.model import M1Model, normalize_head, short_convolution
from m1local.rope import Rotation, rotate
from tests.conftest import TINY, random_model
from tests.reference import reference_logits

Weights = Mapping[str, NDArray[np.float32]]

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "m1_tiny_logits.json").read_text()
)
# What the published tiny config leaves out because its logits do not depend on it.
MISSING = {
    "model_type": "baichuan_m1",
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPT: list[int] = GOLDEN["prompt_ids"]
CONTINUATION: list[int] = GOLDEN["greedy_continuation"]


@cache
def golden_weights() -> Weights:
    """The golden model's weights from the formula in the file's `note`."""
    state = 12345
    weights = {}
    for name in sorted(GOLDEN["tensors"]):
        shape = GOLDEN["tensors"][name]
        values: NDArray[np.float64] = np.empty(int(np.prod(shape)))
        for i in range(len(values)):
            state = (1664525 * state + 1013904223) % 2**32
            values[i] = (state >> 8) / 2**24 - 0.5
        if "norm" in name:
            values = 1 + 0.4 * values
        elif "conv_" in name:
            values = 0.5 + 0.6 * values
        elif "embed" in name or "lm_head" in name:
            values *= 2 if "embed" in name else 3
        else:
            values *= np.sqrt(12 / shape[1])
        weights[name] = values.astype(np.float32).reshape(shape)
    return weights


def load(config: Mapping[str, Any], weights: Weights) -> M1Model:
    """A float32 model of the vendor's weights, lm_head normalized as the loader does."""
    model = M1Model(M1Config.from_dict(config))
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    tensors["lm_head.weight"] = normalize_head(tensors["lm_head.weight"])
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def golden_model() -> M1Model:
    """The golden model; made anew, since tests break it."""
    return load(GOLDEN["config"] | MISSING, golden_weights())


def assert_near(logits: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding."""
    # Sums of some hundred terms in another order than the vendor's or the oracle's: 1e-5 of logits
    # within ±4; the golden file itself is rounded to six digits.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def fresh_cache(model: M1Model, *, max_chunk: int = 32, batch_size: int = 1) -> KVCache:
    """An empty cache in the model's dtype."""
    return KVCache.allocate(
        model.config,
        model.config.max_position_embeddings,
        dtype=model.lm_head.weight.dtype,
        max_chunk=max_chunk,
        batch_size=batch_size,
    )


def feed(model: M1Model, kv_cache: KVCache | None, token_ids: Sequence[int]) -> Tensor:
    """Logits (T, V) of `token_ids`, which continue what the cache holds."""
    logits: Tensor = model(torch.tensor([list(token_ids)]), kv_cache)
    return logits[0]


def test_the_weight_formula_gives_the_published_first_values() -> None:
    for name, first_values in GOLDEN["first_values"].items():
        np.testing.assert_array_equal(golden_weights()[name].flatten()[:3], first_values)


def test_the_oracle_gives_the_vendors_logits() -> None:
    logits = reference_logits(GOLDEN["config"], golden_weights(), PROMPT + CONTINUATION)
    # float64 against the vendor's float32, both rounded to six digits in the file.
    np.testing.assert_allclose(logits[: len(PROMPT)], GOLDEN["prefill_logits"], atol=1e-5)
    np.testing.assert_allclose(logits[len(PROMPT) - 1 :], GOLDEN["decode_logits"], atol=1e-5)


def test_prefill_at_once_gives_the_vendors_logits() -> None:
    logits = feed(golden_model(), None, PROMPT)
    assert_near(logits, torch.tensor(GOLDEN["prefill_logits"]))


@pytest.mark.parametrize("chunk", range(1, len(PROMPT) + 1))
def test_prefill_in_chunks_of_any_size_gives_the_vendors_logits(chunk: int) -> None:
    model = golden_model()
    kv_cache = fresh_cache(model, max_chunk=chunk)
    parts = [
        feed(model, kv_cache, PROMPT[start : start + chunk])
        for start in range(0, len(PROMPT), chunk)
    ]
    assert_near(torch.cat(parts), torch.tensor(GOLDEN["prefill_logits"]))


def test_greedy_decoding_gives_the_vendors_continuation_and_logits() -> None:
    model = golden_model()
    kv_cache = fresh_cache(model)
    rows = [feed(model, kv_cache, PROMPT)[-1]]
    token_ids: list[int] = []
    for _ in CONTINUATION:
        token_ids.append(int(rows[-1].argmax()))
        rows.append(feed(model, kv_cache, [token_ids[-1]])[-1])
    assert token_ids == CONTINUATION
    assert_near(torch.stack(rows), torch.tensor(GOLDEN["decode_logits"]))


@pytest.mark.parametrize("kept", [1, 6, len(PROMPT) - 1])
def test_prefill_after_a_rollback_gives_the_vendors_logits(kept: int) -> None:
    model = golden_model()
    kv_cache = fresh_cache(model)
    feed(model, kv_cache, [*PROMPT[:kept], 55, 54, 53])
    kv_cache.rollback(kept)
    logits = feed(model, kv_cache, PROMPT[kept:])
    assert_near(logits, torch.tensor(GOLDEN["prefill_logits"][kept:]))


def test_last_only_gives_the_last_row_of_all_logits() -> None:
    model = golden_model()
    logits = model(torch.tensor([PROMPT]), None, last_only=True)
    assert_near(logits[0], torch.tensor(GOLDEN["prefill_logits"][-1:]))


def shape(seed: int, **changes: Any) -> dict[str, Any]:
    """A random small configuration whose two kinds of layer have different heads."""
    draw = random.Random(seed)
    num_layers = draw.randint(2, 4)
    swa_heads, swa_kv_heads = draw.choice([(8, 8), (8, 4), (8, 2), (16, 4), (2, 1)])
    num_heads, num_kv_heads = draw.choice([(4, 4), (4, 2), (4, 1), (1, 1)])
    return {
        **TINY,
        "vocab_size": 64,
        "hidden_size": draw.choice([32, 64]),
        "intermediate_size": draw.choice([24, 56]),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "num_swa_attention_heads": swa_heads,
        "num_swa_key_value_heads": swa_kv_heads,
        "sliding_window": draw.choice([2, 3, 5, 7]),
        "sliding_window_layers": [i for i in range(num_layers) if draw.random() < 0.5],
        "rope_theta": draw.choice([1e4, 1e6]),
        "rms_norm_eps": draw.choice([1e-6, 1e-2]),
        **changes,
    }


SHAPES = {f"seed {seed}": shape(seed) for seed in range(6)} | {
    "window of one": shape(6, sliding_window=1, sliding_window_layers=[0, 1]),
    "window of the whole text": shape(7, sliding_window=64, sliding_window_layers=[1]),
    "all layers slide": shape(8, num_hidden_layers=3, sliding_window_layers=[0, 1, 2]),
    "all layers are global": shape(9, sliding_window_layers=[]),
}


@pytest.mark.parametrize("raw", SHAPES.values(), ids=SHAPES)
def test_the_model_agrees_with_the_oracle_at_once_and_in_odd_chunks(raw: dict[str, Any]) -> None:
    source = random_model(M1Config.from_dict(raw), seed=raw["hidden_size"])
    weights = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    # NormHead must undo any length of the rows.
    weights["lm_head.weight"] *= np.linspace(0.2, 5, raw["vocab_size"], dtype=np.float32)[:, None]
    token_ids = random.Random(1).choices(range(raw["vocab_size"]), k=41)  # many windows long
    expected = torch.from_numpy(reference_logits(raw, weights, token_ids)).float()
    model = load(raw, weights)
    assert_near(feed(model, None, token_ids), expected)
    kv_cache = fresh_cache(model, max_chunk=4)  # 4 divides no window above, nor the text
    parts = [feed(model, kv_cache, token_ids[start : start + 4]) for start in range(0, 41, 4)]
    assert_near(torch.cat(parts), expected)


def attend_to_wrong_kv_head(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    repeats = (1, q.shape[1] // k.shape[1], 1, 1)  # head n reads n % Hkv instead of n // ratio
    return functional.scaled_dot_product_attention(q, k.repeat(repeats), v.repeat(repeats), **rest)


def rotate_interleaved(x: Tensor, turn: Rotation) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = (even * turn.cos - odd * turn.sin, odd * turn.cos + even * turn.sin)
    return torch.stack(pairs, dim=-1).flatten(-2)


def break_norm_head(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.lm_head.weight.data = torch.from_numpy(golden_weights()["lm_head.weight"].copy())


def break_kv_heads(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = SimpleNamespace(scaled_dot_product_attention=attend_to_wrong_kv_head)
    monkeypatch.setattr(grouped, "functional", wrong)


def break_window(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def wider(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        return visibility(queries, keys, None if window is None else window + 1)

    monkeypatch.setattr(grouped, "visibility", wider)


def break_taps_order(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(x: Tensor, before: Tensor, taps: Tensor) -> Tensor:
        return short_convolution(x, before, taps.flip(-1))

    monkeypatch.setattr(model_module, "short_convolution", swapped)


def break_taps_scale(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def softmaxed(x: Tensor, before: Tensor, taps: Tensor) -> Tensor:
        return short_convolution(x, before, taps.softmax(-1))

    monkeypatch.setattr(model_module, "short_convolution", softmaxed)


def break_rope_pairs(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "rotate", rotate_interleaved)


def break_rope_order(model: M1Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer rotates q, convolves k, rotates k, convolves v: put k's convolution off until after
    # its rotation.
    waiting: list[Tensor] = []
    of_keys = {id(taps) for name, taps in model.named_parameters() if name.endswith("conv_k")}

    def convolve_later(x: Tensor, before: Tensor, taps: Tensor) -> Tensor:
        if id(taps) not in of_keys:
            return short_convolution(x, before, taps)
        waiting.append(taps)
        return x

    def rotate_first(x: Tensor, turn: Rotation) -> Tensor:
        turned = rotate(x, turn)
        if not waiting:
            return turned
        return short_convolution(turned, torch.zeros_like(turned[:, :, :1]), waiting.pop())

    monkeypatch.setattr(model_module, "short_convolution", convolve_later)
    monkeypatch.setattr(model_module, "rotate", rotate_first)


SLIPS: dict[str, tuple[Callable[[M1Model, pytest.MonkeyPatch], None], float]] = {
    "no NormHead": (break_norm_head, 16.7),
    "wrong kv head": (break_kv_heads, 3.6),
    "window one too wide": (break_window, 1.15),
    "taps swapped": (break_taps_order, 1.05),
    "interleaved rope": (break_rope_pairs, 0.97),
    "softmax over the taps": (break_taps_scale, 0.64),
    "rope before convolution": (break_rope_order, 0.45),
}


@pytest.mark.parametrize(("slip", "known_cost"), SLIPS.values(), ids=SLIPS)
def test_the_golden_logits_catch_every_known_slip(
    slip: Callable[[M1Model, pytest.MonkeyPatch], None],
    known_cost: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = golden_model()
    slip(model, monkeypatch)
    cost = (feed(model, None, PROMPT) - torch.tensor(GOLDEN["prefill_logits"])).abs().max().item()
    assert cost > 0.1
    # What others measured for the same slip, given to two or three digits.
    assert cost == pytest.approx(known_cost, rel=0.02)


def test_a_batch_of_two_gives_what_two_single_runs_give(tiny_model: M1Model) -> None:
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, 512, (2, 30), generator=generator)
    kv_cache = fresh_cache(tiny_model, batch_size=2, max_chunk=7)
    parts = [tiny_model(token_ids[:, start : start + 7], kv_cache) for start in range(0, 30, 7)]
    singles = torch.cat([tiny_model(row[None], None) for row in token_ids])
    assert_near(torch.cat(parts, dim=1), singles)


def test_bfloat16_stays_near_float32(tiny_model: M1Model) -> None:
    token_ids = random.Random(3).choices(range(512), k=40)
    exact = feed(tiny_model, None, token_ids)
    half = tiny_model.to(torch.bfloat16)
    kv_cache = fresh_cache(half, max_chunk=8)
    parts = [feed(half, kv_cache, token_ids[start : start + 8]) for start in range(0, 40, 8)]
    rounded = torch.cat(parts)
    assert rounded.dtype == torch.float32  # logits, whatever the model's dtype
    # bfloat16 keeps 8 bits (0.4 %); rounding after each of some thirty operations on the way adds
    # up to about 2 %. A slip costs more than 10 %.
    error = (rounded - exact).norm() / exact.norm()
    assert error < 0.03
