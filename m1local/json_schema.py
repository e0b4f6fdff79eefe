"""Answers that are JSON: which tokens may come next, by a JSON schema.

What it is: the one file that knows llguidance (extra `json`), which turns a schema into a mask over
the vocabulary after every token. What it is not: a check afterwards; an answer that ends by itself
is valid because nothing else could be drawn. One cut off by a limit is incomplete.
"""

import functools
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m1local.errors import SamplingError
from m1local.tokenizer import M1Tokenizer

INSTALL = "Answers by a JSON schema need llguidance: pip install 'm1local[json]'."
# Room for indented JSON, but not for the endless white space that models fall into.
_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\n]{0,16}"}


class JsonSchema:
    """A `sampling.Constraint`: the answer is JSON of one schema, and ends where it is whole."""

    def __init__(self, schema: str, tokenizer: M1Tokenizer, stop_token_ids: frozenset[int]) -> None:
        """Compile `schema`, the text of a JSON schema; `{}` allows any JSON.

        The answer may end with one of `stop_token_ids`. Raises SamplingError for a schema that is
        none, or uses what cannot be kept, and where llguidance is not installed.
        """
        check_schema(schema)
        from llguidance import LLMatcher  # an extra; only where a schema is asked for

        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        self._vocab_size = tokenizer.vocab_size
        self._matcher = LLMatcher(_vocabulary(tokenizer, stop_token_ids), grammar, log_level=0)
        self._raise_error("The JSON schema cannot be used")

    def allowed(self) -> Tensor:
        """Whether each token may come now: (V,) bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._raise_error("The answer left the JSON schema")
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(allowed).bool()

    def accept(self, token_id: int) -> None:
        """Go on after `token_id`."""
        self._matcher.consume_token(token_id)
        self._raise_error("The answer left the JSON schema")

    @property
    def finished(self) -> bool:
        """Whether the JSON is whole and nothing may follow."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def _raise_error(self, what: str) -> None:
        if self._matcher.is_error():
            problem = " ".join(self._matcher.get_error().split())
            raise SamplingError(f"{what}: {problem}")


def check_schema(schema: str) -> None:
    """Raise SamplingError unless `schema` can be used, before a model is loaded."""
    try:
        parsed = json.loads(schema)
    except json.JSONDecodeError as error:
        raise SamplingError(
            f"The JSON schema is no JSON ({error}); give a schema such as "
            '{"type": "object"}, or a file that holds one.'
        ) from error
    if not isinstance(parsed, dict):
        raise SamplingError(
            f"The JSON schema is a {type(parsed).__name__}; it must be an object such as "
            '{"type": "object"}.'
        )
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise SamplingError(INSTALL) from error
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    if problem and not problem.startswith("WARNING"):
        raise SamplingError(f"The JSON schema cannot be used: {' '.join(problem.split())}")


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: M1Tokenizer, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        token_bytes = tokenizer.token_bytes
        # What ends an answer must not come as text, though some of it has a text.
        special = [not text or i in stop_token_ids for i, text in enumerate(token_bytes)]
        self.special_token_ids = [i for i, known in enumerate(special) if known]
        self.tokens = [
            f"<special {i}>".encode() if special[i] else text for i, text in enumerate(token_bytes)
        ]
        self.eos_token_id = min(stop_token_ids)
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self._tokenizer.encode(text)


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: M1Tokenizer, stop_token_ids: frozenset[int]) -> Any:
    """Half a second for the real vocabulary; so once for each tokenizer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapper = TokenizerWrapper(_Vocabulary(tokenizer, stop_token_ids))
    return LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=sorted(stop_token_ids))
