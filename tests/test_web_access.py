"""Whoever has no mouse, sees little or spells Chinese: names, roles, keys, contrast, focus."""

from functools import partial
from typing import Any

import pytest

from m1local_app.history import History
from tests.web_page import MARKS, Served, Window, keep

pytestmark = MARKS
CONTEXT_TOKENS, ANSWER_TOKENS = 1024, 12
TEXT = "**bold**\n\n`code` and [link](https://example.org)\n\n| a |\n|---|\n| b |\n\n> quote"
CONTROLS = (
    "button",
    "textbox",
    "combobox",
    "slider",
    "spinbutton",
    "checkbox",
    "link",
    "searchbox",
)
# Every text that is shown, with how it stands out from what is painted below it.
CONTRAST = """
const numbers = c => { const m = c.match(/[\\d.]+/g).map(Number);
  const f = c.startsWith('color(') ? 255 : 1;
  return [m[0] * f, m[1] * f, m[2] * f, m.length > 3 ? m[3] : 1]; };
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
function behind(e) {
  const layers = [];
  for (; e; e = e.parentElement) layers.push(numbers(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
}
function opacity(e) {
  let all = 1;
  for (; e; e = e.parentElement) all *= Number(getComputedStyle(e).opacity);
  return all;
}
const light = rgb => { const [r, g, b] = rgb.map(v => (v /= 255) <= .03928 ? v / 12.92
  : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
  if (!text || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  if (e.closest('.katex, script, style, .m1-live, :disabled')) continue;
  if (!e.getClientRects().length) continue;
  const below = behind(e), top = numbers(getComputedStyle(e).color);
  if (parseFloat(getComputedStyle(e).fontSize) === 0) continue;
  top[3] *= opacity(e);
  const [a, b] = [light(over(top, below)), light(below)].sort((x, y) => y - x);
  found.push([text.slice(0, 40), e.className.toString().slice(0, 30), (a + .05) / (b + .05)]);
}
return found;
"""


@pytest.fixture
def full(page: Served, store: History, window: Window) -> Window:
    """A conversation with everything unfolded."""
    keep(store, "another", "one")
    store.delete(keep(store, "binned", "one"))
    identifier = keep(store, "I have chest pain", TEXT)
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    window.click("[data-do=drawer]")
    for panel in ("#this", "#bin-panel", "#model-panel"):
        window.unfold(panel)
    window.until(lambda: window.texts("#model dd"), "no facts came")
    window.send("hello", answers=2)
    return window


def tree(window: Window) -> list[tuple[str, str]]:
    """Role and name of everything a screen reader meets."""
    window.browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = window.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [
        (node["role"]["value"], str(node.get("name", {}).get("value", "")).strip())
        for node in nodes
        if not node.get("ignored") and "role" in node
    ]


def test_everything_to_use_has_a_role_and_a_name(full: Window) -> None:
    met = tree(full)
    assert [each for each in met if each[0] in CONTROLS and not each[1]] == []
    for wanted in (
        ("textbox", "Your question"), ("button", "Send"), ("button", "Attach a file"),
        ("button", "Conversations"), ("button", "Light or dark"), ("button", "Settings and model"),
        ("button", "New conversation"), ("textbox", "Search"), ("combobox", "Role"),
        ("textbox", "System prompt"), ("button", "Quantize"), ("combobox", "Recipe"),
        ("button", "Retry"), ("button", "Undo"), ("button", "Edit"), ("button", "Copy message"),
    ):  # fmt: skip
        assert wanted in met, wanted
    names = [name for role, name in met if role in ("slider", "spinbutton")]
    for part in ("Temperature", "Top-p", "Min-p", "Repeat penalty", "Longest answer", "Seed"):
        assert any(part in name for name in names), (part, names)


