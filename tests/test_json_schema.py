"""Answers by a JSON schema: whatever a model would rather say, the answer is valid JSON of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from m1local.engine import Engine
from m1local.errors import SamplingError
from m1local.generate import Finished, FinishReason, TextDelta
from m1local.json_schema import JsonSchema, check_schema
from m1local.sampling import Sampler, SamplingParams
from m1local.tokenizer import M1Tokenizer

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "病": {"type": "string", "maxLength": 8},
            "severe": {"type": "boolean"},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["病", "severe", "days"],
        "additionalProperties": False,
    },
    ensure_ascii=False,
)
END = 2

pytest.importorskip("llguidance", reason="pip install -e '.[json]'")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drawn_ends_as_json_of_the_schema(tokenizer: M1Tokenizer, seed: int) -> None:
    constraint = JsonSchema(SCHEMA, tokenizer, frozenset({END}))
    sampler = Sampler(
        SamplingParams(temperature=1.0, seed=seed), tokenizer.vocab_size, constraint=constraint
    )
    noise = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    while not sampler.finished:
        token_id = sampler(3 * torch.randn(tokenizer.vocab_size, generator=noise))
        if token_id == END:
            break
        token_ids.append(token_id)
        assert len(token_ids) < 2000
    answer = json.loads(tokenizer.decode(token_ids))
    assert list(answer) == ["病", "severe", "days"]
    assert len(answer["病"]) <= 8
    assert isinstance(answer["severe"], bool)
    assert 0 <= answer["days"] <= 99


def test_a_token_that_ends_an_answer_never_comes_as_text(tokenizer: M1Tokenizer) -> None:
    """Some of those have a text, as markers of the chat have, which a string might hold."""
    marker = next(i for i, text in enumerate(tokenizer.token_bytes) if text.isalpha())
    constraint = JsonSchema(SCHEMA, tokenizer, frozenset({END, marker}))
    sampler = Sampler(SamplingParams(temperature=0), tokenizer.vocab_size, constraint=constraint)
    noise, token_ids = torch.Generator().manual_seed(1), list[int]()
    while not sampler.finished and len(token_ids) < 2000:
        logits = torch.randn(tokenizer.vocab_size, generator=noise)
        logits[marker] = 9
        token_ids.append(sampler(logits))
        if token_ids[-1] in (END, marker):
            token_ids.pop()
            break
    assert json.loads(tokenizer.decode(token_ids)).keys() == {"病", "severe", "days"}


def test_an_engine_answers_by_a_schema_and_stops(tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint)
    settings = engine.settings(json_schema=SCHEMA, max_new_tokens=200, temperature=1.0, seed=3)
    *events, end = engine.complete("heart", settings)
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.STOP
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert json.loads(text).keys() == {"病", "severe", "days"}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ("{", "is no JSON .*give a schema such as"),
        ("[]", "is a list; it must be an object"),
        ('{"type": "wish"}', "cannot be used: .*wish"),
        ('{"$ref": "https://example.org/schema"}', "cannot be used: .*not fetch"),
    ],
)
def test_a_schema_that_is_none_is_refused_in_one_line(schema: str, problem: str) -> None:
    with pytest.raises(SamplingError, match=problem) as caught:
        check_schema(schema)
    assert "\n" not in str(caught.value)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SamplingError, match=r"pip install 'm1local\[json\]'"):
        check_schema("{}")
