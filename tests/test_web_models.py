"""The model panel's work, without a browser: quantizing a local folder, and changing the model."""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import rich.progress
import torch

from m1local import placement
from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.formats import FORMATS
from m1local.manifest import CheckpointManifest
from m1local_app import progress
from m1local_app.history import History
from m1local_app.kept import size_text
from m1local_quantize.pipeline import Planned
from tests.conftest import write_checkpoint
from tests.web_page import MARKS, Request

pytestmark = MARKS


@pytest.fixture
def panel(m1_home: Path, tmp_path: Path) -> Iterator[Any]:
    gradio = pytest.importorskip("gradio", reason="the page needs gradio")
    from m1local_app.web import parts as layout
    from m1local_app.web.desk import Desk
    from m1local_app.web.models import Models

    write_checkpoint(tmp_path / "tiny")
    engine = Engine.load(tmp_path / "tiny")
    with History.open() as store:
        desk = Desk(engine, tmp_path / "tiny", "tiny", engine.defaults, store)
        with gradio.Blocks(analytics_enabled=False):
            parts = layout.build(desk)
        yield Models(desk, parts)


def said(steps: Iterator[Any], panel: Any) -> list[str]:
    return [step[panel._parts.work] for step in steps if panel._parts.work in step]


def test_a_local_folder_is_quantized_and_then_talked_to(panel: Any, tmp_path: Path) -> None:
    desk = panel._desk
    tab = desk.tab("one")
    before = list(tab.conversation.send("hello"))
    assert before
    kept, first = tab.conversation.id, desk.engine
    lines = said(panel.quantize(str(tmp_path / "tiny"), "int8", Request()), panel)
    assert any("Quantizing to int8" in line for line in lines)
    name = next(folder.name for folder in (tmp_path / "home" / "models").iterdir())
    assert name in lines[-1]
    assert said(panel.switch(name), panel)[-1].count(name) == 1
    assert desk.label == name
    assert desk.engine is not first
    # The same conversation at once, with the other model; the first one is held by nobody.
    assert tab.conversation.session.engine is desk.engine
    assert tab.conversation.id == kept
    assert list(tab.conversation.send("more"))
    assert "int8" in panel.show()[panel._parts.model]


