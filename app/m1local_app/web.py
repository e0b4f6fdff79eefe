"""The chat page: one Gradio page on this machine only.

What it is: events to page updates. It streams, stops, and loads nothing from elsewhere: no fonts,
no analytics, no share link. What it is not: a store; the conversation lives in the page, and each
answer is made from what the page shows, so that undo and edit need no further bookkeeping.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from m1local.errors import M1Error
from m1local.tokenizer import Message, Role

if TYPE_CHECKING:
    import gradio as gr

    from m1local.engine import Engine
    from m1local.generate import GenerationSettings

HOST = "127.0.0.1"
UPDATE_SECONDS = 0.04  # 25 updates a second; the page re-renders the whole answer at each
FONTS = ("system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif")
MONOSPACE = ("ui-monospace", "Consolas", "monospace")
# Scripts and styles are Gradio's own and partly inline; what it shows may come from here alone.
CONTENT_POLICY = (
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'none'; object-src 'none'; form-action 'self'; base-uri 'self'"
)
NOTICE = "Runs on this machine only. Not a doctor: do not rely on it for medical decisions."
EXAMPLES = ("What is glaucoma?", "What are the symptoms of asthma?", "How is diabetes treated?")


def serve(
    engine: "Engine",
    settings: "GenerationSettings",
    label: str,
    *,
    system: str,
    port: int,
    browser: bool,
) -> None:
    """Open the page and wait until Ctrl-C."""
    page = build(engine, settings, label, system=system)
    _, url, _ = launch(page, port=port, browser=browser)
    typer.echo(f"{label} at {url} (Ctrl-C ends it)", err=True)
    page.block_thread()


def build(
    engine: "Engine", settings: "GenerationSettings", label: str, *, system: str
) -> "gr.Blocks":
    """The page, not yet served."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr  # seconds; only when a page is wanted

    def answer(message: str, history: list[dict[str, Any]]) -> Iterator[str]:
        try:
            yield from stream_answer(engine, settings, system, message, history, gr.Warning)
        except M1Error as error:
            raise gr.Error(str(error), title="m1local", print_exception=False) from error

    chatbot = gr.Chatbot(
        label=label,
        height="72vh",
        placeholder=f"<strong>{label}</strong>",
        buttons=["copy", "copy_all"],  # and not "share", which would upload the conversation
        latex_delimiters=[
            {"left": "$$", "right": "$$", "display": True},
            {"left": "\\[", "right": "\\]", "display": True},
            {"left": "\\(", "right": "\\)", "display": False},
        ],
        allow_tags=False,
    )
    page: gr.Blocks = gr.Blocks(title=f"m1local: {label}", analytics_enabled=False)
    with page:
        gr.ChatInterface(
            answer,
            chatbot=chatbot,
            examples=list(EXAMPLES),
            api_name="chat",
            fill_height=True,
            stop_btn=True,
        )
        gr.Markdown(NOTICE, elem_id="notice")
    # One model and one context: answers come one after the other.
    page.queue(default_concurrency_limit=1)
    return page


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


def free_port() -> int:
    """A port nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def launch(page: "gr.Blocks", *, port: int, browser: bool) -> tuple[Any, str, str | None]:
    """Serve `page` on loopback without blocking; port 0 takes any free one."""
    import gradio as gr
    from starlette.middleware import Middleware

    # A proxy must not be asked for this machine; Gradio asks itself whether it is up.
    for name in ("NO_PROXY", "no_proxy"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join([*known, "localhost", HOST])
    theme = gr.themes.Default(font=list(FONTS), font_mono=list(MONOSPACE))
    try:
        started: tuple[Any, str, str | None] = page.launch(
            server_name=HOST,
            server_port=port or free_port(),
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(OwnContentOnly)]},
        )
    except OSError as error:
        raise M1Error(
            f"Port {port} on {HOST} is taken; choose another with --port, or --port 0 for any."
        ) from error
    return started


def stream_answer(
    engine: "Engine",
    settings: "GenerationSettings",
    system: str,
    message: str,
    history: Sequence[dict[str, Any]],
    warn: Callable[[str], object] = typer.echo,
) -> Iterator[str]:
    """The answer so far, at most `1 / UPDATE_SECONDS` times a second, then the whole."""
    from m1local.chat import ChatSession, Turn
    from m1local.generate import Finished, FinishReason, TextDelta

    if not engine.generation.is_chat:
        events = engine.complete(message, settings)
    else:
        session = ChatSession(engine, system=system, settings=settings)
        session.turns = [Turn(message) for message in read_history(history)]
        events = session.send(message)
    text, shown_at = "", 0.0
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            if time.monotonic() - shown_at >= UPDATE_SECONDS:
                shown_at = time.monotonic()
                yield text
        elif isinstance(event, Finished) and event.reason is not FinishReason.STOP:
            full = event.reason is FinishReason.CONTEXT
            warn("The context is full: clear the chat." if full else "The answer was cut short.")
    yield text


def read_history(history: Sequence[dict[str, Any]]) -> list[Message]:
    """The page's messages as ours; Gradio may hand content as text or as a list of parts."""
    messages = []
    for entry in history:
        content = entry["content"]
        if not isinstance(content, str):
            parts = [part.get("text", "") if isinstance(part, dict) else part for part in content]
            content = "".join(part for part in parts if isinstance(part, str))
        role: Role = "user" if entry["role"] == "user" else "assistant"
        messages.append(Message(role, content))
    return messages
