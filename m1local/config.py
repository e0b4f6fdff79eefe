"""The model's configuration, read strictly from config.json.

What it is: the numbers the forward pass needs, under the names config.json gives them. What it is
not: a source of defaults. A missing key, a wrong type or a value this runtime does not compute is
a `ConfigError` that names the key, because the vendor's own class has defaults of another model
(4096 wide, 32 layers) and a silent fallback would run and answer nonsense.
Facts: config.json of baichuan-inc/Baichuan-M1-14B-Instruct; arXiv 2502.12671.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from m1local.errors import ConfigError
from m1local.folder import read_json_object

ARCHITECTURE = "BaichuanM1ForCausalLM"
MODEL_TYPE = "baichuan_m1"

POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_swa_attention_heads",
    "num_swa_key_value_heads",
    "sliding_window",
    "conv_window",
    "max_position_embeddings",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
POSITIVE_NUMBERS = ("rope_theta", "rms_norm_eps")

# What this forward pass computes; any other value would need other code.
ONLY_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How one layer's attention heads are laid out; `window` is None in a global layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class M1Config:
    """A Baichuan-M1 model's shape; the field names are the keys of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_swa_attention_heads: int
    num_swa_key_value_heads: int
    sliding_window: int
    sliding_window_layers: frozenset[int]
    conv_window: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> Self:
        """Read the configuration, or raise `ConfigError` naming the key that is wrong."""
        _refuse_foreign_model(raw, where)
        _value(raw, "hidden_act", where)
        for key, allowed in ONLY_SUPPORTED.items():
            if raw.get(key, allowed[0]) not in allowed:
                raise ConfigError(
                    f"{where}: {key} is {raw[key]!r}; only {allowed[0]!r} is supported."
                )
        values: dict[str, Any] = {key: _integer(raw, key, 1, where) for key in POSITIVE_INTEGERS}
        values |= {key: _integer(raw, key, 0, where) for key in TOKEN_IDS}
        values |= {key: _number(raw, key, where) for key in POSITIVE_NUMBERS}
        values["sliding_window_layers"] = _layers(raw, values["num_hidden_layers"], where)
        values["tie_word_embeddings"] = _flag(raw, "tie_word_embeddings", where)
        config = cls(**values)
        config._check_shape(where)
        return config

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read `config.json`; raises `ConfigError` when it is no JSON object or not an M1."""
        return cls.from_dict(read_json_object(path), where=str(path))

    def heads(self, layer: int) -> HeadLayout:
        """The head layout of `layer`: sliding and global layers differ."""
        if layer in self.sliding_window_layers:
            num_heads, num_kv_heads = self.num_swa_attention_heads, self.num_swa_key_value_heads
            window: int | None = self.sliding_window
        else:
            num_heads, num_kv_heads = self.num_attention_heads, self.num_key_value_heads
            window = None
        return HeadLayout(num_heads, num_kv_heads, self.hidden_size // num_heads, window)

    def _check_shape(self, where: str) -> None:
        if self.conv_window != 2:
            raise ConfigError(f"{where}: conv_window is {self.conv_window}; only 2 is supported.")
        for heads_key, kv_key in (
            ("num_attention_heads", "num_key_value_heads"),
            ("num_swa_attention_heads", "num_swa_key_value_heads"),
        ):
            num_heads, num_kv_heads = getattr(self, heads_key), getattr(self, kv_key)
            if self.hidden_size % num_heads or (self.hidden_size // num_heads) % 2:
                raise ConfigError(
                    f"{where}: hidden_size {self.hidden_size} does not split into "
                    f"{heads_key} = {num_heads} heads of even width."
                )
            if num_heads % num_kv_heads:
                raise ConfigError(
                    f"{where}: {heads_key} = {num_heads} is no multiple of {kv_key} = "
                    f"{num_kv_heads}."
                )
        for key in TOKEN_IDS:
            if getattr(self, key) >= self.vocab_size:
                raise ConfigError(f"{where}: {key} lies outside vocab_size {self.vocab_size}.")


def _refuse_foreign_model(raw: Mapping[str, Any], where: str) -> None:
    architectures = raw.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    model_type = raw.get("model_type")
    if model_type == MODEL_TYPE or (model_type is None and ARCHITECTURE in names):
        return
    found = model_type or ", ".join(names) or "no model_type"
    raise ConfigError(f"{where}: this is {found}; m1local runs {MODEL_TYPE} (Baichuan-M1) only.")


def _value(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in raw:
        raise ConfigError(f"{where}: the key {key!r} is missing; fetch the original file again.")
    return raw[key]


def _integer(raw: Mapping[str, Any], key: str, least: int, where: str) -> int:
    value = _value(raw, key, where)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: {key} is {value!r}, expected an integer from {least} up.")
    return value


def _number(raw: Mapping[str, Any], key: str, where: str) -> float:
    value = _value(raw, key, where)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ConfigError(f"{where}: {key} is {value!r}, expected a positive number.")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {value!r}, expected true or false.")
    return value


def _layers(raw: Mapping[str, Any], num_layers: int, where: str) -> frozenset[int]:
    value = _value(raw, "sliding_window_layers", where)
    if not isinstance(value, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < num_layers
        for item in value
    ):
        raise ConfigError(
            f"{where}: sliding_window_layers is {value!r}, expected a list of layer numbers "
            f"below num_hidden_layers = {num_layers}."
        )
    return frozenset(value)
