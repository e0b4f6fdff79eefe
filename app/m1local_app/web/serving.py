"""Serving the page: the address, who may come in, and what the browser may load.

What it is: a Gradio server that reaches and is reached as little as can be: no share link, no
analytics, uploads in a private folder that goes away. What it is not: the page.
"""

import atexit
import errno
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import typer
from starlette.middleware import Middleware

from m1local.errors import M1Error
from m1local_app.interrupt import leave_when_told
from m1local_app.language import language, marked, speaking, tr
from m1local_app.web import page as pages
from m1local_app.web.attachments import UPLOADS
from m1local_app.web.desk import Desk
from m1local_app.web.policy import ChosenLanguage, OwnContentOnly, OwnPagesOnly

HOST = "127.0.0.1"
HERE = Path(__file__).parent
FONTS = ("system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif")
MONOSPACE = ("ui-monospace", "Consolas", "monospace")

BUTTONS = (  # as Gradio names them
    marked("Copy message"),
    marked("Copied message"),
    marked("copy"),
    marked("Retry"),
    marked("Undo"),
    marked("Edit"),
    marked("Submit"),
    marked("Cancel"),
    marked("Reset to default value"),
)


def serve(desk: Desk, *, host: str, port: int, browser: bool, auth: tuple[str, str] | None) -> None:
    """Open the page and wait until Ctrl-C."""
    page = pages.build(desk)
    leave_when_told()
    _, url, _ = launch(page, host=host, port=port, browser=browser, auth=auth)
    said = tr("{label} at {url} (Ctrl-C ends it)", label=desk.label, url=url)
    typer.echo(said, err=True)
    page.block_thread()


def free_port() -> int:
    """A port nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def launch(
    page: gr.Blocks,
    *,
    port: int,
    browser: bool,
    host: str = HOST,
    auth: tuple[str, str] | None = None,
) -> tuple[Any, str, str | None]:
    """Serve `page` without blocking; port 0 takes any free one."""
    check_address(host, port)
    _keep_uploads_private()
    _ask_no_proxy(host)
    try:
        started: tuple[Any, str, str | None] = page.launch(
            server_name=host,
            server_port=port or free_port(),
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css_paths=[HERE / "page.css"],
            head=_script(),
            footer_links=[],
            auth=auth,
            max_file_size="64mb",
            app_kwargs={
                "middleware": [
                    Middleware(OwnPagesOnly, host=host), Middleware(OwnContentOnly),
                    Middleware(ChosenLanguage),
                ]
            },
        )  # fmt: skip
    except OSError as error:  # taken since it was looked at
        raise taken(host, port) from error
    return started


def check_address(host: str, port: int) -> None:
    """Raise M1Error where no server can listen at `port` of `host`; 0 is any port."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            if os.name == "posix":  # where it means: although the last server is only just gone
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", None)):
            raise taken(host, port) from error
        raise M1Error(
            tr(
                "Nothing can be served at {host}, port {port}: {reason}. --host takes an address "
                "of this machine.",
                host=host,
                port=port,
                reason=error.strerror or error,
            )
        ) from error


def taken(host: str, port: int) -> M1Error:
    """That another program listens there already."""
    return M1Error(
        tr(
            "Port {port} on {host} is taken; choose another with --port, or --port 0 for any.",
            port=port,
            host=host,
        )
    )


def _script() -> str:
    """The page's script, told the language of the address / and the Chinese of Gradio's buttons."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    with speaking("zh"):
        names = json.dumps({name: tr(name) for name in BUTTONS}, ensure_ascii=False)
    told = f"window.m1Language = '{language()}'; window.m1Names = {names};"
    return f"<script>{told}\n{script}</script>"


def theme() -> gr.themes.Base:
    """Calm colours, text as the system shows it, nothing fetched."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=list(FONTS),
        font_mono=list(MONOSPACE),
        radius_size=gr.themes.sizes.radius_md,
    )
    # White on the middle of a hue would be too faint to read.
    return base.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_cancel_background_fill="#be123c",
        button_cancel_background_fill_hover="#9f1239",
        button_cancel_background_fill_dark="#be123c",
        button_cancel_background_fill_hover_dark="#e11d48",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )


def _ask_no_proxy(host: str) -> None:
    """Ask no proxy for this machine; Gradio asks itself whether it is up."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join([*known, "localhost", HOST, host])


def _keep_uploads_private() -> None:
    """Let uploads lie in a folder of this user's, which is gone when the program ends."""
    folder = tempfile.mkdtemp(prefix="m1-")
    os.environ[UPLOADS] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
