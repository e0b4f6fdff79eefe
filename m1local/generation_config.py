"""generation_config.json: how a model wants to be sampled, when it stops, whether it chats.

What it is: the checkpoint's own defaults, which a user's flags override. What it is not: required;
a Base model may come without one, and is then completed rather than chatted with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from m1local.errors import ConfigError, SamplingError
from m1local.folder import read_json_object
from m1local.sampling import SamplingParams

NAME = "generation_config.json"
DEFAULT_MAX_NEW_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Defaults of one checkpoint."""

    sampling: SamplingParams
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop_token_ids: frozenset[int] = frozenset()
    is_chat: bool = False  # Instruct models name the marker that begins an answer; Base ones don't

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the file where there is one; raises ConfigError where it is malformed."""
        path = folder / NAME
        return cls.from_dict(read_json_object(path) if path.exists() else {}, where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = NAME) -> Self:
        """Take over what is there; raises ConfigError for a value that cannot be."""
        raw = {key: value for key, value in raw.items() if value is not None}
        stop = raw.get("eos_token_id", [])
        sampled = raw.get("do_sample", True)
        try:
            max_new_tokens = int(raw.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS))
            if max_new_tokens < 0:
                raise ValueError(f"max_new_tokens is {max_new_tokens}")
            return cls(
                sampling=SamplingParams(
                    temperature=float(raw.get("temperature", 1.0)) if sampled else 0.0,
                    top_k=int(raw["top_k"]) or None if "top_k" in raw else None,
                    top_p=float(raw.get("top_p", 1.0)),
                    min_p=float(raw.get("min_p", 0.0)),
                    repetition_penalty=float(raw.get("repetition_penalty", 1.0)),
                ),
                max_new_tokens=max_new_tokens,
                stop_token_ids=frozenset(map(int, stop if isinstance(stop, list) else [stop])),
                is_chat="assistant_token_id" in raw,
            )
        except (TypeError, ValueError, OverflowError, SamplingError) as error:
            raise ConfigError(
                f"{where} is malformed ({error}); mend it, or fetch the file again."
            ) from error
