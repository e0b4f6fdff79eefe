"""config.json: read strictly, every mistake named by its key, no value ever guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from m1local.config import HeadLayout, M1Config
from m1local.errors import ConfigError
from tests.conftest import TINY

# The published values of Baichuan-M1-14B-Instruct.
M1_14B: dict[str, Any] = {
    "architectures": ["BaichuanM1ForCausalLM"],
    "model_type": "baichuan_m1",
    "vocab_size": 133120,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 20,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 40,
    "num_swa_key_value_heads": 8,
    "sliding_window": 8192,
    "sliding_window_layers": list(range(1, 40, 2)),
    "conv_window": 2,
    "max_position_embeddings": 32768,
    "model_max_length": 32768,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
}
INTEGERS = [key for key, value in TINY.items() if type(value) is int]
REQUIRED = [*INTEGERS, "rope_theta", "rms_norm_eps", "sliding_window_layers"]


def tiny(**changes: object) -> dict[str, Any]:
    return TINY | changes


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named_and_nothing_stands_in_for_it(key: str) -> None:
    raw = {name: value for name, value in TINY.items() if name != key}
    with pytest.raises(ConfigError, match=rf"^config.json: the key '{key}' is missing; fetch"):
        M1Config.from_dict(raw)


def test_every_field_without_a_default_was_tested_for_being_missing() -> None:
    assert set(M1Config.__slots__) - {"tie_word_embeddings"} == set(REQUIRED)


@pytest.mark.parametrize("value", ["64", 64.0, None, [64], True, -1], ids=repr)
@pytest.mark.parametrize("key", INTEGERS)
def test_an_integer_key_takes_only_integers_in_its_range(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: {key} is .*, expected an integer"):
        M1Config.from_dict(tiny(**{key: value}))


@pytest.mark.parametrize("key", [key for key in INTEGERS if not key.endswith("token_id")])
def test_a_size_of_zero_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is 0, expected an integer from 1 up"):
        M1Config.from_dict(tiny(**{key: 0}))


@pytest.mark.parametrize(
    "value", ["1e6", None, True, 0, -1.0, float("nan"), float("inf"), [1.0]], ids=repr
)
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_number_key_takes_only_positive_finite_numbers(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: {key} is .*, expected a positive"):
        M1Config.from_dict(tiny(**{key: value}))


def test_a_whole_number_may_stand_where_a_number_is_expected() -> None:
    theta = M1Config.from_dict(tiny(rope_theta=1000000)).rope_theta
    assert isinstance(theta, float)
    assert theta == 1e6


@pytest.mark.parametrize(
    "value",
    [None, 3, "1,3", {"1": True}, [1, "3"], [1, 3.0], [True], [-1], [4], [[1]]],
    ids=repr,
)
def test_malformed_sliding_window_layers_are_refused(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"sliding_window_layers is .* below num_hidden_layers = 4"
    ):
        M1Config.from_dict(tiny(sliding_window_layers=value))


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("hidden_act", "gelu", "'silu'"),
        ("hidden_act", None, "'silu'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "None"),
        ("attention_bias", True, "None"),
        ("mlp_bias", True, "None"),
        ("conv_window", 3, "2"),
        ("conv_window", 1, "2"),
    ],
)
def test_what_this_forward_pass_does_not_compute_is_refused(
    key: str, value: object, supported: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*; only {supported} is supported"):
        M1Config.from_dict(tiny(**{key: value}))


def test_a_missing_activation_is_named_like_any_other_key() -> None:
    raw = {name: value for name, value in TINY.items() if name != "hidden_act"}
    with pytest.raises(ConfigError, match="the key 'hidden_act' is missing"):
        M1Config.from_dict(raw)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_scaling", None), ("attention_bias", False), ("mlp_bias", None)]
)
def test_a_key_that_says_what_is_computed_anyway_is_accepted(key: str, value: object) -> None:
    assert M1Config.from_dict(tiny(**{key: value})) == M1Config.from_dict(TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6}, "hidden_size 64 does not split into num_attention_heads = 6"),
        ({"num_swa_attention_heads": 5}, "does not split into num_swa_attention_heads = 5"),
        ({"num_attention_heads": 64}, "num_attention_heads = 64 heads of even width"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value"),
        ({"num_swa_key_value_heads": 3}, "num_swa_attention_heads = 8 is no multiple of num_swa"),
        ({"num_key_value_heads": 8}, "num_attention_heads = 4 is no multiple of num_key_value"),
    ],
    ids=str,
)
def test_heads_that_do_not_divide_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        M1Config.from_dict(tiny(**changes))


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_id_outside_the_vocabulary_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} lies outside vocab_size 512"):
        M1Config.from_dict(tiny(**{key: 512}))


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (LLAMA, "llama"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({}, "no model_type"),
        (tiny(model_type="baichuan"), "baichuan"),  # the vendor's first model, another one
    ],
    ids=["llama", "llama without model_type", "empty", "first Baichuan"],
)
def test_a_foreign_model_is_called_by_its_name(raw: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"this is {found}; m1local runs baichuan_m1"):
        M1Config.from_dict(raw)


def test_architectures_that_are_no_list_are_refused() -> None:
    with pytest.raises(ConfigError, match="this is no model_type; m1local runs baichuan_m1"):
        M1Config.from_dict({"architectures": 5})


@pytest.mark.parametrize("missing", ["architectures", "model_type"])
def test_either_name_of_the_model_suffices(missing: str) -> None:
    raw = {name: value for name, value in TINY.items() if name != missing}
    assert M1Config.from_dict(raw) == M1Config.from_dict(TINY)


def test_unknown_keys_are_ignored() -> None:
    raw = tiny(torch_dtype="bfloat16", transformers_version="4.48", auto_map={"x": "y"})
    assert M1Config.from_dict(raw) == M1Config.from_dict(TINY)


def test_the_file_is_named_in_every_message(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny(hidden_size="wide")))
    with pytest.raises(ConfigError) as caught:
        M1Config.from_file(path)
    assert str(caught.value).startswith(f"{path}: hidden_size is 'wide'")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json; is it the folder of a Baichuan-M1"):
        M1Config.from_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"vocab_size": 512,}',
        b"\xff\xfe{}",
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b'{"a": ' * 100_000,
    ],
    ids=["empty", "cut off", "trailing comma", "no UTF-8", "endless number", "endless nesting"],
)
def test_broken_json_is_reported_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json is no valid JSON .*fetch the file again"):
        M1Config.from_file(path)


@pytest.mark.parametrize("content", ["[]", '"text"', "null", "3"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config.json holds a \w+, expected a JSON object"):
        M1Config.from_file(path)


def test_a_folder_named_config_json_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.mkdir()
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        M1Config.from_file(path)


def test_sliding_and_global_layers_of_the_14b_differ_in_heads_and_window() -> None:
    config = M1Config.from_dict(M1_14B)
    assert [config.heads(layer) for layer in range(40)] == 20 * [
        HeadLayout(num_heads=20, num_kv_heads=2, head_dim=256, window=None),
        HeadLayout(num_heads=40, num_kv_heads=8, head_dim=128, window=8192),
    ]


def test_the_list_decides_which_layers_slide_and_not_their_parity() -> None:
    config = M1Config.from_dict(tiny(sliding_window_layers=[0, 3]))
    assert [config.heads(layer).window for layer in range(4)] == [8, None, None, 8]


def test_without_sliding_layers_all_are_global() -> None:
    config = M1Config.from_dict(tiny(sliding_window_layers=[]))
    assert {config.heads(layer) for layer in range(4)} == {HeadLayout(4, 2, 16, None)}


@pytest.mark.parametrize(("raw", "expected"), [(True, True), (False, False)])
def test_tied_embeddings_are_read(raw: bool, expected: bool) -> None:
    assert M1Config.from_dict(tiny(tie_word_embeddings=raw)).tie_word_embeddings is expected
