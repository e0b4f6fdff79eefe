"""How long an update of the page takes, in a short conversation and in a long one.

What it is: the demo model answers in a headless Chromium, at message 10 and at message 200; counted
are the updates of the answer on the page, the time between two of them, and how long the page's
main thread is busy for each. What it is not: a test; it times one machine.

    python -m bench.page_speed
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.browser import chromium
from bench.machine import describe_machine
from m1local import home
from m1local.engine import Engine
from m1local_app import notices
from m1local_app.history import History

RESULT = Path(__file__).parent / "results" / "page_speed.json"
LENGTHS = (10, 200)
TOKENS = 400
LABEL = "m1-tiny"
TEXT = "Glaucoma is a group of **eye diseases**:\n\n- open angle\n- closed angle\n\n`IOP > 21`"
WATCH = """
window.m1Times = []; window.m1Text = '';
new MutationObserver(() => {
  const all = document.querySelectorAll('#chat .bot.message');
  const text = all.length ? all[all.length - 1].innerText : '';
  if (text !== window.m1Text && !!document.querySelector('#stop')?.offsetParent) {
    window.m1Text = text; window.m1Times.push(performance.now());
  }
}).observe(document.querySelector('#chat'),
  {childList: true, subtree: true, characterData: true});
"""
COUNT = "return window.m1Times.length"
IDLE = "return !!document.querySelector('#send')?.offsetParent && window.m1Times.length > 0"


def main() -> None:
    """Measure both lengths, and write the result."""
    from m1local_app.web import page, serving
    from m1local_app.web.desk import Desk

    with tempfile.TemporaryDirectory() as folder:
        os.environ["M1_HOME"] = folder
        notices.accept(LABEL)
        with History.open() as store:
            engine = Engine.load(home.DEMO)
            settings = replace(  # an answer of that many tokens, whatever the model says
                engine.settings(max_new_tokens=TOKENS, seed=1, loop_guard=False),
                stop_token_ids=frozenset(),
            )
            desk = Desk(engine, home.DEMO, LABEL, settings, store, overflow="rolling")
            blocks = page.build(desk)
            _, url, _ = serving.launch(blocks, port=0, browser=False)
            rows = [_measured(url, _conversation(store, length), length) for length in LENGTHS]
            blocks.close()
    RESULT.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def _conversation(store: History, length: int) -> int:
    identifier, parent = store.begin(), None
    for number in range(length // 2):
        parent = store.add(identifier, "user", f"Question {number}?", parent=parent)
        parent = store.add(identifier, "assistant", TEXT, parent=parent, finish="stop")
    return identifier


def _measured(url: str, identifier: int, length: int) -> dict[str, Any]:
    browser = chromium("--window-size=1280,900")
    browser.execute_cdp_cmd("Performance.enable", {})
    try:
        browser.implicitly_wait(60)
        browser.get(f"{url}?c={identifier}")
        shown = "return document.querySelectorAll('#chat .bot.message').length"
        _until(lambda: browser.execute_script(shown) > 0)
        browser.execute_script(WATCH)
        box = browser.find_element("css selector", "#box textarea")
        box.send_keys("What is glaucoma?\n")
        _until(lambda: browser.execute_script(COUNT) > 1)
        before, skipped = _busy_seconds(browser), browser.execute_script(COUNT)
        _until(lambda: browser.execute_script(IDLE))
        busy = _busy_seconds(browser) - before
        times = browser.execute_script("return window.m1Times")
    finally:
        browser.quit()
    between = [after - earlier for earlier, after in itertools.pairwise(times)]
    return {
        "messages": length,
        "updates": len(times),
        "milliseconds_between_updates": round(statistics.median(between), 1),
        "milliseconds_busy_per_update": round(1000 * busy / (len(times) - skipped), 1),
    }


def _busy_seconds(browser: Any) -> float:
    found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(one["value"] for one in found if one["name"] == "TaskDuration"))


def _until(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the page did not come as far")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
