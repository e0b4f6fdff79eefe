"""What stands between the server and the browser: who may ask, what is loaded, which language.

What it is: three ASGI middlewares. What it is not: passwords, which are Gradio's (serving.py).
"""

import ipaddress
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from m1local_app.language import LANGUAGES, language

COOKIE = "m1-language"  # set by page.js
# Scripts and styles are Gradio's own and partly inline; all of it comes from here alone.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; font-src 'self' data:; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'none'; frame-ancestors 'none'; object-src 'none'; form-action 'self'; "
    "base-uri 'self'"
)


OWN_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


class OwnPagesOnly:
    """ASGI middleware: nothing is answered to the pages of other sites.

    A site's name can be made to mean this machine (DNS rebinding); its pages could then read every
    conversation. So a server of this machine answers to the machine's own names only, and any
    server to no page that another one served.
    """

    def __init__(self, app: Any, host: str) -> None:
        """Wrap `app`, which is served at `host`."""
        self._app = app
        self._names = OWN_NAMES | {host} if is_loopback(host) else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse what comes from elsewhere."""
        if scope["type"] not in ("http", "websocket"):  # the server's own beginning and end
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if (self._names is None or _name(asked) in self._names) and origin in _origins(asked):
            await self._app(scope, receive, send)
            return
        kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
        said = "This page is answered at its own address only, as http://127.0.0.1:7860."
        plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": f"{kind}.start", "status": 403, "headers": plain})
        await send({"type": f"{kind}.body", "body": said.encode()})


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, and nobody else comes in."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(asked: str) -> str | None:
    """Of a Host header, without its port."""
    try:
        return urlsplit(f"//{asked}").hostname
    except ValueError:
        return None


def _origins(asked: str) -> tuple[str, ...]:
    """The origins of pages that come from the server that was asked; "" is no page, or its own."""
    return "", f"http://{asked}", f"https://{asked}"


class OwnContentOnly:
    """ASGI middleware: tells the browser to load and reach nothing but this server.

    Without it an answer with an image of another server would carry words of the conversation
    there, in the image's address.
    """

    def __init__(self, app: Any) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Add the policy to every response."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self._app(scope, receive, send_with_policy)


class ChosenLanguage:
    """ASGI middleware: the address / leads to the language that was chosen in this browser."""

    def __init__(self, app: Any) -> None:
        """Wrap `app`, whose address / is in the language of the program."""
        self._app = app
        self._first = language()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Redirect the page, and nothing else."""
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/":
            chosen = _chosen(dict(scope["headers"]).get(b"cookie", b""))
            if chosen in LANGUAGES and chosen != self._first:
                query = scope["query_string"]
                address = b"./" + chosen.encode() + (b"?" + query if query else b"")
                headers = [(b"location", address), (b"cache-control", b"no-store")]
                await send({"type": "http.response.start", "status": 307, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)


def _chosen(cookies: bytes) -> str:
    try:
        found = SimpleCookie(cookies.decode("latin-1")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value
