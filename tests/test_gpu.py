"""What needs a card; and what bench/gpu.py does without one."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from bench.gpu_model import FORMATS, filled_cache, random_matrix, random_model
from m1local.config import M1Config
from m1local.context import Context
from m1local.cuda import int4pack
from m1local.cuda.host_embedding import HostEmbedding
from m1local.engine import Engine
from m1local.formats import LinearSpec
from m1local.formats.groups import Int4Linear
from m1local.memory import Setting
from m1local.placement import GpuLayers, Placement, decoder_of, load
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe
from tests.conftest import CARD, ROOT, TINY

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_the_benchmark_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "bench.gpu needs a CUDA card, and torch finds none here."
    assert not done.stdout


@pytest.mark.parametrize("name", [*FORMATS, "bf16"])
def test_a_random_model_is_whole_and_finite(name: str) -> None:
    config = M1Config.from_dict(TINY)
    placement = Placement(CARD, 0, Setting(64))
    model = random_model(config, name, placement)
    assert not [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    cache = filled_cache(config, placement, 20)
    logits = model(torch.tensor([[5, 6]], device=CARD), cache)
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("recipe", ["int4", "int8", "bnb-nf4"])
def test_an_answer_on_the_card_is_that_of_the_cpu(
    recipe: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for _ in quantize_checkpoint(tiny_checkpoint, tmp_path / "m1", Recipe.find(recipe)):
        pass
    prompt = list(range(10, 40))
    logits = []
    choices: tuple[GpuLayers, ...] = (0, "all", 2)
    for layers in choices:
        engine = Engine.load(tmp_path / "m1", gpu_layers=layers)
        engine.context.feed(prompt)
        logits.append(engine.context.feed([41]).float().cpu())
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], atol=0.2, rtol=0.1)


@pytest.mark.gpu
@needs_card
def test_a_step_is_captured(tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint, gpu_layers="all")
    engine.context.feed([5, 6, 7])
    engine.context.feed([8])
    decoder = engine.context.decoder
    assert decoder is not None
    assert decoder.reason == ""


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draw_is_captured(temperature: float, tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint, gpu_layers="all")
    settings = engine.settings(temperature=temperature, top_k=20, max_new_tokens=8, seed=1)
    assert list(engine.complete("The heart", settings))
    decoder = engine.contexts.of(0).decoder
    assert decoder is not None
    replays = decoder._replays.values()  # type: ignore[attr-defined]
    assert [replay.reason for replay in replays] == [""]


@pytest.mark.gpu
@needs_card
def test_an_embedding_in_host_memory_is_read_by_the_card(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for _ in quantize_checkpoint(tiny_checkpoint, tmp_path / "m1", Recipe.find("int4")):
        pass
    config = M1Config.from_file(tmp_path / "m1/config.json")
    placed = Placement(CARD, 0, Setting(64))
    model, _ = load(tmp_path / "m1", placed)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, HostEmbedding)
    assert all(part.is_pinned() for part in embedding.table.buffers())

    def read() -> torch.Tensor:
        context = Context(model, placed.allocate(config), decoder_of(model, placed))
        context.feed(list(range(10, 40)))
        return context.feed([41]).clone()

    found = read()
    on_card = deepcopy(embedding.table).to(CARD)
    model.model.embed_tokens = on_card  # type: ignore[assignment]
    assert torch.equal(found, read())


@pytest.mark.gpu
@needs_card
def test_torchs_packed_product() -> None:
    if not int4pack.serves(CARD, (64, 256)):
        pytest.skip("needs compute capability 8.0")
    module = random_matrix((64, 256), LinearSpec("int4", 64), CARD)
    assert isinstance(module, Int4Linear)
    scales, zeros = (part[..., 0].bfloat16() for part in module._statistics(0, 64))
    scales_zeros = torch.stack((scales.T, zeros.T), dim=-1).contiguous()
    packed = int4pack.pack(module.codes)
    whole = module.dequantize()
    one = torch.eye(256, dtype=torch.bfloat16, device=CARD)
    found = int4pack.multiply(one, packed, 64, scales_zeros).T.float()
    torch.testing.assert_close(found, whole, atol=2e-3, rtol=1e-2)
    codes = torch.stack((module.codes & 15, module.codes >> 4), -1).flatten(1)
    assert torch.equal(int4pack.unpack(packed, 256, 3, 64), codes[3:])
