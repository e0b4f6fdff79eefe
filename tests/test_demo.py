"""The built-in demo does what the README says: English about what was asked, and an end."""

from pathlib import Path

import pytest

from m1local.chat import ChatSession
from m1local.engine import Engine
from m1local.generate import Event, Finished, FinishReason
from m1local.home import DEMO
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


def test_its_taps_were_learned(demo: Engine) -> None:
    for layer in demo.model.model.layers:
        taps = layer.get_parameter("self_attn.conv_k").float()
        assert (taps - taps.new_tensor([0.1, 0.9])).abs().max() > 0.2


def test_it_comes_with_a_card_that_names_its_sources() -> None:
    card = Path(DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    for needed in ("MedQuAD", "OpenStax", "CC BY 4.0", "Not a doctor"):
        assert needed in card
