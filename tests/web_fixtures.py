"""Fixtures of the page's tests: a home whose owner has accepted the notices, a slow endless model,
the page served, a browser, a new conversation in it.

A test module may say how long the context and an answer are: CONTEXT_TOKENS, ANSWER_TOKENS.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from m1local_app.history import History
from tests.web_page import ANSWER_TOKENS, Served, SlowEngine, Window, accept


@pytest.fixture(scope="module")
def web_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of the module's own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        accept(folder, patch)
        yield folder


@pytest.fixture(scope="module")
def model(web_home: Path, request: pytest.FixtureRequest) -> SlowEngine:
    """The model behind the page."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    return SlowEngine(web_home / "model", getattr(request.module, "CONTEXT_TOKENS", 8192))


@pytest.fixture(scope="module")
def page(web_home: Path, model: SlowEngine, request: pytest.FixtureRequest) -> Iterator[Served]:
    """The page, served."""
    tokens = getattr(request.module, "ANSWER_TOKENS", ANSWER_TOKENS)
    served = Served(model, web_home, tokens=tokens)
    yield served
    served.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """A browser."""
    window = Window(tmp_path_factory.mktemp("downloads"))
    yield window
    window.close()


@pytest.fixture
def store(page: Served) -> History:
    """The page's store, emptied."""
    for one in page.store.conversations():
        page.store.delete(one.id)
    page.store.purge()
    return page.store


@pytest.fixture
def window(
    page: Served,
    store: History,
    opened: Window,
    web_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Window]:
    """A new conversation, the settings the page was started with, nothing kept.

    After every test: nothing has left this machine, and the page has reported no error.
    """
    accept(web_home, monkeypatch)
    page.desk.choose(page.desk.defaults())
    opened.open(page.url)
    yield opened
    opened.assert_private_and_quiet()