def test_folded_panels_say_so(full: Window) -> None:
    folds = "return [...document.querySelectorAll('button.label-wrap')].map(e => e.ariaExpanded)"
    assert full.js(folds) == ["true"] * 4
    full.click("#this > button.label-wrap")
    full.until(lambda: full.js(folds).count("false") == 1, "it does not say that it is folded")
    side = "return document.querySelector('[data-do=side]').ariaExpanded"
    assert full.js(side) == "true"
    full.click("[data-do=side]")
    full.until(lambda: full.js(side) == "false", "it does not say that it is closed")
    full.click("[data-do=side]")


def test_a_screen_reader_hears_of_an_answer_once_and_of_notices(window: Window) -> None:
    busy = "return document.querySelector('#chat [role=log]')?.getAttribute('aria-busy')"
    window.fill("#length input", "200") if window.shown("#length") else None
    window.type("#box textarea", "hello\n")
    window.until(lambda: window.js(busy) == "true" or window.idle, "it is read while it comes")
    window.ended(1)
    window.until(lambda: window.js(busy) == "false", "it is never read")
    live = "return document.querySelector('.m1-live').textContent"
    window.until(lambda: "length limit" in window.js(live), "a notice is not read")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_text_can_be_read(full: Window, colours: str) -> None:
    dark = "return document.body.classList.contains('dark')"
    if full.js(dark) != (colours == "dark"):
        full.click("[data-do=theme]")

    def faint() -> list[Any]:
        return [each for each in full.js(CONTRAST) if each[2] < 4.5]

    assert len(full.js(CONTRAST)) > 60
    full.until(lambda: not faint() or None, f"too faint to read: {faint()}")


def test_what_has_the_focus_can_be_seen(full: Window) -> None:
    seen = (
        "const e = document.activeElement, c = getComputedStyle(e);"
        "const outlined = c.outlineStyle !== 'none' && parseFloat(c.outlineWidth) >= 2;"
        "const framed = !!e.closest('#ask:focus-within') || c.boxShadow !== 'none';"
        "return [e.tagName + '#' + e.id + '.' + e.className, outlined || framed]"
    )
    full.js("document.activeElement.blur()")
    met, names = [], set()
    for _ in range(60):
        full.browser.switch_to.active_element.send_keys("\ue004")
        name, visible = full.js(seen)
        met += [] if visible or name.startswith("BODY") else [name]
        names.add(name)
    assert met == []
    assert len(names) > 15


def test_enter_that_chooses_a_chinese_word_sends_nothing(
    page: Served, store: History, window: Window
) -> None:
    window.click("#box textarea")
    window.browser.find_element("css selector", "#box textarea").click()
    spell = partial(window.browser.execute_cdp_cmd, "Input.imeSetComposition")
    spell({"text": "gao", "selectionStart": 3, "selectionEnd": 3})
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    window.browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    for kind in ("keydown", "keypress"):
        window.js(
            "document.querySelector('#box textarea').dispatchEvent(new KeyboardEvent(arguments[0],"
            "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))", kind,
        )  # fmt: skip
    window.browser.execute_cdp_cmd("Input.insertText", {"text": "高"})
    window.type("#box textarea", "血压")
    value = window.js("return document.querySelector('#box textarea').value")
    assert value == "高血压"
    assert store.conversations() == []
    window.type("#box textarea", "\n")
    window.ended(1)
    assert window.questions == ["高血压"]


def test_the_keyboard_comes_back_to_the_box_after_stop(page: Served, window: Window) -> None:
    page.model.token_seconds = 0.2
    try:
        window.type("#box textarea", "hello\n")
        window.until(lambda: window.shown("#stop"), "nothing to stop")
        window.js("document.querySelector('#stop').focus()")
        window.type("#stop", "\n")
        window.until(lambda: window.idle, "Enter on Stop did not stop it")
        window.until(lambda: window.js("return !!document.activeElement.closest('#box')"),
                     "the keyboard is nowhere")  # fmt: skip
    finally:
        page.model.token_seconds = 0.03
