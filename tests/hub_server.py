"""A read-only model hub on loopback: as much of the Hub's interface as downloading takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    root: Path

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path):
            self.describe(match[1], match[2], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(self.root / match[1] / match[2], body)
        else:
            self.missing("EntryNotFound")

    def describe(self, repo: str, what: str | None, body: bool) -> None:
        folder = self.root / repo
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(folder)) for path in files]
        if what == "tree":
            sizes = [path.stat().st_size for path in files]
            content: object = [
                {"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in zip(names, sizes, strict=True)
            ]
        else:
            content = {"id": repo, "sha": REVISION, "siblings": [{"rfilename": n} for n in names], "tags": []}
        self.send(json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def send_file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            return self.missing("EntryNotFound")
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.send(data, body, {"ETag": etag, "X-Repo-Commit": REVISION})

    def send(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve the repositories under `root` (as `user/name/`); gives the endpoint's address."""
    handler = type("RootedHandler", (Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
