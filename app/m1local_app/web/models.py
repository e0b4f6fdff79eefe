"""The model panel: what one talks to, on what, and changing it.

What it is: facts, a change of the checkpoint when nobody is being answered, and quantizing a local
folder with the pipeline's own events. What it is not: fetching; that is the command line's.
"""

import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
import psutil

from m1local.errors import CheckpointError, M1Error
from m1local_app import describe, doctor, kept, library
from m1local_app.kept import size_text
from m1local_app.language import tr
from m1local_app.options import Chosen
from m1local_app.web.handlers import Shown
from m1local_app.web.keeping import Keeping

SHOWN_GROUPS = ("device", "kernels", "memory")
WAIT_SECONDS = 0.25


class Models(Keeping):
    """The events of the model panel, and all others."""

    def show(self) -> Shown:
        """Facts about the model and this machine, and what else is kept."""
        desk = self._desk
        try:
            facts = [(tr("name"), desk.label), *describe.facts(desk.folder)]
            licence = describe.licence(desk.folder)
        except (M1Error, OSError) as error:
            facts, licence = [(tr("name"), desk.label), (tr("error"), str(error))], ""
        used = size_text(psutil.Process().memory_info().rss)
        context = desk.engine.context.cache.nbytes
        facts += [
            (tr("memory used"), used),
            (tr("of it one context"), size_text(context)),
            *((doctor.label(fact.name), fact.value) for fact in doctor.examine(offline=True)
              if fact.group in SHOWN_GROUPS),
        ]  # fmt: skip
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
        text = (
            f'<dl class="m1-facts-list">{rows}</dl><details><summary>{escape(tr("Licence"))}'
            f'</summary><pre class="m1-licence">{escape(licence)}</pre></details>'
        )
        names = [library.DEMO_NAME, *(folder.name for folder in _finished())]
        return {
            self._parts.model: text,
            self._parts.kept: gr.update(choices=names, value=None),
        }

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
        form = dict(zip(self._parts.form, desk.form.values, strict=True))
        done = _line(tr("Now talking to {name}.", name=name))
        yield self.show() | form | {work: done}

    def quantize(self, source: str, recipe_name: str) -> Iterator[Shown]:
        """Quantize a folder of this machine into the kept checkpoints."""
        work = self._parts.work
        try:
            yield from self._quantized((source or "").strip(), recipe_name)
        except M1Error as error:
            yield {work: _line(str(error), error=True)}

    def _quantized(self, source: str, recipe_name: str) -> Iterator[Shown]:
        from m1local_quantize.pipeline import quantize_checkpoint
        from m1local_quantize.recipe import Recipe
        from m1local_quantize.text import CALIBRATION, SHIPPED

        folder = Path(source).expanduser()
        if not source or not folder.is_dir():
            raise CheckpointError(tr("There is no folder {name} on this machine.", name=source))
        recipe, chosen = Recipe.find(recipe_name), Chosen(folder, folder.resolve().name)
        recipe.check_closed()
        target = library.kept_folder(chosen, recipe)
        if not (target / "m1local.json").is_file():
            events = quantize_checkpoint(
                folder, target, recipe, text=SHIPPED, calibration=CALIBRATION
            )
            for text in _said(events, recipe_name):
                yield {self._parts.work: _line(text)}
        names = [library.DEMO_NAME, *(each.name for each in _finished())]
        done = _line(tr("Done: {name}; it can be talked to now.", name=target.name))
        yield {
            self._parts.work: done,
            self._parts.kept: gr.update(choices=names, value=target.name),
        }


def _said(events: Iterator[object], recipe: str) -> Iterator[str]:
    """The pipeline's events in words, a few times a second."""
    from m1local_quantize.certificate import StageMeasured
    from m1local_quantize.passage import TensorWritten
    from m1local_quantize.pipeline import Planned

    total, share, measured, said_at = 1, 0.0, "", 0.0
    for event in events:
        if isinstance(event, Planned):
            total = event.plan.source_bytes
        elif isinstance(event, TensorWritten):
            share = event.done_bytes / total
        elif isinstance(event, StageMeasured):
            measured = f"{event.done}/{event.total}"
        if time.monotonic() - said_at >= WAIT_SECONDS:
            said_at = time.monotonic()
            yield tr(
                "Quantizing to {recipe}: {share:.0%} written, measured {measured}",
                recipe=recipe,
                share=share,
                measured=measured or "0",
            )


def _finished() -> list[Path]:
    return [folder for folder in kept.folders() if (folder / "m1local.json").is_file()]


def _line(text: str, *, error: bool = False) -> str:
    kind, role = ("m1-error", "alert") if error else ("m1-notice", "status")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'
