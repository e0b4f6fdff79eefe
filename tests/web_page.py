"""A served page and a browser on it, for the tests of the page; their fixtures are in
web_fixtures.py. Not a test itself.

The model never ends an answer by itself, so that stopping, or the length, is what ends it; and it
is slow, since the page of a busy machine could not draw the tiny one's pace.
"""

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from torch import Tensor

from m1local.context import Context
from m1local.engine import Engine
from m1local_app import library, notices
from m1local_app.history import History
from tests.conftest import TINY, write_checkpoint

PATIENCE_SECONDS = 120
ANSWER_TOKENS = 6000
TOKEN_SECONDS = 0.03
SAYING = "#status, #work, #send, #stop"
LABEL = "tiny <b>model</b></title></script><script>window.evil = 1</script>"
MARKS = [
    pytest.mark.slow,
    # Deprecations between gradio and the libraries it brings are theirs to mend.
    pytest.mark.filterwarnings("default"),
]


class SlowEngine:
    """A tiny endless model whose forward passes are slow, and noted with their times."""

    def __init__(self, folder: Path, context_tokens: int = 8192) -> None:
        write_checkpoint(folder, TINY | {"max_position_embeddings": context_tokens}, endless=True)
        text = '{"assistant_token_id": 7, "temperature": 1.0}'
        (folder / "generation_config.json").write_text(text)
        self.folder = folder
        self.passes: list[float] = []
        self.token_seconds = TOKEN_SECONDS
        self.engine = Engine.load(folder)
        contexts, slow = self.engine.contexts.of, self._slow
        self.engine.contexts.of = lambda key: slow(contexts(key))  # type: ignore[method-assign]

    def _slow(self, context: Context) -> Context:
        if "feed" not in vars(context):
            feed = context.feed

            def feed_slowly(token_ids: Sequence[int]) -> Tensor:
                self.passes.append(time.time())
                time.sleep(self.token_seconds)
                return feed(token_ids)

            context.feed = feed_slowly  # type: ignore[method-assign]
        return context

    def quiet(self) -> None:
        """Wait until nothing is computed any more."""
        until, before = time.monotonic() + PATIENCE_SECONDS, -1
        while (now := len(self.passes)) != before:
            assert time.monotonic() < until, "the model never stopped"
            before = now
            time.sleep(0.5)


class Served:
    """The page on a port of its own, with a store of its own."""

    def __init__(
        self, model: SlowEngine, home: Path, *, port: int = 0, tokens: int = ANSWER_TOKENS
    ) -> None:
        from m1local_app.web import page, serving
        from m1local_app.web.desk import Desk

        self.model = model
        self.store = History.open(home / "history.db")
        settings = model.engine.settings(max_new_tokens=tokens, seed=1)
        self.desk = Desk(model.engine, model.folder, LABEL, settings, self.store)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.blocks = page.build(self.desk)
            _, self.url, self.share_url = serving.launch(self.blocks, port=port, browser=False)

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def close(self) -> None:
        self.blocks.close()
        self.store.close()


