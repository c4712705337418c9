"""A stand-in of the hub's HTTP interface on loopback: enough for huggingface_hub to list, look up and download."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves one repository.

    Attributes:
        folder: its files.
        requests: (method, path, value of Range) of each request, in order.
        cut: file -> after how many bytes its next transfer is cut off.
    """

    daemon_threads = True

    def __init__(self, repo: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.folder = repo, folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.revisions = {"main", COMMIT, "v1"}

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """The files that were fetched from their beginning and whole, in order."""
        return [path.rpartition("/")[2] for method, path, part in self.requests if method == "GET" and part is None]

    def ranges(self, name: str) -> list[str]:
        """The parts of a file that were asked for."""
        return [part for _, path, part in self.requests if path.endswith("/" + name) and part]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        repo = re.escape(self.server.repo)
        if found := re.fullmatch(rf"/api/models/{repo}(?:/(revision|tree)/([^/]+).*)?", path):
            self._api(found[1] or "revision", found[2] or "main", body)
        elif found := re.fullmatch(rf"/{repo}/resolve/([^/]+)/(.+)", path):
            self._file(found[1], self.server.folder / found[2], body)
        else:
            self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _api(self, kind: str, revision: str, body: bool) -> None:
        if revision not in self.server.revisions:
            self._send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(self.server.folder.iterdir())
        if kind == "tree":
            content: Any = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)} for p in files]
        else:
            siblings = [{"rfilename": p.name} for p in files]
            content = {"id": self.server.repo, "sha": COMMIT, "siblings": siblings, "private": False}
        self._send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def _file(self, revision: str, path: Path, body: bool) -> None:
        if revision not in self.server.revisions or not path.is_file():
            code = "EntryNotFound" if revision in self.server.revisions else "RevisionNotFound"
            self._send(404, b"", body, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        data, headers, status = path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT}, 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", (self.headers.get("Range") or "").lower()):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"], status = f"bytes {first}-{last}/{len(data)}", 206
            data = data[first : last + 1]
        self._send(
            status,
            data,
            body,
            headers | {"Accept-Ranges": "bytes"},
            self.server.cut.pop(path.name, None) if body else None,
        )

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if cut is None else data[:cut])
        self.close_connection = cut is not None


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def hub_of(repo: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server for a folder, and huggingface_hub pointed at it with an empty cache."""
    from huggingface_hub import constants

    server = HubServer(repo, folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
