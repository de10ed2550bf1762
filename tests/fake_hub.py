"""A Hub on 127.0.0.1: the few routes that reading a model needs, over a dictionary of files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "owner/name"


@dataclass
class FakeHub:
    """One repository, `owner/name`, whose branch `main` is at COMMIT. `log` counts the bytes sent of each file."""

    files: dict[str, bytes]
    status: int = 200
    error: str = ""
    ranges: bool = True
    endpoint: str = ""
    log: dict[str, int] = field(default_factory=dict)


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Serve `files` while the block runs."""
    hub = FakeHub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def send(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def fail(self, status: int, code: str) -> None:
            self.send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.status != 200:
                return self.fail(hub.status, hub.error)
            if not re.match(rf"/(api/models/)?{ID}(/|$)", path):
                return self.fail(404, "RepoNotFound")
            revision = re.search(r"/(revision|tree|resolve)/([^/]+)", path)
            if revision and revision[2] not in {"main", "v1", COMMIT}:
                return self.fail(404, "RevisionNotFound")
            if "/tree/" in path:
                return self.json([
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ])  # fmt: skip
            if path.startswith("/api/"):
                return self.json({"id": ID, "modelId": ID, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                                  "likes": 0, "siblings": [{"rfilename": name} for name in hub.files]})  # fmt: skip
            return self.file(path.split("/", 5)[5])

        def json(self, data: object) -> None:
            self.send(200, json.dumps(data).encode(), Content_Type="application/json")

        def file(self, name: str) -> None:
            data = hub.files.get(name)
            if data is None:
                return self.fail(404, "EntryNotFound")
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and hub.ranges:
                start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
                part, told = data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}"
                self.count(name, part)
                return self.send(206, part, ETag=etag, Content_Range=told)
            self.count(name, data)
            return self.send(200, data, ETag=etag)

        def count(self, name: str, part: bytes) -> None:
            if self.command == "GET":
                hub.log[name] = hub.log.get(name, 0) + len(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
