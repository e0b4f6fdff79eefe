"""What a card is asked for, counted on the path that a card takes, against the plan.

Layers of the 14B on torch's device without memory: its operators make tensors of the right sizes,
its kernels are not launched.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu_model import M1_14B, random_model, specs
from m1local import memory, placement, workspace
from m1local.cuda import support
from m1local.cuda.card import Card
from m1local.kv_store import BYTES, FLOAT
from m1local.memory import Model, Setting
from m1local.placement import Placement
from m1local.sampling import SamplingParams
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.test_memory import Accountant

from m1local.cuda import (  # isort: skip
    activation, attention, card, embedding, fused, one_row, prefill, products, rows,
)  # fmt: skip
from m1local.cuda.drawing import Draw, DrawingDecoder  # isort: skip

CONFIG = replace(M1_14B, num_hidden_layers=4, sliding_window_layers=frozenset({1, 3}))
CUDA, META = torch.device("cuda"), torch.device("meta")
CHOSEN = Card((8, 6), 28)  # of an RTX 3060


class Unlaunched:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (activation, attention, embedding, fused, one_row, prefill, products, rows):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Unlaunched())
        if hasattr(module, "card"):
            monkeypatch.setattr(module, "card", lambda device: CHOSEN)
    monkeypatch.setattr(card, "card", lambda device: CHOSEN)
    monkeypatch.setattr(workspace, "restored_weights", lambda device: CHOSEN.restored_weights())
    monkeypatch.setattr(placement, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(placement, "CPU", META)  # where the embedding stays


def with_kernels(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    monkeypatch.setattr(support, "missing", lambda device: None if kernels else "no kernels here")
    monkeypatch.setattr(memory, "by_kernels", lambda device: kernels)


def counted(format_: str, setting: Setting, *, kernels: bool) -> int:
    """The most bytes that a prompt, a token and a prompt again take beside what is held."""
    accountant = Accountant("meta")
    ids = torch.zeros((1, setting.max_chunk), dtype=torch.long, device=META)
    with accountant:
        placed = Placement(META, 0, setting)
        model = random_model(CONFIG, format_, placed)
        cache = placed.allocate(CONFIG)
        cache.position = setting.context_tokens - 2 * setting.max_chunk
        held = accountant.peak = accountant.now
        model(ids, cache, last_only=True)
        if kernels:
            decoder = DrawingDecoder(model, cache)
            draw = Draw(decoder, SamplingParams(top_k=40), CONFIG.vocab_size)
            decoder.step()
            draw()
        model(ids, cache, last_only=True)
    return accountant.peak - held


@pytest.mark.parametrize(
    ("format_", "context", "max_chunk", "kv_type", "kernels"),
    [
        ("int4", 8192, memory.CARD_CHUNK, FLOAT, True),
        ("int4", 32768, 512, BYTES, True),
        ("int8", 8192, memory.CARD_CHUNK, BYTES, True),
        ("bf16", 8192, memory.CARD_CHUNK, FLOAT, True),
        ("bf16", 8192, 512, FLOAT, False),
        ("int8", 8192, 512, BYTES, False),
        ("int8", 32768, 512, FLOAT, False),
    ],
)
@torch.no_grad()  # in inference mode torch's attention would be counted as one operator
def test_the_peak_on_a_card_is_the_planned_one(
    format_: str, context: int, max_chunk: int, kv_type: str, kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_kernels(monkeypatch, kernels)
    setting = Setting(context, kv_type, max_chunk=max_chunk)
    planned = Model(CONFIG, specs(CONFIG, format_), torch.bfloat16).demand(setting, CUDA)
    assert planned.workspace == pytest.approx(counted(format_, setting, kernels=kernels), rel=0.05)
