"""The chat page: through its API, and in a real headless Chromium where there is one.

The model never ends an answer by itself, so that stopping is what ends it.
"""

import http.server
import json
import shutil
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from torch import Tensor

from m1local.engine import Engine
from m1local.tokenizer import Message
from m1local_app import web
from tests.conftest import TINY, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    # Deprecations between gradio and the libraries it brings are theirs to mend.
    pytest.mark.filterwarnings("default"),
]
PATIENCE_SECONDS = 120
ANSWER_TOKENS = 6000
TOKEN_SECONDS = (
    0.03  # a real model's pace; the page could not draw the tiny one's on a busy machine
)
# How many stop buttons are to be seen.
STOPS_SHOWN = (
    "return [...document.querySelectorAll('button.stop-button')].filter(b => b.offsetParent).length"
)
LABEL = "tiny <b>model</b>"


class Page:
    """A served page and the engine behind it."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine.load(folder)
        feed = self.engine.context.feed

        def feed_slowly(token_ids: Sequence[int]) -> Tensor:
            time.sleep(TOKEN_SECONDS)
            return feed(token_ids)

        self.engine.context.feed = feed_slowly  # type: ignore[method-assign]  # a slower model
        settings = self.engine.settings(max_new_tokens=ANSWER_TOKENS, seed=1)
        self.blocks = web.build(self.engine, settings, LABEL, system="")
        _, self.url, self.share_url = web.launch(self.blocks, port=0, browser=False)

    def tokens_held(self) -> int:
        return len(self.engine.context.token_ids)

    def wait_until_idle(self) -> int:
        """Tokens in the context once nothing more is computed."""
        until, before = time.monotonic() + PATIENCE_SECONDS, -1
        while (held := self.tokens_held()) != before:
            assert time.monotonic() < until, "the model never stopped"
            before = held
            time.sleep(0.5)
        return held


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    pytest.importorskip("gradio", reason="the page needs gradio")
    folder = tmp_path_factory.mktemp("web") / "model"
    write_checkpoint(folder, TINY | {"max_position_embeddings": 8192}, endless=True)
    (folder / "generation_config.json").write_text('{"assistant_token_id": 7, "temperature": 1.0}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = Page(folder)
    yield served
    served.blocks.close()


@pytest.fixture
def client(page: Page) -> Any:
    from gradio_client import Client

    return Client(page.url, verbose=False)


def test_the_page_is_on_loopback_only(page: Page) -> None:
    assert urlsplit(page.url).hostname == "127.0.0.1"
    assert page.share_url is None
    assert page.blocks.analytics_enabled is False


def test_the_api_streams_and_cancelling_stops_the_model(page: Page, client: Any) -> None:
    job = client.submit("hello", api_name="/chat")
    until = time.monotonic() + PATIENCE_SECONDS
    while len(job.outputs()) < 3:
        assert time.monotonic() < until, "nothing was streamed"
        time.sleep(0.05)
    parts = [str(part) for part in job.outputs()]
    assert parts[2].startswith(parts[1])
    job.cancel()
    assert page.wait_until_idle() < ANSWER_TOKENS


def test_a_prompt_that_is_too_long_is_one_clear_error(page: Page, client: Any) -> None:
    with pytest.raises(Exception, match="The prompt has"):
        client.predict("hello " * 9000, api_name="/chat")


def test_history_is_read_as_text_or_as_parts() -> None:
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    assert web.read_history(history) == [Message("user", "one"), Message("assistant", "two")]


@pytest.fixture
def browser(page: Page) -> Iterator[Any]:
    """Headless Chromium on the page, keeping a record of every request."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    from selenium.webdriver.chrome.service import Service

    started = webdriver.Chrome(options=options, service=Service(driver))
    started.implicitly_wait(PATIENCE_SECONDS)
    started.get(page.url)
    yield started
    started.quit()


def texts(browser: Any, selector: str) -> list[str]:
    """What the matching elements show, in one step: the page replaces them while it streams."""
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
    found: list[str] = browser.execute_script(script, selector)
    return found


def ask_and_stop(page: Page, browser: Any, question: str, *, answers: int) -> None:
    """Type a question, wait for some of the answer, press the stop button."""
    browser.find_element("css selector", "textarea").send_keys(question + "\n")
    until = time.monotonic() + PATIENCE_SECONDS
    while len(shown := texts(browser, ".bot.message")) <= answers or len(shown[answers]) < 40:
        assert time.monotonic() < until, f"no answer was streamed: {shown}"
        time.sleep(0.1)
    browser.execute_script("document.querySelector('button.stop-button').click()")
    assert page.wait_until_idle() < ANSWER_TOKENS
    # A question asked before the page has taken the stop to its end would be stopped with it.
    while browser.execute_script(STOPS_SHOWN):
        assert time.monotonic() < until + PATIENCE_SECONDS, "the stop button stays"
        time.sleep(0.1)


def test_in_the_browser_an_answer_streams_stops_and_another_follows(
    page: Page, browser: Any
) -> None:
    ask_and_stop(page, browser, "高血压是什么? <i>x</i>", answers=0)
    ask_and_stop(page, browser, "and now?", answers=1)
    first, second = texts(browser, ".user.message")
    assert first.startswith("高血压是什么?")
    assert second == "and now?"
    assert_private_and_quiet(browser)


def assert_private_and_quiet(browser: Any) -> None:
    """No request left this machine, and the page reported no error."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            assert url.scheme in ("data", "blob") or url.hostname == "127.0.0.1", url
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_the_page_cannot_share_a_conversation(browser: Any) -> None:
    browser.find_element("css selector", "textarea")
    browser.implicitly_wait(0)
    shown = browser.find_elements(
        "css selector", "button[aria-label*='hare'], button[title*='hare']"
    )
    assert [button for button in shown if button.is_displayed()] == []


def test_the_page_may_show_nothing_of_another_server(page: Page) -> None:
    with urllib.request.urlopen(page.url) as response:
        policy = response.headers["content-security-policy"]
    assert "img-src 'self'" in policy
    assert "connect-src 'self'" in policy


def test_an_image_in_an_answer_is_not_fetched_from_elsewhere(browser: Any) -> None:
    asked: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{other.server_port}/leak?q=secret"
        script = "const i = new Image(); i.src = arguments[0]; document.body.append(i)"
        browser.find_element("css selector", "textarea")
        browser.execute_script(script, address)
        time.sleep(2)
        other.shutdown()
        thread.join()
    assert asked == []
