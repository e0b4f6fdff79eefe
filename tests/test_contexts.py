"""How many contexts memory has room for, beside what is taken later."""

import pytest
import torch

from m1local import contexts
from m1local.cache import KVCache
from m1local.context import Context
from m1local.contexts import ContextPool
from m1local.model import M1Model


def test_a_further_context_leaves_what_a_prompt_takes(
    tiny_model: M1Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KVCache.allocate(tiny_model.config, 32, dtype=torch.float32)
    first = Context(tiny_model, cache)
    monkeypatch.setattr(contexts, "room", lambda device: 2 * cache.nbytes + 999)
    for spared, another in ((999, True), (1000, False)):
        pool = ContextPool(first, spared)
        assert (pool.of(1) is not pool.of(2)) == another
