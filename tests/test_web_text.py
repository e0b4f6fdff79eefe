"""What is written in messages, as the page shows it: Markdown, formulas, and nothing that acts."""

import re

import pytest

from m1local_app.history import History
from m1local_app.transcript import notice
from tests.web_page import LABEL, MARKS, Served, Window, keep

pytestmark = MARKS
CONTEXT_TOKENS, ANSWER_TOKENS = 4096, 12
RICH = r"""Dollars $a^2$ and parentheses \(b_1\), with

$$\int_0^1 x\,dx$$

\[ \text{GFR} = 141 \]

| Drug | Dose |
|---|---|
| Timolol | 0.5 % |
| 拉坦前列素 | 50 µg/ml |

```python
def f(x):
    return x <b  # kept
```

1. **first**
2. `code`
"""
EVIL = (
    "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
    "<iframe srcdoc='<script>parent.evil = 1</script>'></iframe><svg onload='window.evil = 1'>"
    "[link](javascript:window.evil=1) <a href='javascript:window.evil=1'>a</a> "
    "</textarea><details open ontoggle='window.evil = 1'>"
)
GRANT = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
NAMES = """return [...document.querySelectorAll("button[title], button[aria-label]")]
    .filter(button => button.checkVisibility())
    .map(button => `${button.title} ${button.getAttribute("aria-label")}`.replace("null", ""))
    .join(" ")"""
ACTS = (
    "#chat script, #chat img, #chat iframe, #chat details, #chat [onerror], #chat [onload], "
    "#chat a[href^='javascript'], #side img, #side script, #drawer img, #bar script, #chips img"
)


@pytest.fixture
def rich(page: Served, store: History, window: Window) -> Window:
    """A conversation with one of everything."""
    identifier = keep(store, "Show me", RICH)
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    return window


def test_formulas_are_drawn_with_fonts_of_this_server(rich: Window) -> None:
    rich.until(lambda: rich.js("return document.querySelectorAll('#chat .katex').length") == 4,
               "not every kind of formula is drawn")  # fmt: skip
    assert rich.js("return document.querySelectorAll('#chat .katex-display').length") == 2
    shown = rich.js(
        "const c = document.querySelector('#chat .bot .prose').cloneNode(true);"
        "c.querySelectorAll('.katex').forEach(e => e.remove()); return c.textContent"
    )
    assert not re.search(r"\$|\\[([]", shown)
    fonts = "return [...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)"
    rich.until(lambda: "KaTeX_Main" in rich.js(fonts), "the font of formulas was not loaded")


def test_tables_lists_and_code_are_drawn(rich: Window) -> None:
    assert rich.texts("#chat table th") == ["Drug", "Dose"]
    assert rich.texts("#chat table td") == ["Timolol", "0.5 %", "拉坦前列素", "50 µg/ml"]
    assert rich.texts("#chat .bot ol > li") == ["first", "code"]
    assert rich.texts("#chat .bot strong") == ["first"]
    assert rich.texts("#chat pre code") == ["def f(x):\n    return x <b  # kept"]


def test_a_copied_answer_carries_the_medical_notice_and_nothing_invisible(
    page: Served, store: History, window: Window
) -> None:
    identifier = keep(store, "is a <b?", "if a <b then")
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    window.browser.execute_cdp_cmd("Browser.grantPermissions", GRANT)
    window.click(".message-buttons-left button[aria-label='Copy message']")
    read = "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    copied = window.until(lambda: window.browser.execute_async_script(read), "nothing was copied")
    assert copied.startswith("if a <b then")
    assert notice() in copied


def test_nothing_that_is_written_acts(page: Served, store: History, window: Window) -> None:
    identifier = keep(store, EVIL, EVIL)
    store.rename(identifier, EVIL)
    store.set_system(identifier, EVIL)
    store.delete(keep(store, EVIL, EVIL))
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    window.click("[data-do=drawer]")
    for panel in ("#this", "#bin-panel", "#model-panel"):
        window.unfold(panel)
    window.until(lambda: LABEL in window.texts("#model dd"), "the model has another name")
    assert window.js("return document.querySelector('#system textarea').value") == EVIL
    assert window.js("return document.querySelector('#title input, #title textarea').value") == EVIL
    window.send(EVIL, answers=2)
    assert window.js("return window.evil === undefined")
    assert window.js("return document.querySelectorAll(arguments[0]).length", ACTS) == 0
    assert window.js("return document.title") == f"m1local: {LABEL}"
    assert "window.evil" in window.texts("#chat .user.message")[0]
    assert "window.evil" in window.texts("#list span")[0]


def test_an_edited_message_is_sent_as_it_was_meant(
    page: Served, store: History, window: Window
) -> None:
    identifier = keep(store, "is x <y and a <b>?", "yes")
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    window.click("#chat button[aria-label=Edit]")
    window.type("#chat textarea", " really")
    window.click("#chat button[aria-label=Submit]")
    window.ended(1)
    window.until(lambda: store.path(identifier)[0].content.endswith("really"), "not asked anew")
    assert store.path(identifier)[0].content == "is x <y and a <b>? really"


def test_gradio_names_its_buttons_in_the_language_of_the_page(
    page: Served, store: History, window: Window
) -> None:
    identifier = keep(store, "高血压", "```\n一\n```")
    window.open(f"{page.url}zh?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    window.until(lambda: "重试" in window.js(NAMES), "the buttons have no Chinese names")
    window.click("#chat button[aria-label=编辑]")
    window.until(lambda: "提交" in window.js(NAMES), "the editor's buttons have no Chinese names")
    window.browser.execute_cdp_cmd("Browser.grantPermissions", GRANT)
    window.click("#chat button[title=复制消息]")
    window.until(lambda: "已复制" in window.js(NAMES), "it was not copied")
    window.until(lambda: "已复制" not in window.js(NAMES), "it is copied forever")
    window.until(lambda: not re.search("[A-Za-z]{3}", window.js(NAMES)), "a name is English")
    window.open(f"{page.url}?c={identifier}")
    window.until(lambda: len(window.answers) == 1, "it was not opened")
    assert "Retry" in window.js(NAMES)
