"""A model hub on loopback that behaves as badly as it is told to.

What it is: the few addresses of the hub's protocol that fetching uses, served from a folder. What
it is not: a hub; nothing can be uploaded (that is hub_upload_server.py).
"""

import hashlib
import http.server
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from m1local_quantize import transfer

LARGE = (".safetensors", ".model")  # what the hub keeps as LFS and names by SHA-256
POLL_SECONDS = 0.01  # so long does closing take


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the waits before another attempt; how often is tried stays as it is."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(transfer, "WAIT_SECONDS", 0.01)
    quick = SimpleNamespace(sleep=lambda _: None)
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", quick)


class Hub:
    """Serves `folder` as the repository `name`; faults are used up one after the other."""

    def __init__(self, folder: Path, name: str) -> None:
        """Begin to serve, at commit "a…a"."""
        self.folder, self.name = folder, name
        self.commit = "a" * 40
        self.faults: list[str] = []  # "cut", "wrong byte", "stall", "503", each for one file's GET
        self.requests: list[str] = []
        self.status: int | None = None  # answered to everything, if set
        self.private = False
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_POST(self) -> None:
                hub._receive(self)

            def do_PUT(self) -> None:
                hub._receive(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: Any, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if self.status is not None:
            return self._send(request, self.status, {}, b"")
        if path.startswith(f"/api/models/{self.name}"):
            return self._send(request, 200, {}, json.dumps(self._info()).encode())
        prefix = f"/{self.name}/resolve/"
        if not path.startswith(prefix):
            headers = {"X-Error-Code": "RepoNotFound"}
            return self._send(request, 404, headers, b"")
        commit, _, file_name = path.removeprefix(prefix).partition("/")
        file = self.folder / file_name
        if commit != self.commit or not file.is_file():
            return self._send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
        self._send_file(request, file, body=body)

    def _receive(self, request: Any) -> None:
        self._send(request, 405, {}, b"")

    def _info(self) -> dict[str, Any]:
        siblings = []
        for file in sorted(self.folder.iterdir()):
            content = file.read_bytes()
            entry: dict[str, Any] = {"rfilename": file.name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            if file.name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.name, "sha": self.commit, "siblings": siblings, "private": self.private}

    def _send_file(self, request: Any, file: Path, *, body: bool) -> None:
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if file.name.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        status, start, end = 200, 0, len(content)
        wanted = request.headers.get("Range")
        if wanted and body:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        part = content[start:end]
        is_header = wanted is not None and not wanted.endswith("-")
        fault = self.faults.pop(0) if body and self.faults and not is_header else ""
        if fault == "503":
            return self._send(request, 503, {}, b"")
        if fault == "wrong byte":
            part = bytes([part[0] ^ 1]) + part[1:]
        sent = part[: len(part) // 2] if fault in ("cut", "stall") else part
        self._send(request, status, headers, part, sent if body else b"")
        if fault == "stall":
            time.sleep(2)
        if fault:
            request.close_connection = True

    @staticmethod
    def _send(
        request: Any,
        status: int,
        headers: dict[str, str],
        content: bytes,
        sent: bytes | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content if sent is None else sent)
            request.wfile.flush()
