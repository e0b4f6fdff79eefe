"""Drawing on the card against the host's sampler, and a whole answer through both paths."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m1local import checkpoint, placement
from m1local.cuda import support
from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.generate import Event, Finished, TextDelta
from m1local.placement import GpuLayers
from m1local.sampling import Sampler, SamplingParams
from tests import interpreter  # noqa: F401  # skips without Triton; before its kernels
from tests.conftest import CARD, write_checkpoint
from tests.test_cuda_decode import CONFIG, RAW, model_of, new_cache

from m1local.cuda import drawing  # isort: skip

GREEDY = SamplingParams(temperature=0)
HOT = SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=11)
PARAMS = {
    "greedy": GREEDY,
    "drawn": HOT,
    "penalized": replace(HOT, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "biased": replace(HOT, logit_bias=((7, 4.0), (9, -3.0))),
    "greedy, biased": replace(GREEDY, logit_bias=((7, 9.0),), repetition_penalty=1.5),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "missing", lambda device: None)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> drawing.DrawingDecoder:
    """A decoder whose step is never made; logits are given."""
    found = drawing.DrawingDecoder(model_of("float"), new_cache())
    monkeypatch.setattr(found, "launch_ahead", lambda: True)
    return found


@pytest.mark.parametrize("name", PARAMS)
def test_the_same_tokens_as_the_hosts_sampler(name: str, decoder: drawing.DrawingDecoder) -> None:
    params, vocab_size = PARAMS[name], CONFIG.vocab_size - 3
    host, card = Sampler(params, vocab_size), decoder.sampler(params, vocab_size)
    assert isinstance(card, drawing.CardSampler)
    for sampler in (host, card):
        sampler.observe([1, 2, 2, 30])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 3 * torch.randn(CONFIG.vocab_size, generator=generator).to(CARD)
        assert card(logits) == host(logits)


class Capturing(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Refuses, as a graph does while it is captured, what makes the host wait for the card."""

    WAITING = frozenset(
        {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal",
         "bincount", "_unique2", "repeat_interleave"}
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__  # type: ignore[attr-defined]
        if name in self.WAITING:
            raise RuntimeError(f"{name} is not permitted while a stream is captured")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PARAMS)
@torch.inference_mode()
def test_no_draw_waits_for_the_card(name: str, decoder: drawing.DrawingDecoder) -> None:
    draw = drawing.Draw(decoder, PARAMS[name], CONFIG.vocab_size)
    with Capturing():
        draw()
    with pytest.raises(RuntimeError, match="not permitted"), Capturing():
        draw.counts[draw.found[0]]


@torch.inference_mode()
def test_no_step_waits_for_the_card(decoder: drawing.DrawingDecoder) -> None:
    with Capturing():
        decoder.step()


def test_only_the_last_few_draws_keep_their_buffers(decoder: drawing.DrawingDecoder) -> None:
    logits = torch.zeros(CONFIG.vocab_size, device=CARD)
    for step in range(3 * drawing.MOST_DRAWS):
        for temperature in (1.0, 2.0 + step):  # one that comes again, and ever new ones
            sampler = decoder.sampler(replace(HOT, temperature=temperature), CONFIG.vocab_size)
            assert sampler is not None
            sampler(logits)
    kept = [params.temperature for params, _ in decoder._draws]
    assert len(kept) == len(decoder._replays) == drawing.MOST_DRAWS
    assert 1.0 in kept


def test_a_fresh_sampler_has_seen_nothing(decoder: drawing.DrawingDecoder) -> None:
    params = replace(GREEDY, repetition_penalty=5.0)
    logits = torch.zeros(CONFIG.vocab_size, device=CARD)
    logits[5], logits[6] = 2.0, 1.0
    for _ in range(2):
        sampler = decoder.sampler(params, CONFIG.vocab_size)
        assert sampler is not None
        assert [sampler(logits), sampler(logits)] == [5, 6]


def test_values_that_are_no_numbers(decoder: drawing.DrawingDecoder) -> None:
    sampler = decoder.sampler(GREEDY, CONFIG.vocab_size)
    assert sampler is not None
    with pytest.raises(M1Error, match="no numbers"):
        sampler(torch.full((CONFIG.vocab_size,), float("nan"), device=CARD))


def test_a_bias_on_a_token_that_is_none(decoder: drawing.DrawingDecoder) -> None:
    for token_id in (CONFIG.vocab_size, -1):
        with pytest.raises(M1Error, match=f"names the token {token_id}"):
            decoder.sampler(replace(HOT, logit_bias=((token_id, 1.0),)), CONFIG.vocab_size)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (replace(HOT, dry_multiplier=0.8), "DRY"),
        (replace(HOT, repeat_last_n=64), "repeat-last-n"),
        (replace(HOT, top_k=None), "top-k"),
        (replace(HOT, logit_bias=((3, float("-inf")),)), "bans"),
    ],
)
def test_what_the_host_must_draw(
    params: SamplingParams, reason: str, decoder: drawing.DrawingDecoder
) -> None:
    assert reason in drawing.why_not(params)
    assert decoder.sampler(params, 10) is None


def answered(engine: Engine, **changes: object) -> tuple[str, list[int], Finished]:
    settings = engine.settings(max_new_tokens=5, loop_guard=False, **changes)
    events: list[Event] = list(engine.complete("The heart", settings))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    token_ids = [token for delta in deltas for token in delta.token_ids]
    finished = events[-1]
    assert isinstance(finished, Finished)
    return "".join(delta.text for delta in deltas), token_ids, finished


def test_an_answer_is_the_same_on_both_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "m1", RAW | {"vocab_size": 512}, endless=True)
    layers: GpuLayers = "all" if CARD.type == "cuda" else 0  # a card's kernels take its tensors
    for module in (checkpoint, placement):  # so that no two tokens are as likely
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)
    engine = Engine.load(tmp_path / "m1", context_tokens=64, gpu_layers=layers)
    for changes in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 10, "seed": 3}):
        engine.contexts.of(0).decoder = None
        wanted = answered(engine, **changes)
        context = engine.contexts.of(0)
        context.decoder = drawing.DrawingDecoder(engine.model, context.cache)
        found = answered(engine, **changes)
        assert found[:2] == wanted[:2]
        assert found[2].new_tokens == 5
        assert context.cache.position == len(context.token_ids)