class Window:
    """A headless Chromium and what the tests do with it."""

    def __init__(self, downloads: Path) -> None:
        self.downloads = downloads
        webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.skip("needs chromium and chromedriver")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--window-size=1280,900", "--lang=en",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        preferences = {
            "download.default_directory": str(downloads),
            "profile.default_content_setting_values.automatic_downloads": 1,
        }
        options.add_experimental_option("prefs", preferences)
        from selenium.webdriver.chrome.service import Service

        self.browser = webdriver.Chrome(options=options, service=Service(driver))

    def open(self, url: str) -> None:
        """Go to the page and wait until it can be used."""
        self.browser.get(url)
        self.until(lambda: self.texts("#status .m1-facts"), "the page never came up")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any], complaint: str) -> Any:
        """What `condition` says once it is true."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            assert time.monotonic() < end, f"{complaint}; the page says {self.texts(SAYING)}"
            time.sleep(0.1)
        return found

    def texts(self, selector: str) -> list[str]:
        """What the matching elements show, in one step: the page replaces them as it streams."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        found: list[str] = self.js(script, selector)
        return found

    def shown(self, selector: str) -> bool:
        script = "return !!document.querySelector(arguments[0])?.offsetParent"
        return bool(self.js(script, selector))

    def click(self, selector: str) -> None:
        self.until(lambda: self.shown(selector), f"{selector} is not there to be clicked")
        self.js("document.querySelector(arguments[0]).click()", selector)

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.by import By

        self.until(lambda: self.shown(selector), f"{selector} is not there to be typed into")
        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def fill(self, selector: str, text: str) -> None:
        """Write `text` in place of what a field holds, and leave it."""
        self.type(selector, f"\ue009a\ue000{text}\t")

    def unfold(self, panel: str) -> None:
        """Open an accordion, unless it is open."""
        fold = f"{panel} > button.label-wrap"
        self.until(lambda: self.shown(fold), f"{panel} is not there to be unfolded")
        self.js("const b = document.querySelector(arguments[0]);"
                "if (!b.classList.contains('open')) b.click()", fold)  # fmt: skip

    def upload(self, path: Path) -> None:
        """Attach a file."""
        from selenium.webdriver.common.by import By

        self.js("document.querySelector('#main input[type=file]').value = ''")
        self.browser.find_element(By.CSS_SELECTOR, "#main input[type=file]").send_keys(str(path))

    def send(self, text: str, *, answers: int) -> None:
        """Type a question and wait until answer number `answers` has ended."""
        self.type("#box textarea", text + "\n")
        self.ended(answers)

    @property
    def questions(self) -> list[str]:
        return self.texts("#chat .user.message")

    @property
    def answers(self) -> list[str]:
        return self.texts("#chat .bot.message")

    @property
    def idle(self) -> bool:
        return self.shown("#send") and not self.shown("#stop")

    def ask(self, text: str, *, answers: int, length: int = 40) -> None:
        """Type a question and wait for some of answer number `answers`."""
        self.type("#box textarea", text + "\n")
        self.streaming(answers, length)

    def streaming(self, answers: int, length: int = 40) -> None:
        def enough() -> bool:
            shown = self.answers
            return len(shown) >= answers and len(shown[answers - 1]) >= length

        self.until(enough, "no answer was streamed")

    def stop(self) -> None:
        """Press Stop, and wait until the page has taken it to its end."""
        self.click("#stop")
        self.until(lambda: self.idle, "the stop button stays")

    def ended(self, answers: int) -> None:
        """Wait for answer number `answers`, and its end."""
        self.until(lambda: len(self.answers) >= answers and self.idle, "no answer ended")

    def assert_private_and_quiet(self) -> None:
        """No request left this machine, and the page reported no error."""
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = urlsplit(message["params"]["request"]["url"])
                assert url.scheme in ("data", "blob") or url.hostname == "127.0.0.1", url
        logged = [each for each in self.browser.get_log("browser") if each["level"] == "SEVERE"]
        # Gradio's words about its own streams, when a page is left while one is open.
        left = ("BodyStreamBuffer was aborted", "signal is aborted", "Connection errored out")
        found = [each["message"] for each in logged]
        assert [each for each in found if not any(words in each for words in left)] == []

    def close(self) -> None:
        self.browser.quit()


def keep(store: History, question: str, answer: str) -> int:
    """A stored conversation of one question."""
    identifier = store.begin()
    first = store.add(identifier, "user", question, parent=None)
    store.add(identifier, "assistant", answer, parent=first, finish="stop")
    return identifier


class Request:
    """What a handler needs of a browser's request."""

    session_hash = "one"


def accept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the home know that the notices were accepted."""
    monkeypatch.setenv("M1_HOME", str(home))
    notices.accept(library.identity(home / "model"))


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
