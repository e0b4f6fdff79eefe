"""What stands between the server and the browser: what may be loaded, and which language / is in.

What it is: two ASGI middlewares. What it is not: who may come in, which is Gradio's (serving.py).
"""

from http.cookies import CookieError, SimpleCookie
from typing import Any

from m1local_app.language import LANGUAGES, language

COOKIE = "m1-language"  # set by page.js
# Scripts and styles are Gradio's own and partly inline; all of it comes from here alone.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; font-src 'self' data:; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'none'; object-src 'none'; form-action 'self'; base-uri 'self'"
)


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
