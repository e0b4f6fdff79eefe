"""Proves that another implementation, mlx-lm's, gives the same logits for the same checkpoint.

It was written by others from the same published model, for other hardware; it runs here wherever
the extra `oracle` is installed, and is skipped elsewhere.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from m1local.cache import KVCache
from m1local.checkpoint import load_model
from m1local.config import M1Config
from m1local.model import M1Model
from tests.conftest import TINY, random_model

mx = pytest.importorskip("mlx.core", reason="the extra `oracle` (mlx, mlx-lm) is not installed")
baichuan_m1 = pytest.importorskip("mlx_lm.models.baichuan_m1", reason="mlx-lm is not installed")

# The same float32 sums in another order and other kernels: 1e-5 of logits within ±4.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original checkpoint in float32, its lm_head not normalized: rounding plays no part."""
    folder = tmp_path_factory.mktemp("mlx")
    tensors = dict(random_model(M1Config.from_dict(TINY)).state_dict())
    tensors["lm_head.weight"] *= torch.linspace(0.2, 5, TINY["vocab_size"])[:, None]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> M1Model:
    """The checkpoint as this project loads it."""
    return load_model(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    """The same files as mlx-lm loads them."""
    raw = json.loads((checkpoint / "config.json").read_text())
    model = baichuan_m1.Model(baichuan_m1.ModelArgs.from_dict(raw))
    weights = mx.load(str(checkpoint / "model.safetensors"))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    return model


def their_logits(model: Any, token_ids: list[int], cache: Any = None) -> Tensor:
    """mlx-lm's logits (T, V) of `token_ids`, which continue what `cache` holds."""
    with mx.stream(mx.cpu):
        logits = model(mx.array([token_ids]), cache)
        mx.eval(logits)
    return torch.tensor(logits.tolist())[0]


def our_logits(model: M1Model, token_ids: list[int], cache: KVCache | None = None) -> Tensor:
    """Our logits (T, V) of `token_ids`, which continue what `cache` holds."""
    logits: Tensor = model(torch.tensor([token_ids]), cache)
    return logits[0]


def text(length: int) -> list[int]:
    """Random token ids."""
    return random.Random(0).choices(range(512), k=length)


@torch.inference_mode()
def test_mlx_gives_the_same_logits_in_one_pass(ours: M1Model, theirs: Any) -> None:
    token_ids = text(40)  # five windows
    expected = their_logits(theirs, token_ids)
    torch.testing.assert_close(our_logits(ours, token_ids), expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_mlx_gives_the_same_logits_when_decoding_with_a_cache(ours: M1Model, theirs: Any) -> None:
    token_ids = text(40)
    cache = KVCache.allocate(ours.config, 40, dtype=torch.float32)
    their_cache = theirs.make_cache()
    for chunk in (token_ids[:12], *([token_id] for token_id in token_ids[12:])):
        expected = their_logits(theirs, chunk, their_cache)
        logits = our_logits(ours, chunk, cache)
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
