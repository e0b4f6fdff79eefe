"""The engine: what is loaded together is checked against each other, the cheap parts first."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from m1local import contexts
from m1local.config import M1Config
from m1local.engine import Engine
from m1local.errors import CheckpointError, ConfigError, ContextLengthError, TokenizerError
from m1local.generate import Finished, FinishReason
from m1local.generation_config import GenerationConfig
from m1local.placement import demand
from m1local.sampling import SamplingParams
from tests.conftest import TINY, random_model


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint)


@pytest.fixture
def without_weights(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose weights would be refused, were they looked at."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")
    return folder


def test_the_defaults_stop_at_the_end_token_and_at_a_new_turn(engine: Engine) -> None:
    defaults = engine.defaults
    assert defaults.stop_token_ids == {2} | {4, 6, 7}
    assert defaults.max_new_tokens == 32
    assert defaults.sampling.top_k == 20


def test_a_model_that_does_not_chat_stops_at_the_end_token_only(engine: Engine) -> None:
    defaults = GenerationConfig(sampling=SamplingParams(temperature=0))
    base = Engine(engine.model, engine.tokenizer, defaults, engine.context)
    assert base.defaults.stop_token_ids == {2}


def test_settings_change_what_is_given_and_nothing_else(engine: Engine) -> None:
    changed = engine.settings(temperature=0.0, max_new_tokens=3, stop=("x",), top_k=None)
    assert changed.sampling == replace(engine.defaults.sampling, temperature=0.0)
    assert (changed.max_new_tokens, changed.stop) == (3, ("x",))
    assert changed.stop_token_ids == engine.defaults.stop_token_ids
    assert engine.settings() == engine.defaults


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(engine: Engine) -> None:
    small = random_model(M1Config.from_dict(TINY | {"vocab_size": 399}))
    with pytest.raises(TokenizerError, match=r"has 400 tokens, the model only 399; .*belong to"):
        Engine(small, engine.tokenizer, engine.generation, engine.context)


def test_the_context_is_as_large_as_was_asked_for(tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint, context_tokens=20)
    assert engine.context.capacity == 20
    settings = engine.settings(temperature=0.0, max_new_tokens=100)
    *_, last = engine.complete("heart", replace(settings, stop_token_ids=frozenset()))
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.CONTEXT


def test_without_being_asked_the_context_is_no_larger_than_the_model_takes(engine: Engine) -> None:
    assert engine.context.capacity == TINY["max_position_embeddings"]


@pytest.mark.parametrize("context_tokens", [-1, 257])
def test_a_context_that_the_model_cannot_have_is_refused_before_weights_are_read(
    without_weights: Path, context_tokens: int
) -> None:
    with pytest.raises(ContextLengthError, match=r"this model takes 1 to 256. Choose --ctx-size"):
        Engine.load(without_weights, context_tokens=context_tokens)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", ConfigError),
        ("generation_config.json", ConfigError),
        ("tokenizer_config.json", TokenizerError),
        ("tokenizer.model", TokenizerError),
    ],
)
def test_a_damaged_small_file_is_noticed_before_weights_are_read(
    without_weights: Path, name: str, kind: type[CheckpointError]
) -> None:
    (without_weights / name).write_text("{")
    with pytest.raises(kind, match=name):
        Engine.load(without_weights)


def test_a_loaded_engine_spares_what_a_prompt_takes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for short, another in ((0, True), (1, False)):
        engine = Engine.load(tiny_checkpoint)
        assert engine.placement is not None
        spared = demand(tiny_checkpoint, engine.placement).workspace
        left = 2 * engine.context.cache.nbytes + spared - short
        monkeypatch.setattr(contexts, "room", lambda device, left=left: left)
        assert (engine.contexts.of(1) is not engine.contexts.of(2)) == another
