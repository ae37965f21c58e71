"""A hub on the loopback: one repository at one commit, for the real client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/name"


@dataclass
class Hub:
    """A hub with one commit of one repository.

    Attributes:
        files: name -> bytes.
        spoil: may change the bytes of the n-th body that is sent.
        ranges: what was asked for of each body, in order.
        names: which file each of them was of.
        commit: that every revision is.
        branches: revisions that there are beside the commit.
        gated: whether a token is needed, that nobody has.
        linked: whether large files are redirected to another place, as the hub does with its storage.
    """

    files: dict[str, bytes]
    spoil: Callable[[int, bytes], bytes] = lambda _number, body: body
    ranges: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    linked: bool = False
    address: str = ""

    def siblings(self) -> list[dict[str, Any]]:
        """What the hub lists: sha256 for large files, and for others the digest that git has."""
        rows: list[dict[str, Any]] = []
        for name, body in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            row = {"rfilename": name, "size": len(body), "blobId": git}
            if name.endswith((".safetensors", ".gguf")):
                row["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 100}
            rows.append(row)
        return rows

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """The variables of a process that uses this hub; the client reads them at import."""
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("proxy")}
        kept.pop("CI", None)
        return kept | {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home)}

    def run(self, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this hub; ``more`` are variables."""
        command = [sys.executable, "-m", "pipeline", *arguments]
        environment = self.environment(home) | more
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub that serves ``files`` until the block ends."""
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            api, resolve, storage = f"/api/models/{REPO}/revision/", f"/{REPO}/resolve/", "/storage/"
            path = self.path.partition("?")[0]
            if hub.gated:
                self._refuse(401, "GatedRepo", with_body)
            elif path.startswith(api):
                revision = path.removeprefix(api)
                if revision not in (COMMIT, *hub.branches):
                    self._refuse(404, "RevisionNotFound", with_body)
                    return
                body = json.dumps({"id": REPO, "sha": hub.commit, "siblings": hub.siblings()}).encode()
                self._send(200, body, {"Content-Type": "application/json"}, with_body)
            elif path.startswith(storage):
                self._file(path.removeprefix(storage), with_body)
            elif path.startswith(resolve):
                revision, _, name = path.removeprefix(resolve).partition("/")
                if revision not in (COMMIT, *hub.branches):
                    self._refuse(404, "RevisionNotFound", with_body)
                elif hub.linked and name.endswith(".gguf") and name in hub.files:
                    body = hub.files[name]
                    headers = {"X-Linked-Size": str(len(body)), "X-Linked-Etag": _tag(body), "X-Repo-Commit": COMMIT}
                    self._send(302, b"", {**headers, "Location": f"{hub.address}{storage}{name}"}, with_body)
                else:
                    self._file(name, with_body)
            else:
                self._refuse(404, "RepoNotFound", with_body)

        def _file(self, name: str, with_body: bool) -> None:
            body = hub.files.get(name)
            if body is None:
                self._refuse(404, "EntryNotFound", with_body)
                return
            headers = {"ETag": _tag(body), "X-Repo-Commit": COMMIT}
            status, asked = 200, self.headers.get("Range")
            if asked:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                status, body = 206, body[start:]
            if with_body:
                hub.ranges.append(asked or "all")
                hub.names.append(name)
            self._send(status, body, headers, with_body)

        def _refuse(self, status: int, code: str, with_body: bool) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, with_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(hub.spoil(len(hub.ranges), body) if "ETag" in headers else body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


def _tag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()}"'
