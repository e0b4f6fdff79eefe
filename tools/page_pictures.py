"""The pictures of the chat page in docs/: `python -m tools.page_pictures`.

What it is: the demo model behind the real page, in a headless Chromium; light, dark, Chinese, a
phone, an error. What it is not: a test.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.browser import chromium
from m1local import home
from m1local.engine import Engine
from m1local_app import notices
from m1local_app.history import History

DOCS = Path(__file__).parent.parent / "docs"
LABEL = "m1-tiny"
EARLIER = ("高血压是什么?", "How is diabetes treated?", "What are the symptoms of asthma?")
WIDE, PHONE = (1280, 800), (390, 800)


def main() -> None:
    """Draw all of them."""
    from m1local_app.web import page, serving
    from m1local_app.web.desk import Desk

    with tempfile.TemporaryDirectory() as folder:
        os.environ["M1_HOME"] = folder
        notices.accept(LABEL)
        with History.open() as store:
            for question in EARLIER:
                store.add(store.begin(), "user", question, parent=None)
            engine = Engine.load(home.DEMO)
            settings = engine.settings(seed=1, max_new_tokens=120)
            blocks = page.build(Desk(engine, home.DEMO, LABEL, settings, store))
            _, url, _ = serving.launch(blocks, port=0, browser=False)
            _draw(url)
            blocks.close()


def _draw(url: str) -> None:
    browser = chromium("--lang=en")
    try:
        _size(browser, WIDE, url)
        _ask(browser, "What is glaucoma?", 1)
        _press(browser, "#chat button[aria-label=Retry]")
        _until(browser, "return !!document.querySelector('.m1-flip')")
        _ask(browser, "I have chest pain. What could it be?", 2)
        _save(browser, "chat")
        address = browser.current_url
        _press(browser, "[data-do=theme]")
        _press(browser, "[data-do=drawer]")
        _save(browser, "chat-dark")
        _press(browser, "[data-do=theme]")
        _size(browser, PHONE, address)
        _save(browser, "chat-phone")
        _size(browser, WIDE, address.replace("/?", "/zh?"))
        _press(browser, "[data-do=drawer]")
        _save(browser, "chat-zh")
        _size(browser, WIDE, address)
        browser.execute_script(
            "const b = document.querySelector('#box textarea'); b.value = 'pain '.repeat(2000);"
            "b.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        _press(browser, "#send")
        _until(browser, "return !!document.querySelector('.m1-error')")
        _save(browser, "chat-error")
    finally:
        browser.quit()


def _ask(browser: Any, question: str, answers: int) -> None:
    browser.find_element("css selector", "#box textarea").send_keys(question + "\n")
    _until(
        browser,
        f"return document.querySelectorAll('#chat .bot.message').length == {answers} && "
        "!!document.querySelector('#send')?.offsetParent",
    )


def _press(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)
    time.sleep(1)


def _save(browser: Any, name: str) -> None:
    time.sleep(1.5)
    browser.save_screenshot(str(DOCS / f"{name}.png"))


def _size(browser: Any, size: tuple[int, int], url: str) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(url)
    _until(browser, "return !!document.querySelector('#status .m1-facts')")
    time.sleep(2)


def _until(browser: Any, script: str) -> None:
    end = time.monotonic() + 120
    while not browser.execute_script(script):
        if time.monotonic() > end:
            raise TimeoutError(script)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
