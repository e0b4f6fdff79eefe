"""The components of one page, by name.

What it is: the layout, top to bottom. What it is not: what happens on a click (handlers.py), or
the look (page.css).
"""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from m1local_app.language import tr
from m1local_app.transcript import notice
from m1local_app.web import views
from m1local_app.web.desk import Desk
from m1local_app.web.forms import OVERFLOWS, role, roles

LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]
# Clicks on buttons in our own HTML become events of the component, with the button's data.
DELEGATE = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button && element.contains(button)) trigger('select', {...button.dataset});
});"""
FLIPS = "window.m1Flip = (index, step) => trigger('select', {index, step});"


@dataclass(slots=True)
class Parts:
    """What handlers read and write."""

    welcome: Any
    notices: Any
    accept: Any
    shell: Any
    bar: Any
    current: Any
    versions: Any
    # the side panel
    new: Any
    search: Any
    deleted: Any
    list: Any
    title: Any
    exports: list[Any]
    exported: Any
    delete: Any
    bin: Any
    purge_sure: Any
    purge: Any
    # the conversation
    earlier: Any
    chat: Any
    status: Any
    chips: Any
    attach: Any
    box: Any
    send: Any
    stop: Any
    # the drawer
    preset: Any
    form: list[Any]
    reset: Any
    model_panel: Any
    model: Any
    kept: Any
    switch: Any
    source: Any
    recipe: Any
    quantize: Any
    cancel: Any
    work: Any


def build(desk: Desk) -> Parts:
    """Lay the page out, in the language that is spoken now.

    Where the notices are not accepted yet, neither they nor the page show before it has loaded.
    """
    made: dict[str, Any] = {}
    with gr.Column(visible=False, elem_id="welcome") as made["welcome"]:
        made["notices"] = gr.HTML(apply_default_css=False, value="", elem_id="notices")
        made["accept"] = gr.Button(tr("I have read this and accept it"), variant="primary")
    with gr.Column(visible=desk.accepted, elem_id="shell") as made["shell"]:
        made["bar"] = gr.HTML(apply_default_css=False, value=views.bar(desk.label), elem_id="bar")
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="side", min_width=0):
                made |= _side()
            with gr.Column(elem_id="main", min_width=0):
                made |= _main(desk)
            with gr.Column(elem_id="drawer", min_width=0):
                made |= _settings(desk)
                made |= _model()
    made["current"] = gr.Textbox(visible="hidden", elem_id="current", label="id")
    made["exported"] = gr.JSON(visible="hidden", elem_id="exported")
    made["versions"] = gr.HTML(
        apply_default_css=False,
        value=views.versions({}),
        visible="hidden",
        elem_id="versions",
        js_on_load=FLIPS,
    )
    return Parts(**made)


def _side() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["new"] = gr.Button(tr("New conversation"), variant="primary", elem_id="new")
    made["search"] = gr.Textbox(
        label=tr("Search"), show_label=False, placeholder=tr("Search all conversations"),
        elem_id="search", container=False, max_lines=1,
    )  # fmt: skip
    made["deleted"] = gr.HTML(
        apply_default_css=False, value="", elem_id="deleted", js_on_load=DELEGATE
    )
    made["list"] = gr.HTML(apply_default_css=False, value="", elem_id="list", js_on_load=DELEGATE)
    with gr.Accordion(tr("This conversation"), open=False, elem_id="this"):
        made["title"] = gr.Textbox(label=tr("Title (Enter saves it)"), elem_id="title", max_lines=1)
        with gr.Row(elem_id="exports"):
            made["exports"] = [
                gr.Button(name, size="sm", elem_id=f"export-{name.lower()}", min_width=60)
                for name in ("Markdown", "HTML", "JSON")
            ]
        made["delete"] = gr.Button(tr("Move to the bin"), size="sm", elem_id="delete")
    with gr.Accordion(tr("Bin"), open=False, elem_id="bin-panel"):
        made["bin"] = gr.HTML(apply_default_css=False, value="", elem_id="bin", js_on_load=DELEGATE)
        made["purge_sure"] = gr.Checkbox(
            label=tr("Yes, delete all conversations for good, the listed ones too"),
            elem_id="purge-sure",
        )
        made["purge"] = gr.Button(
            tr("Delete everything for good"), variant="stop", size="sm", elem_id="purge"
        )
    return made


def _main(desk: Desk) -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["earlier"] = gr.Button(
        tr("Show earlier messages"), visible=False, size="sm", elem_id="earlier"
    )
    made["chat"] = gr.Chatbot(
        label=tr("Conversation"), show_label=False, elem_id="chat", height="100%",
        latex_delimiters=LATEX, editable="user", buttons=["copy"], watermark=notice(),
        sanitize_html=True, allow_tags=False, group_consecutive_messages=False,
        placeholder=_placeholder(), feedback_options=None, layout="bubble",
    )  # fmt: skip
    made["status"] = gr.HTML(apply_default_css=False, value="", elem_id="status")
    made["chips"] = gr.HTML(apply_default_css=False, value="", elem_id="chips", js_on_load=DELEGATE)
    with gr.Row(elem_id="ask"):
        made["attach"] = gr.UploadButton(
            tr("Attach a file"),
            elem_id="attach",
            min_width=0,
            scale=0,
        )
        made["box"] = gr.Textbox(
            label=tr("Your question"), show_label=False, elem_id="box", container=False,
            placeholder=tr("Ask a question"),
            lines=1, max_lines=8, autofocus=True, scale=1,
        )  # fmt: skip
        made["send"] = gr.Button(
            tr("Send"), variant="primary", elem_id="send", min_width=0, scale=0
        )
        made["stop"] = gr.Button(
            tr("Stop"), variant="stop", elem_id="stop", visible=False, min_width=0, scale=0
        )
    cautions = tr("Not a doctor: answers are often wrong."), tr("Nothing leaves this machine.")
    spans = " ".join(f"<span>{escape(text)}</span>" for text in cautions)
    gr.HTML(apply_default_css=False, value=f'<p class="m1-caution">{spans}</p>')
    return made


def _placeholder() -> str:
    keys = tr("Enter sends, Shift-Enter makes a new line, Esc stops.")
    private = tr("Answers stay on this machine.")
    return f"### {tr('What would you like to know?')}\n{private}\n\n{keys}"


def _settings(desk: Desk) -> dict[str, Any]:
    form = desk.form
    with gr.Accordion(tr("Settings"), elem_id="settings"):
        preset = gr.Dropdown(roles(), label=tr("Role"), value=role(form.system), elem_id="preset")
        fields = [
            gr.Textbox(form.system, label=tr("System prompt"), lines=3, max_lines=8,
                       elem_id="system"),
            gr.Slider(0, 2, form.temperature, label=tr("Temperature"), step=0.01),
            gr.Slider(0, 200, form.top_k, step=1, label=tr("Top-k (0: off)")),
            gr.Slider(0.01, 1, form.top_p, label="Top-p", step=0.01),
            gr.Slider(0, 1, form.min_p, label="Min-p", step=0.01),
            gr.Slider(0.5, 2, form.repetition_penalty, label=tr("Repeat penalty"), step=0.01),
            gr.Number(form.max_new_tokens, label=tr("Longest answer, in tokens"), precision=0,
                      elem_id="length"),
            gr.Number(form.seed, label=tr("Seed (empty: random)"), precision=0, elem_id="seed"),
            gr.Dropdown([(tr(name), value) for name, value in OVERFLOWS], value=form.overflow,
                        label=tr("When the context is full"), elem_id="overflow"),
        ]  # fmt: skip
        reset = gr.Button(tr("Reset to the model's defaults"), size="sm", elem_id="reset")
    return {"preset": preset, "form": fields, "reset": reset}


def _model() -> dict[str, Any]:
    from m1local_quantize.recipe import shipped_recipes

    made: dict[str, Any] = {}
    with gr.Accordion(tr("Model"), open=False, elem_id="model-panel") as made["model_panel"]:
        made["model"] = gr.HTML(apply_default_css=False, value="", elem_id="model")
        made["kept"] = gr.Dropdown([], label=tr("Kept on this machine"), elem_id="kept")
        made["switch"] = gr.Button(tr("Talk to this one"), size="sm", elem_id="switch")
        made["source"] = gr.Textbox(
            label=tr("Quantize a local folder"), placeholder="./Baichuan-M1-14B-Instruct",
            elem_id="source", max_lines=1,
        )  # fmt: skip
        made["recipe"] = gr.Dropdown(
            sorted(shipped_recipes()), value="int4", label=tr("Recipe"), elem_id="recipe"
        )
        made["quantize"] = gr.Button(tr("Quantize"), size="sm", elem_id="quantize")
        made["cancel"] = gr.Button(
            tr("Stop quantizing"), variant="stop", size="sm", visible=False, elem_id="cancel"
        )
        made["work"] = gr.HTML(apply_default_css=False, value="", elem_id="work")
    return made
