"""Whom the page answers: its own address, and no page of another site, whatever name it goes by."""

import http.client
import socket
from urllib.parse import urlsplit

import pytest
import typer

from m1local.errors import M1Error
from m1local_app.conversing import check_host
from m1local_app.history import History
from m1local_app.web.policy import OwnPagesOnly
from tests.damage import refused
from tests.web_page import MARKS, Served, Window, keep

pytestmark = MARKS
CONTEXT_TOKENS, ANSWER_TOKENS = 1024, 12


def answered(page: Served, host: str, origin: str | None = None, path: str = "/config") -> int:
    """The status of an answer to a request that says it wants `host`, for a page of `origin`."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    headers = {"Host": host} | ({"Origin": origin} if origin is not None else {})
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    if response.status == 403:
        assert said.startswith(b"This page is answered at its own address only")
    return response.status


def test_other_names_for_this_machine_are_not_answered(page: Served) -> None:
    port = urlsplit(page.url).port
    for own in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", f"[::1]:{port}"):
        assert answered(page, own) == 200, own
    for foreign in (f"evil.example:{port}", "127.0.0.1.evil.example", "evil.example", "", "["):
        assert answered(page, foreign) == 403, foreign
        assert answered(page, foreign, path="/gradio_api/info") == 403


def test_pages_of_other_sites_are_not_answered(page: Served) -> None:
    own = f"127.0.0.1:{page.port}"
    assert answered(page, own, f"http://{own}") == 200
    for origin in ("http://evil.example", f"http://localhost:{page.port + 1}", "null",
                   f"http://127.0.0.1:{page.port + 1}"):  # fmt: skip
        assert answered(page, own, origin) == 403, origin


def test_a_server_for_others_has_names_of_its_own_but_answers_no_other_pages() -> None:
    """Who may come in there is asked for a password, which another site's page does not have."""
    for others in ("0.0.0.0", "192.168.0.7", "127.evil.example"):
        assert OwnPagesOnly(None, others)._names is None
    assert "127.0.0.9" in (OwnPagesOnly(None, "127.0.0.9")._names or ())


def test_an_address_where_nothing_can_be_served_is_said() -> None:
    serving = pytest.importorskip("m1local_app.web.serving", reason="the page needs gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with refused(M1Error, f"Port {port} on 127.0.0.1 is taken"):
            serving.check_address("127.0.0.1", port)
    serving.check_address("127.0.0.1", 0)
    for nowhere in ("203.0.113.7", "no.such.name.invalid"):
        with refused(M1Error, f"Nothing can be served at {nowhere}, port 7860: .* --host takes"):
            serving.check_address(nowhere, 7860)


@pytest.mark.parametrize("host", ["::1", "fe80::1"])
def test_an_address_of_six_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        check_host(host, "me:secret")
    assert "IPv4 addresses and names only" in " ".join(capsys.readouterr().err.split())


def test_many_conversations_are_listed_above_what_comes_below(
    page: Served, store: History, window: Window
) -> None:
    for number in range(30):
        keep(store, f"question {number}", "answer")
    window.open(page.url)
    window.until(lambda: len(window.texts("#list li")) == 30, "they are not all listed")
    bottom, below, whole, seen = window.js(
        "const box = s => document.querySelector(s).getBoundingClientRect();"
        "const side = document.querySelector('#side');"
        "return [box('#list li:last-child').bottom, box('#this').top, side.scrollHeight,"
        " side.clientHeight];"
    )
    assert bottom <= below
    assert whole > seen + 500  # all of it can be scrolled to
