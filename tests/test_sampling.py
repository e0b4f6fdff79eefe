"""Samplers against a slow textbook version, and the defaults a checkpoint brings along.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m1local.errors import ConfigError, M1Error, SamplingError
from m1local.generation_config import GenerationConfig
from m1local.sampling import Sampler, SamplingParams

VOCAB_SIZE = 24
# As published with Baichuan-M1-14B-Instruct.
M1_GENERATION: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
    "repetition_penalty": 1.05,
    "max_new_tokens": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "user_token_id": 73,
    "assistant_token_id": 74,
}
PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_k=1000),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=1.0, top_p=0.95),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=1.0, repetition_penalty=1.5),
    SamplingParams(temperature=1.0, repetition_penalty=0.5),
    SamplingParams(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05),
    SamplingParams(temperature=1.7, top_k=12, top_p=0.8, min_p=0.2, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, repeat_last_n=2),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, repeat_last_n=0),
    SamplingParams(temperature=1.0, presence_penalty=0.7),
    SamplingParams(temperature=1.0, frequency_penalty=0.4, repeat_last_n=1000),
    SamplingParams(temperature=1.0, presence_penalty=-0.5, frequency_penalty=0.4, repeat_last_n=4),
    SamplingParams(temperature=1.0, dry_multiplier=0.8),
    SamplingParams(temperature=1.0, dry_multiplier=0.8, dry_base=3, dry_allowed_length=1),
    SamplingParams(temperature=1.0, dry_multiplier=0.8, dry_penalty_last_n=4, dry_allowed_length=1),
    SamplingParams(temperature=1.0, dry_multiplier=0.8, dry_penalty_last_n=0),
    SamplingParams(temperature=1.0, logit_bias=((3, 2.5), (4, -math.inf), (5, -1.0))),
    SamplingParams(
        temperature=0.8,
        top_k=9,
        top_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        dry_multiplier=1.0,
        dry_allowed_length=1,
        logit_bias=((7, 1.0),),
    ),
]
BREAKERS = frozenset({0, 1})


def softmax(scores: dict[int, float]) -> dict[int, float]:
    greatest = max(scores.values())
    weights = {i: math.exp(score - greatest) for i, score in scores.items()}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def last(tokens: list[int], count: int) -> list[int]:
    return tokens if count == -1 else tokens[len(tokens) - min(count, len(tokens)) :]


def textbook_dry(tokens: list[int], params: SamplingParams) -> dict[int, float]:
    """For every earlier place: how far the tokens before it are those at the end."""
    tokens = last(tokens, params.dry_penalty_last_n)
    found: dict[int, float] = {}
    for i, token in enumerate(tokens[:-1]):
        length = 0
        while length <= i and tokens[i - length] == tokens[-1 - length]:
            if token in BREAKERS or tokens[i - length] in BREAKERS:
                break
            length += 1
        following = tokens[i + 1]
        if length >= params.dry_allowed_length and following not in BREAKERS:
            exponent = length - params.dry_allowed_length
            penalty = params.dry_multiplier * params.dry_base**exponent
            found[following] = max(penalty, found.get(following, 0))
    return found


def textbook(logits: Tensor, params: SamplingParams, seen: Iterable[int]) -> dict[int, float]:
    """The probability of each token that may be drawn, one filter after the other."""
    scores = dict(enumerate(logits.tolist()))
    tokens = list(seen)
    for i, count in Counter(last(tokens, params.repeat_last_n)).items():
        factor = params.repetition_penalty
        scores[i] = scores[i] / factor if scores[i] > 0 else scores[i] * factor
        scores[i] -= params.presence_penalty + params.frequency_penalty * count
    for i, penalty in textbook_dry(tokens, params).items():
        scores[i] -= penalty
    for i, bias in params.logit_bias:
        scores[i] += bias
    scores = {i: score / params.temperature for i, score in scores.items()}
    ranking = sorted(scores, key=lambda i: -scores[i])
    ranking = ranking[: params.top_k]
    probabilities = softmax({i: scores[i] for i in ranking})
    nucleus: list[int] = []
    for i in ranking:  # the fewest that reach top_p together
        gathered = sum(probabilities[j] for j in nucleus)
        if nucleus and params.top_p < 1 and gathered >= params.top_p:
            break
        nucleus.append(i)
    probabilities = softmax({i: scores[i] for i in nucleus})
    likely = max(probabilities.values())
    return softmax({i: scores[i] for i in nucleus if probabilities[i] >= params.min_p * likely})


def distribution(
    monkeypatch: pytest.MonkeyPatch, logits: Tensor, params: SamplingParams, seen: Iterable[int]
) -> dict[int, float]:
    """The probability of each token that the sampler may draw, read off where it draws."""
    weights: list[Tensor] = []

    def next_place(given: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
        weights.append(given)
        return torch.tensor([len(weights) - 1])  # so the n-th sampler draws from the n-th place

    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", next_place)
        while not weights or len(weights) < weights[0].numel():
            sampler = Sampler(params, logits.numel(), breakers=BREAKERS)
            sampler.observe(seen)
            token_id = sampler(logits)
            found[token_id] = float(weights[-1][len(weights) - 1] / weights[-1].sum())
    return {i: probability for i, probability in found.items() if probability > 0}


def random_logits(seed: int, size: int = VOCAB_SIZE) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("params", PARAMS, ids=repr)
def test_probabilities_are_those_of_the_textbook(
    monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    for seed in range(20):
        vocabulary = range(VOCAB_SIZE if seed % 2 else 4)  # few tokens repeat much
        logits, seen = random_logits(seed), random.Random(seed).choices(vocabulary, k=seed)
        found = distribution(monkeypatch, logits, params, seen)
        expected = textbook(logits, params, seen)
        assert found.keys() == {i for i, probability in expected.items() if probability > 0}
        expected = {i: expected[i] for i in found}
        # float32 against Python's float64
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    params, logits, count = (
        SamplingParams(temperature=1.5, top_k=8, seed=0),
        random_logits(3),
        20_000,
    )
    sampler = Sampler(params, VOCAB_SIZE)
    drawn = Counter(sampler(logits) for _ in range(count))
    expected = textbook(logits, params, [])
    assert drawn.keys() == expected.keys()
    for token_id, probability in expected.items():
        spread = math.sqrt(count * probability * (1 - probability))
        assert abs(drawn[token_id] - count * probability) < 5 * spread


def test_what_was_drawn_is_penalized_like_the_prompt() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, -1.0])
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=3), 4)
    assert [sampler(logits) for _ in range(4)] == [0, 1, 2, 0]


def test_a_prompt_token_is_penalized_once_however_often_it_occurs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, logits = SamplingParams(temperature=1.0, repetition_penalty=1.5), random_logits(0)
    once = distribution(monkeypatch, logits, params, [3, 5])
    assert once == distribution(monkeypatch, logits, params, [3, 5, 3, 3, 5])


def test_an_empty_prompt_is_observed_without_harm() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2), 4)
    sampler.observe([])
    assert sampler(torch.tensor([1.0, 4.0, 2.0, 3.0])) == 1


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), VOCAB_SIZE)
        return [sampler(random_logits(0)) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_a_draw_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    for seed in (None, 1):
        Sampler(SamplingParams(temperature=1.0, seed=seed), VOCAB_SIZE)(random_logits(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [None, 0, 1, 2**63 - 1])
def test_temperature_zero_takes_the_most_likely_whatever_the_seed(seed: int | None) -> None:
    params = SamplingParams(temperature=0, top_p=0.1, min_p=1.0, seed=seed)
    for number in range(20):
        logits = random_logits(number)
        assert Sampler(params, VOCAB_SIZE)(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-45, seed=0),
        SamplingParams(temperature=1e-300, seed=0),
        SamplingParams(temperature=1.0, repetition_penalty=1e-300, seed=0),
    ],
    ids=repr,
)
def test_a_value_next_to_nothing_still_draws(params: SamplingParams) -> None:
    logits = random_logits(0)
    likely = int(logits.argmax())
    sampler = Sampler(params, VOCAB_SIZE)
    sampler.observe([likely])
    assert sampler(logits) == likely


def test_logits_in_16_bits_and_non_contiguous_are_taken() -> None:
    logits = torch.stack((random_logits(0), random_logits(1)), dim=1).to(torch.bfloat16)[:, 0]
    assert Sampler(SamplingParams(temperature=0), VOCAB_SIZE)(logits) == int(logits.argmax())


def test_rows_of_the_model_that_the_tokenizer_has_no_token_for_are_never_drawn() -> None:
    logits = torch.cat((random_logits(0), torch.full((8,), 99.0)))
    params = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=0)
    for temperature in (0.0, 1.0):
        sampler = Sampler(replace(params, temperature=temperature), VOCAB_SIZE)
        assert all(sampler(logits) < VOCAB_SIZE for _ in range(50))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_values_that_are_no_numbers_are_reported(value: float, temperature: float) -> None:
    logits = random_logits(0)
    logits[3] = value
    with pytest.raises(M1Error, match=r"values that are no numbers; the checkpoint is .*quantize"):
        Sampler(SamplingParams(temperature=temperature), VOCAB_SIZE)(logits)


@pytest.mark.parametrize(
    ("name", "flag", "values", "expected"),
    [
        ("temperature", "temperature", (-0.1, 100.1, math.nan, math.inf), "0 to 100"),
        ("top_k", "top-k", (-1,), r"0 \(off\) or more"),
        ("top_p", "top-p", (0.0, -0.1, 1.01, math.nan), "above 0, up to 1"),
        ("min_p", "min-p", (-0.1, 1.01, math.nan), "0 to 1"),
        ("repetition_penalty", "repeat-penalty", (0.0, -1.0, 10.1, math.nan), "above 0, up to 10"),
        ("seed", "seed", (-1, 2**63), "0 to 2.63 - 1"),
        ("presence_penalty", "presence-penalty", (-101, 101, math.nan), "-100 to 100"),
        ("frequency_penalty", "frequency-penalty", (-101, math.inf), "-100 to 100"),
        ("repeat_last_n", "repeat-last-n", (-2,), "-1 .all., 0 .off. or more"),
        ("dry_multiplier", "dry-multiplier", (-1, math.nan), "0 to 100"),
        ("dry_base", "dry-base", (0.5, math.nan), "1 to 100"),
        ("dry_allowed_length", "dry-allowed-length", (0,), "1 or more"),
        ("dry_penalty_last_n", "dry-penalty-last-n", (-2,), "-1 .all."),
    ],
)
def test_a_value_out_of_its_range_names_flag_value_and_range(
    name: str, flag: str, values: tuple[float, ...], expected: str
) -> None:
    changes: list[dict[str, Any]] = [{name: value} for value in values]
    for change in changes:
        with pytest.raises(SamplingError, match=rf"^{flag} is {change[name]}; .* {expected}"):
            SamplingParams(**change)


@pytest.mark.parametrize("bias", [math.inf, math.nan])
def test_a_bias_that_is_no_number_is_refused(bias: float) -> None:
    with pytest.raises(SamplingError, match=r"logit-bias is .*-inf to ban"):
        SamplingParams(logit_bias=((1, bias),))


def test_a_bias_on_a_token_that_is_none_is_refused() -> None:
    with pytest.raises(SamplingError, match="names the token 24; this model has 0 to 23"):
        Sampler(SamplingParams(logit_bias=((24, 1.0),)), VOCAB_SIZE)


def test_when_every_token_is_banned_it_is_said() -> None:
    banned = SamplingParams(logit_bias=tuple((i, -math.inf) for i in range(VOCAB_SIZE)))
    with pytest.raises(SamplingError, match="bans every token"):
        Sampler(banned, VOCAB_SIZE)(random_logits(0))


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=1, top_p=1, min_p=0, repetition_penalty=10, seed=0)
    SamplingParams(temperature=100, min_p=1, seed=2**63 - 1)


def test_the_defaults_of_the_real_model_are_read() -> None:
    assert GenerationConfig.from_dict(M1_GENERATION) == GenerationConfig(
        sampling=SamplingParams(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05),
        max_new_tokens=2048,
        stop_token_ids=frozenset({2}),
        is_chat=True,
    )


def test_without_the_file_nothing_is_filtered_and_the_model_does_not_chat(tmp_path: Path) -> None:
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(
        sampling=SamplingParams(temperature=1.0), stop_token_ids=frozenset(), is_chat=False
    )


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"do_sample": False}, "sampling.temperature", 0.0),
        ({"top_k": 0}, "sampling.top_k", None),  # Hugging Face's word for "off"
        ({"top_k": None}, "sampling.top_k", None),
        ({"min_p": None}, "sampling.min_p", 0.0),
        ({"min_p": 0.05}, "sampling.min_p", 0.05),
        ({"eos_token_id": [2, 73]}, "stop_token_ids", {2, 73}),
        ({"eos_token_id": None}, "stop_token_ids", frozenset()),
        ({"assistant_token_id": None}, "is_chat", False),
        ({"transformers_version": "4.48"}, "max_new_tokens", 2048),
    ],
    ids=str,
)
def test_a_key_is_taken_over(changes: dict[str, Any], attribute: str, expected: object) -> None:
    value: object = GenerationConfig.from_dict(M1_GENERATION | changes)
    for name in attribute.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": [1]},
        {"top_k": "five"},
        {"top_k": -5},
        {"top_k": math.inf},
        {"top_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": "many"},
        {"max_new_tokens": -1},
        {"eos_token_id": "</s>"},
        {"eos_token_id": ["</s>"]},
        {"eos_token_id": [[2]]},
    ],
    ids=str,
)
def test_a_malformed_value_is_reported_with_its_file(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(M1_GENERATION | changes))
    with pytest.raises(ConfigError, match=r"generation_config.json is malformed \(.+\); mend it"):
        GenerationConfig.from_folder(tmp_path)


@pytest.mark.parametrize(("content", "problem"), [("{", "no valid JSON"), ("[]", "holds a list")])
def test_a_broken_file_is_reported(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"generation_config.json .*{problem}"):
        GenerationConfig.from_folder(tmp_path)
