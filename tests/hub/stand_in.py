"""A stand-in for the hub's HTTP interface on loopback: repositories, pre-uploads, LFS, commits."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """What lies on it, and what it was asked.

    Attributes:
        repos: id -> whether it is private.
        files: (id, path) -> content, as committed.
        objects: LFS objects by sha256.
        puts: hashes of the LFS objects that were sent, in order.
        refuse_after: LFS objects that are taken before all others are refused; None takes all.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, bool | None] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.commits = 0
        self.refuse_after: int | None = None
        self.token = "hf_right"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    """A running one."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            self._answer({"type": "user", "name": "me", "orgs": []})
        elif path.startswith("/api/models/") and (repo := "/".join(path.split("/")[3:5])) in self.server.repos:
            names = [{"rfilename": name} for found, name in self.server.files if found == repo]
            self._answer(
                {"id": repo, "modelId": repo, "sha": "0" * 40, "private": False, "tags": [], "siblings": names}
            )
        else:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content, oid = self._body(), self.path.rpartition("/")[2]
        if self.server.refuse_after is not None and len(self.server.puts) >= self.server.refuse_after:
            self._answer({"error": "the signature expired"}, 403)
            return
        self.server.puts.append(oid)
        self.server.objects[oid] = content
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            self._answer({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._upload(found) for found in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in body.splitlines() if line])
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": path}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.server.repos:
            self._answer({"error": "it exists", "url": f"{self.server.endpoint}/{repo}"}, 409)
            return
        private = asked.get("private") if "private" in asked else asked.get("visibility") == "private"
        self.server.repos[repo] = private
        self._answer({"url": f"{self.server.endpoint}/{repo}", "name": repo, "id": "1"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _upload(self, found: dict[str, Any]) -> dict[str, Any]:
        if found["oid"] in self.server.objects:
            return found
        href = f"{self.server.endpoint}/storage/{found['oid']}"
        return {**found, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repo, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repo, value["path"]] = self.server.objects[value["oid"]]
        self.server.commits += 1
        url = f"{self.server.endpoint}/{repo}/commit/{self.server.commits:040x}"
        self._answer({"success": True, "commitUrl": url, "commitOid": f"{self.server.commits:040x}"})
