"""The model panel: what one talks to, on what, and changing it.

What it is: facts, a change of the checkpoint when nobody is being answered, and quantizing a local
folder with the pipeline's own events. What it is not: fetching; that is the command line's.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
import psutil

from m1local.errors import CheckpointError, M1Error
from m1local.placement import demand
from m1local_app import describe, doctor, kept, library
from m1local_app.kept import size_text
from m1local_app.language import tr
from m1local_app.options import Chosen
from m1local_app.progress import Course
from m1local_app.web import views
from m1local_app.web.handlers import Shown
from m1local_app.web.keeping import Keeping
from m1local_app.web.tabs import Tab

WAIT_SECONDS = 0.25


class Models(Keeping):
    """The events of the model panel, and all others."""

    def look(self) -> Iterator[Shown]:
        """Say that facts are gathered, which takes a moment the first time; then show them."""
        waiting = _line(tr("Looking at the model and this machine …"))
        yield {self._parts.model: waiting}
        yield self.show()

    def show(self) -> Shown:
        """Facts about the model and this machine, and what else is kept."""
        desk = self._desk
        facts, licence, formats = [(tr("name"), desk.label)], "", frozenset[str]()
        try:
            facts += describe.facts(desk.folder)
            facts.append((tr("memory planned"), self._planned()))
            licence, formats = describe.licence(desk.folder), describe.formats(desk.folder)
        except (M1Error, OSError) as error:
            facts.append((tr("error"), str(error)))
        facts += [
            (tr("memory used"), size_text(psutil.Process().memory_info().rss)),
            *((doctor.label(fact.name), fact.value) for fact in doctor.of_machine(formats)),
        ]
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        text = (
            f'<dl class="m1-facts-list">{rows}</dl><details><summary>{escape(tr("Licence"))}'
            f'</summary><pre class="m1-licence">{escape(licence)}</pre></details>'
        )
        names = _names()
        return {
            self._parts.model: text,
            self._parts.kept: gr.update(choices=names, value=None),
        }

    def _planned(self) -> str:
        """What the loaded weights, one context, and by the plan program and workspace take."""
        engine = self._desk.engine
        placement = engine.placement
        assert placement is not None, "an engine that was not loaded"
        tensors = itertools.chain(engine.model.parameters(), engine.model.buffers())
        weights, context = sum(each.nbytes for each in tensors), engine.context.cache.nbytes
        needed = demand(self._desk.folder, placement)
        rest = needed.workspace + needed.graphs + needed.gaps + needed.runtime
        return tr(
            "{total}: weights {weights}, one context {context}, program and workspace {rest}",
            total=size_text(weights + context + rest),
            weights=size_text(weights),
            context=size_text(context),
            rest=size_text(rest),
        )

    def switch(self, name: str | None) -> Iterator[Shown]:
        """Talk to another kept checkpoint, as soon as nobody is being answered."""
        desk, work = self._desk, self._parts.work
        if not name:
            yield {work: _line(tr("Choose one first."))}
            return
        try:
            chosen = library.find(name)
            with desk.turnstile.ticket() as ticket:
                while ticket.ahead():
                    yield {work: _line(tr("Waiting until the answers under way have ended."))}
                    ticket.wait(WAIT_SECONDS)
                yield {work: _line(tr("Loading {name} …", name=name))}
                desk.change_model(chosen.folder, chosen.label)
        except M1Error as error:
            yield {work: _line(str(error), error=True)}
            return
        done = {work: _line(tr("Now talking to {name}.", name=name))}
        yield self.show() | self._form() | self._notices() | self._bar() | done

    def quantize(self, source: str, recipe_name: str, request: gr.Request) -> Iterator[Shown]:
        """Quantize a folder of this machine into the kept checkpoints, when it is one's turn."""
        parts, tab = self._parts, self._desk.tab(request.session_hash)
        tab.cancelled.clear()
        buttons = {parts.quantize: gr.update(visible=False), parts.cancel: gr.update(visible=True)}
        try:
            for shown in self._quantized((source or "").strip(), recipe_name, tab):
                yield shown | buttons
            end: Shown = {}
        except M1Error as error:
            end = {parts.work: _line(str(error), error=True)}
        if tab.cancelled.is_set():
            text = tr("Stopped. What was done is kept; Quantize goes on with it.")
            end = {parts.work: _line(text)}
        yield end | {
            parts.quantize: gr.update(visible=True), parts.cancel: gr.update(visible=False)
        }  # fmt: skip

    def cancel(self, request: gr.Request) -> None:
        """End the quantizing under way."""
        if (tab := self._desk.tabs.known(request.session_hash or "")) is not None:
            tab.cancelled.set()

    def _quantized(self, source: str, recipe_name: str, tab: Tab) -> Iterator[Shown]:
        from m1local_quantize.pipeline import quantize_checkpoint
        from m1local_quantize.recipe import Recipe
        from m1local_quantize.text import CALIBRATION, SHIPPED

        folder = Path(source).expanduser()
        if not source or not folder.is_dir():
            raise CheckpointError(tr("There is no folder {name} on this machine.", name=source))
        recipe, chosen = Recipe.find(recipe_name), Chosen(folder, folder.resolve().name)
        recipe.check_closed()
        target, work = library.kept_folder(chosen, recipe), self._parts.work
        # Like an answer, it has the machine to itself.
        with self._desk.turnstile.ticket() as ticket:
            while (ahead := ticket.ahead()) and not tab.cancelled.is_set():
                yield {work: _line(views.waiting_line(ahead))}
                ticket.wait(WAIT_SECONDS)
            if not tab.cancelled.is_set() and not (target / "m1local.json").is_file():
                events = quantize_checkpoint(
                    folder, target, recipe, text=SHIPPED, calibration=CALIBRATION
                )
                for html in _drawn(events, recipe_name, tab):
                    yield {work: html}
        if tab.cancelled.is_set():
            return
        names = _names()
        done = _line(tr("Done: {name}; it can be talked to now.", name=target.name))
        yield {work: done, self._parts.kept: gr.update(choices=names, value=target.name)}


def _drawn(events: Iterator[object], recipe: str, tab: Tab) -> Iterator[str]:
    """The pipeline's events in words and a bar, a few times a second, until `tab` cancels."""
    course, drawn_at = Course.unseen(recipe), 0.0
    with contextlib.closing(events):  # type: ignore[type-var]  # a generator, typed as an iterator
        for event in events:
            if tab.cancelled.is_set():
                return
            course.draw(event)
            if time.monotonic() - drawn_at >= WAIT_SECONDS:
                drawn_at = time.monotonic()
                text = tr(
                    "Quantizing to {recipe}: {share:.0%} written, measured {measured}. Nobody is "
                    "answered meanwhile; keep this page open.",
                    recipe=recipe,
                    share=course.share,
                    measured=course.measured,
                )
                yield _bar(course.share, text, course.pace)


def _names() -> list[str]:
    """What can be talked to: the demo, and what is kept and quantized."""
    ready = [each.name for each in kept.checkpoints() if each.is_ready]
    return [library.DEMO_NAME, *ready]


def _bar(share: float, text: str, pace: str) -> str:
    label, said = escape(tr("Quantizing")), f"<p>{escape(pace)}</p>" if pace else ""
    bar = f'<progress class="m1-progress" max="1" value="{share:.3f}" aria-label="{label}">'
    return f'<div class="m1-info">{bar}</progress>{said}<p>{escape(text)}</p></div>'


def _line(text: str, *, error: bool = False) -> str:
    kind, role = ("m1-error", "alert") if error else ("m1-info", "status")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'
