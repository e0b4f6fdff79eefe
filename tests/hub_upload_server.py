"""The same hub on loopback, to which something can be published.

What it is: the addresses that huggingface_hub uses to make a repository and to commit to it, with
large files sent apart (LFS). What it is not: a hub; there is one branch, and nobody is known.
"""

import base64
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_server import LARGE, Hub


class UploadHub(Hub):
    """Begins without a repository; what is committed lies in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        """Begin to serve."""
        self.exists = False
        self.received: list[str] = []  # names of large files whose bytes came whole
        self.commits: list[list[str]] = []
        self.refused: dict[str, int] = {}  # status by what is in the path of a request that writes
        self.upload_faults: list[str] = []  # "cut", "503" or "", each for one large file
        self._large = folder.parent / "large"
        self._names: dict[str, str] = {}  # of large files, by SHA-256
        for path in (folder, self._large):
            path.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, name)

    @property
    def writes(self) -> list[str]:
        """The requests that were to change something."""
        return [request for request in self.requests if not request.startswith(("GET", "HEAD"))]

    def _answer(self, request: Any, *, body: bool) -> None:
        if self.exists or self.status is not None:
            return super()._answer(request, body=body)
        self.requests.append(f"{request.command} {urlsplit(request.path).path}")
        self._send(request, 404, {"X-Error-Code": "RepoNotFound"}, b"")

    def _receive(self, request: Any) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        length = int(request.headers.get("Content-Length") or 0)
        status = next((s for part, s in self.refused.items() if part in path), self.status)
        if status is None and path.startswith("/large/"):
            return self._receive_large(request, path.removeprefix("/large/"), length)
        body = request.rfile.read(length)
        if status is not None:
            return self._send(request, status, {}, b"{}")
        assert request.headers["Authorization"] == "Bearer secret"
        if path == "/api/repos/create":
            answer = self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            answer = {}
        elif path == f"/api/models/{self.name}/preupload/main":
            answer = self._modes(json.loads(body))
        elif path == f"/{self.name}.git/info/lfs/objects/batch":
            answer = self._batch(json.loads(body))
        else:
            assert path == f"/api/models/{self.name}/commit/main", path
            answer = self._commit([json.loads(line) for line in body.splitlines()])
        self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert f"{asked['organization']}/{asked['name']}" == self.name
        self.exists, self.private = True, asked["visibility"] == "private"
        (self.folder / ".gitattributes").write_text("*.safetensors filter=lfs")
        return {"url": f"{self.url}/{self.name}"}

    def _modes(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if mode == "lfs":
                self._names[str(file["size"])] = file["path"]
        return {"files": files}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked["objects"]:
            self._names[wanted["oid"]] = self._names[str(wanted["size"])]
            if not (self._large / wanted["oid"]).is_file():
                wanted["actions"] = {"upload": {"href": f"{self.url}/large/{wanted['oid']}"}}
            objects.append(wanted)
        return {"transfer": "basic", "objects": objects}

    def _receive_large(self, request: Any, oid: str, length: int) -> None:
        fault = self.upload_faults.pop(0) if self.upload_faults else ""
        content = request.rfile.read(length // 2 if fault == "cut" else length)
        if fault == "cut":
            request.close_connection = True
            return
        if fault:
            return self._send(request, int(fault), {}, b"")
        assert hashlib.sha256(content).hexdigest() == oid
        (self._large / oid).write_bytes(content)
        self.received.append(self._names[oid])
        self._send(request, 200, {}, b"")

    def _commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        changed = []
        for line in lines[1:]:
            value = line["value"]
            path = self.folder / value["path"]
            if line["key"] == "lfsFile":
                shutil.copyfile(self._large / value["oid"], path)
            else:
                assert line["key"] == "file"
                path.write_bytes(base64.b64decode(value["content"]))
            changed.append(path.name)
        self.commits.append(changed)
        self.commit = f"{len(self.commits):040x}"
        return {
            "commitUrl": f"{self.url}/{self.name}/commit/{self.commit}",
            "commitOid": self.commit,
        }