def test_on_a_card_the_present_model_makes_room_for_the_next(
    panel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, load, alive = panel._desk, Engine.load, list[bool]()
    tab = desk.tab("one")
    assert list(tab.conversation.send("hello"))
    held = weakref.ref(desk.engine.model), weakref.ref(desk.engine.context.cache)
    write_checkpoint(tmp_path / "other", seed=3)

    def watched(folder: Path, **named: Any) -> Engine:
        alive.append(any(each() is not None for each in held))
        desk.engine.contexts.capacity + desk.engine.context.cache.nbytes  # what the page shows
        return load(folder, **named)

    monkeypatch.setattr(Engine, "on_card", True)
    monkeypatch.setattr(Engine, "load", watched)
    desk.change_model(tmp_path / "other", "other")
    assert alive == [False]
    assert (desk.label, tab.conversation.session.engine) == ("other", desk.engine)
    assert list(tab.conversation.send("more"))


def contents(tab: Any) -> list[str]:
    """What was said; a model of random weights may say NUL, which the history keeps otherwise."""
    said = [turn.message.content for turn in tab.conversation.session.turns]
    return [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in said]


def test_on_a_card_the_present_model_comes_back_where_the_next_cannot_be_loaded(
    panel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = panel._desk
    tab = desk.tab("one")
    assert list(tab.conversation.send("hello"))
    said_before = contents(tab)
    load, halves, alive = Engine.load, list[Any](), list[bool]()

    def failing(folder: Path, **named: Any) -> Engine:
        if folder == tmp_path / "tiny":
            alive.append(halves[0]() is not None)
            return load(folder, **named)
        half = torch.nn.Linear(2, 2)  # of a model, held by this function until it is forgotten
        halves.append(weakref.ref(half))
        try:
            raise torch.OutOfMemoryError
        except RuntimeError as error:
            raise M1Error("no room") from error

    monkeypatch.setattr(Engine, "on_card", True)
    monkeypatch.setattr(Engine, "load", failing)
    with pytest.raises(M1Error, match="no room"):
        desk.change_model(tmp_path / "other", "other")
    assert alive == [False]
    assert (desk.label, desk.folder) == ("tiny", tmp_path / "tiny")
    assert contents(tab) == said_before
    assert list(tab.conversation.send("more"))


def test_the_kernels_are_those_of_the_checkpoint_s_formats(panel: Any, tmp_path: Path) -> None:
    assert "int4" not in panel.show()[panel._parts.model]
    assert said(panel.quantize(str(tmp_path / "tiny"), "int4", Request()), panel)
    (made,) = (tmp_path / "home" / "models").iterdir()
    said(panel.switch(made.name), panel)
    shown = panel.show()[panel._parts.model]
    named = {name for name in FORMATS if f"<dt>{name}</dt>" in shown}
    assert named == {spec.format for spec in CheckpointManifest.read(made).linears.values()}
    assert named == {"int4", "int8"}


def test_rate_and_time_left_are_the_terminal_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from m1local_app.web import models
    from m1local_app.web.tabs import Tab
    from m1local_quantize.passage import TensorWritten
    from m1local_quantize.plan import Plan

    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "Progress", lambda **_: rich.progress.Progress(
        disable=True, get_time=lambda: clock[0]))  # fmt: skip

    def events() -> Iterator[object]:
        clock[0] = 1.0
        plan = cast(Plan, SimpleNamespace(source_bytes=400 << 20))
        # An unfinished run goes on: what lay there already counts for no speed.
        yield Planned(plan, tmp_path, resumed_bytes=100 << 20, started_over=False)
        for second, done in enumerate((150, 200, 250)):
            clock[0] = second + 2.0
            yield TensorWritten(str(second), done << 20, 400 << 20)

    tab = cast(Tab, SimpleNamespace(cancelled=threading.Event()))
    drawn = list(models._drawn(events(), "int4", tab))
    assert "left" not in drawn[0]
    assert 'value="0.625"' in drawn[-1]
    assert "50.0 MiB/s, 0:00:03 left" in drawn[-1]


@pytest.mark.parametrize(("source", "recipe"), [("", "int8"), ("nowhere", "int8"), (".", "int8")])
def test_what_is_no_checkpoint_is_one_line(
    panel: Any, source: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = said(panel.quantize(source, recipe, Request()), panel)
    assert "m1-error" in line
    assert "Traceback" not in line


def test_what_is_kept_nowhere_goes_on_with_the_other_model_too(panel: Any) -> None:
    desk = panel._desk
    desk.store = None
    tab = desk.tab("one")
    list(tab.conversation.send("hello"))
    said(panel.switch("m1-tiny"), panel)
    assert tab.conversation.session.engine is desk.engine
    assert [message.role for message in tab.conversation.session.messages] == ["user", "assistant"]


def test_memory_is_planned_by_the_loaded_tensors(panel: Any) -> None:
    engine = panel._desk.engine
    weights = sum(each.nbytes for each in engine.model.state_dict().values())
    planned = panel._planned()
    assert f"weights {size_text(weights)}" in planned
    assert f"one context {size_text(engine.context.cache.nbytes)}" in planned
    needed = placement.demand(panel._desk.folder, engine.placement)
    rest = needed.workspace + needed.graphs + needed.gaps + needed.runtime
    assert f"program and workspace {size_text(rest)}" in planned


def test_the_workspace_follows_context_and_device(
    panel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "compute_dtype", lambda device: torch.bfloat16)
    folder, placed = panel._desk.folder, panel._desk.engine.placement
    half = replace(placed.setting, context_tokens=placed.setting.context_tokens // 2)
    shorter = placement.demand(folder, replace(placed, setting=half))
    assert shorter.workspace < placement.demand(folder, placed).workspace
    card = placement.settled(placed.setting, 4, torch.device("cuda"))
    on_card = placement.demand(folder, card)
    assert on_card.graphs > 0
    assert on_card.runtime > placement.demand(folder, placed).runtime
    without_layers = replace(placed, setting=replace(placed.setting, gpu_layers=0))
    assert placement.demand(folder, without_layers) == placement.demand(folder, placed)


def test_a_model_that_is_gone_leaves_the_old_one(panel: Any) -> None:
    assert "m1-error" in said(panel.switch("gone"), panel)[-1]
    assert "Choose one" in said(panel.switch(None), panel)[-1]
    assert panel._desk.label == "tiny"
