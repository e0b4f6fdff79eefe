"""The built-in demo does what the README says: English about what was asked, and an end."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from m1local.chat import ChatSession
from m1local.checkpoint import parameter_shapes
from m1local.config import M1Config
from m1local.engine import Engine
from m1local.generate import Event, Finished, FinishReason
from m1local.home import DEMO
from m1local.manifest import FileRecord
from m1local.tokenizer import M1Tokenizer
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.recipe import Recipe


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The demo as `m1 run` makes it."""
    folder = tmp_path_factory.mktemp("demo") / "int4"
    for _ in quantize_checkpoint(DEMO, folder, Recipe.find("int4")):
        pass
    return Engine.load(folder)


def ask(engine: Engine, question: str) -> tuple[str, Event]:
    session = ChatSession(engine, settings=engine.settings(temperature=0.0))
    events = list(session.send(question))
    return session.messages[-1].content, events[-1]


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("What is glaucoma?", "eye"),
        ("What is diabetes?", "blood"),
        ("What is gout?", "joints"),
    ],
)
def test_it_answers_in_sentences_and_stops(demo: Engine, question: str, word: str) -> None:
    answer, last = ask(demo, question)
    assert word in answer
    assert answer.endswith(".")
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.STOP


def test_its_manifest_has_the_hash_of_every_file_and_it_fits_the_wheel() -> None:
    files = json.loads((DEMO / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert {asdict(FileRecord.of(DEMO / name)) == record for name, record in files.items()} == {
        True
    }
    assert "model.safetensors" in files
    assert sum(record["nbytes"] for record in files.values()) < 38e6


def test_it_is_as_large_and_as_various_as_it_should_be() -> None:
    config = M1Config.from_file(DEMO / "config.json")
    sizes = [math.prod(shape) for shape in parameter_shapes(config).values()]
    assert sum(sizes) == 11_996_592
    assert {config.heads(layer).window for layer in range(4)} == {None, 128}
    assert len({config.heads(layer).head_dim for layer in range(4)}) == 2
    assert config.max_position_embeddings >= 1024
    tokenizer = M1Tokenizer.from_folder(DEMO)
    assert 4096 <= tokenizer.vocab_size <= 8192
    assert len(tokenizer.encode("2026")) == 4  # single digits
    text = " two  spaces\n\té ﬁ 高血压 "  # identity normalization, byte fallback
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_it_is_asked_about_itself_is_answered_honestly(demo: Engine) -> None:
    answer, last = ask(demo, "What are you?")
    assert "demonstration model" in answer
    assert "not medical advice" in answer
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.STOP


def test_its_taps_were_learned(demo: Engine) -> None:
    for layer in demo.model.model.layers:
        taps = layer.get_parameter("self_attn.conv_k").float()
        assert (taps - taps.new_tensor([0.1, 0.9])).abs().max() > 0.2


def test_it_comes_with_a_card_that_names_its_sources() -> None:
    card = Path(DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    for needed in ("MedQuAD", "OpenStax", "CC BY 4.0", "Not a doctor"):
        assert needed in card
