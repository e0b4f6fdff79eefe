"""What the terminal says of a model that lies on a card, with and without our kernels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m1local import placement
from m1local.cuda.transfer import Moved
from m1local.memory import Setting
from m1local.placement import Placement
from m1local_app import conversing


@pytest.mark.parametrize("why", ["", "Triton is not installed"])
def test_it_says_where_it_lies_and_what_is_slower(
    why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement, "why_plain", lambda card: why)
    engine: Any = SimpleNamespace(
        placement=Placement(torch.device("cuda"), 3, Setting(64)),
        loaded=Moved(3 << 30, 2.0),
        model=SimpleNamespace(config=SimpleNamespace(num_hidden_layers=5)),
    )
    conversing._tell_where(engine)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 5 layers on the card: 3.00 GiB in 2.0 s (1.6 GB/s)" in said
    assert ("do not run on this card, so all is slower: " + why in said) == bool(why)
