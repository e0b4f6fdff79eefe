"""The page: its layout in both languages, and which event calls what.

What it is: wiring. Each language is a page of its own with the same events, at / and at /zh or
/en. What it is not: what an event does (handlers.py, keeping.py, models.py).
"""

import contextlib
import functools
import html
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.components.navbar import Navbar
from gradio.events import api

from m1local.errors import M1Error
from m1local_app.language import LANGUAGES, language, speaking
from m1local_app.web import parts as layout
from m1local_app.web.desk import Desk
from m1local_app.web.keeping import FORMATS
from m1local_app.web.models import Models

MOST_ANSWERS = 16  # under way or waiting; each takes a thread
ADDRESS = "() => [new URLSearchParams(location.search).get('c') || '']"
KEEP_ADDRESS = "id => { window.m1Address(id); }"
SAVE = "file => { window.m1Save(file); }"


def build(desk: Desk) -> gr.Blocks:
    """The page, not yet served; at / in the chosen language, and once more in the other."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    first = language()
    page: gr.Blocks = gr.Blocks(title=f"m1local: {desk.label}", analytics_enabled=False)
    with page:
        _one(desk, first)
    (other,) = (name for name in LANGUAGES if name != first)
    with page.route(other, f"/{other}", show_in_navbar=False):
        _one(desk, other)
    page.queue(default_concurrency_limit=None)
    return page


def spoken(name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`, speaking the language `name`, whichever thread Gradio calls it in."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def steps(*given: Any, **named: Any) -> Iterator[Any]:
            made = handler(*given, **named)
            try:
                while True:
                    with speaking(name), _said_on_the_page():
                        try:
                            step = next(made)
                        except StopIteration:
                            return
                    yield _or_nothing(step)
            finally:
                made.close()

        return steps

    @functools.wraps(handler)
    def whole(*given: Any, **named: Any) -> Any:
        with speaking(name), _said_on_the_page():
            return _or_nothing(handler(*given, **named))

    return whole


def _or_nothing(shown: Any) -> Any:
    """`shown`; where nothing changes, what says so: Gradio takes an empty dict for a value."""
    return gr.skip() if shown == {} else shown


@contextlib.contextmanager
def _said_on_the_page() -> Iterator[None]:
    """An error for which a handler has no place, as that an answer is still being ended."""
    try:
        yield
    except M1Error as error:
        shown = html.escape(str(error))  # Gradio takes it for HTML
        raise gr.Error(shown, title="m1local", print_exception=False) from error


def _one(desk: Desk, name: str) -> None:
    Navbar(visible=False)
    with speaking(name):
        parts = layout.build(desk)
    handlers = Models(desk, parts)

    def on(
        event: Callable[..., Any],
        handler: Callable[..., Any],
        inputs: Any,
        outputs: Any,
        **more: Any,
    ) -> Any:
        more.setdefault("show_progress", "hidden")
        more.setdefault("api_visibility", "private")
        return event(spoken(name, handler), inputs, outputs, **more)

    _chat_events(parts, handlers, on)
    _panel_events(parts, handlers, on)
    _drawer_events(parts, handlers, on)
    if name == language():
        chat = spoken(name, handlers.chat)
        api(chat, api_name="chat", concurrency_limit=MOST_ANSWERS, concurrency_id="answers")


def _conversation(p: Any) -> list[Any]:
    """What shows the conversation."""
    return [
        p.bar, p.earlier, p.chat, p.status, p.chips, p.box, p.send, p.stop, p.versions, p.current,
        p.list, p.title,
    ]  # fmt: skip


def _chat_events(p: Any, handlers: Models, on: Callable[..., Any]) -> None:
    context = gr.context.Context.root_block
    assert context is not None
    shown = _conversation(p)
    slow = {"concurrency_limit": MOST_ANSWERS, "concurrency_id": "answers"}
    form = [p.current, *p.form]
    first = [p.notices, p.welcome, p.shell]
    on(context.load, handlers.load, p.current, [*shown, *p.form, p.preset, p.bin, *first],
       js=ADDRESS)  # fmt: skip
    context.unload(handlers.leave)
    asked = functools.partial(gr.on, [p.box.submit, p.send.click])
    # Gradio takes no second question while one is answered, unless it is told to.
    on(asked, handlers.send, [p.box, *form], shown, trigger_mode="multiple", **slow)
    on(p.chat.retry, handlers.retry, form, shown, **slow)
    on(p.chat.edit, handlers.edit, form, shown, **slow)
    on(p.chat.undo, handlers.undo, p.current, shown)
    on(p.versions.select, handlers.flip, p.current, shown)
    on(p.earlier.click, handlers.earlier, p.current, shown)
    on(p.stop.click, handlers.stop, None, None, queue=False)
    on(p.attach.upload, handlers.attach, [p.attach, p.current], [p.chips, p.status, p.attach])
    on(p.chips.select, handlers.detach, None, p.chips)
    p.current.change(None, p.current, None, js=KEEP_ADDRESS)


def _panel_events(p: Any, handlers: Models, on: Callable[..., Any]) -> None:
    shown = _conversation(p)
    every = [*shown, p.form[0], p.preset, p.deleted, p.bin, p.purge_sure]
    on(p.new.click, handlers.new, p.current, every)
    on(p.list.select, handlers.open, p.current, every)
    on(p.search.input, handlers.search, [p.search, p.current], p.list, trigger_mode="always_last")
    on(p.title.submit, handlers.rename, [p.title, p.current], [p.list, p.title, p.status])
    on(p.delete.click, handlers.delete, p.current, every)
    on(p.deleted.select, handlers.restore, p.current, every)
    on(p.bin.select, handlers.restore, p.current, every)
    on(p.purge.click, handlers.purge, [p.purge_sure, p.current], every)
    for button, name in zip(p.exports, FORMATS, strict=True):
        saved = on(button.click, handlers.exporter(name), p.current, [p.exported, p.status])
        saved.then(None, p.exported, None, js=SAVE)


def _drawer_events(p: Any, handlers: Models, on: Callable[..., Any]) -> None:
    first, system, others = [p.notices, p.welcome, p.shell], p.form[0], p.form[1:]
    on(p.accept.click, handlers.accept, None, first)
    chosen = functools.partial(gr.on, [field.input for field in others])
    on(chosen, handlers.choose, p.form, None, trigger_mode="always_last")
    on(system.input, handlers.choose_system, system, p.preset, trigger_mode="always_last")
    on(p.reset.click, handlers.reset, None, [*p.form, p.preset])
    on(p.preset.input, handlers.preset, p.preset, p.form[0])
    model = [p.model, p.kept]
    on(p.model_panel.expand, handlers.look, None, model)
    on(p.switch.click, handlers.switch, p.kept, [*model, p.work, *p.form, p.preset, p.bar, *first])
    begun = [p.work, p.kept, p.quantize, p.cancel]
    on(p.quantize.click, handlers.quantize, [p.source, p.recipe], begun)
    on(p.cancel.click, handlers.cancel, None, None, queue=False)
