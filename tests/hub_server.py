"""A model hub on loopback: as much of the Hub's interface as downloading and pushing take."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from cm_diffusers.hub import push

REVISION = "0123456789abcdef0123456789abcdef01234567"
# Weights go through git-lfs, as on the Hub.
LFS_SUFFIXES = (".safetensors", ".png", ".onnx")


def commit_of(revision: str | None) -> str:
    """The commit of a branch, or of a commit."""
    if revision in (None, "main"):
        return REVISION
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class State:
    """What a hub knows, and what it is to do wrong.

    Args:
        root (`Path`): repositories, as `user/name/`; branches other than main as `user/name@branch/`.
        tokens (`dict`): the namespaces that each token may write to.
        commits (`list`): repository, branch and message of each commit.
        private (`set`): private repositories.
        drop (`list`): patterns of paths; a request that one matches is read in part, and its connection closed. Each
            is used once.
        refuse (`list`): the same, with the status that is answered.
    """

    root: Path
    tokens: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"hf_writer": ("me", "org"), "hf_reader": ()})
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    drop: list[str] = field(default_factory=list)
    refuse: list[tuple[str, int]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    state: State

    def do_HEAD(self) -> None:
        self.get(body=False)

    def do_GET(self) -> None:
        self.get(body=True)

    def do_PUT(self) -> None:
        if self.dropped():
            return
        oid, data = self.path.rsplit("/", 1)[1], self.read()
        assert hashlib.sha256(data).hexdigest() == oid
        self.state.blobs[oid] = data
        self.send(b"", True, {})

    def do_POST(self) -> None:
        if self.dropped():
            return
        path, data = self.path.split("?")[0], self.read()
        routes = {
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": self.validate,
            r"/api/models/([^/]+/[^/]+)/branch/([^/]+)": self.branch,
            r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"/api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.lfs,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, path):
                return answer(data, *match.groups())
        self.error(404)

    # Downloads

    def get(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if self.refused():
            return
        if path == "/api/whoami-v2":
            self.whoami(body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.describe(match[1], match[2], match[3], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(self.folder(match[1], match[2]), match[3], commit_of(match[2]), body)
        else:
            self.error(404, "EntryNotFound")

    def folder(self, repo: str, revision: str | None) -> Path:
        for place in self.state.root.glob(f"{repo}@*"):
            if revision == commit_of(place.name.partition("@")[2]):
                return place
        branch = "" if revision in (None, "main", REVISION) else f"@{revision}"
        return self.state.root / f"{repo}{branch}"

    def describe(self, repo: str, what: str | None, revision: str | None, body: bool) -> None:
        folder = self.folder(repo, revision)
        if not folder.is_dir():
            return self.error(404, "RepoNotFound")
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(folder)) for path in files]
        if what == "tree":
            sizes = [path.stat().st_size for path in files]
            content: object = [
                {"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in zip(names, sizes, strict=True)
            ]
        else:
            siblings = [{"rfilename": name} for name in names]
            content = {"id": repo, "sha": commit_of(revision), "siblings": siblings, "tags": [],
                       "private": repo in self.state.private}  # fmt: skip
        self.send_json(content, body)

    def send_file(self, folder: Path, name: str, commit: str, body: bool) -> None:
        path = folder / name
        if not path.is_file():
            return self.error(404, "EntryNotFound")
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.send(data, body, {"ETag": etag, "X-Repo-Commit": commit})

    # Pushes

    def whoami(self, body: bool) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.state.tokens:
            return self.error(401)
        role = "read" if token == "hf_reader" else "write"
        self.send_json({"name": "me", "auth": {"accessToken": {"role": role}}}, body)

    def may_write(self, repo: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.state.tokens:
            self.error(401)
            return False
        if repo.split("/")[0] not in self.state.tokens[token]:
            self.error(403)
            return False
        return True

    def create(self, data: bytes) -> None:
        wanted = json.loads(data)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not self.may_write(repo):
            return
        folder, answer = self.state.root / repo, {"url": f"{self.endpoint}/{repo}"}
        if folder.is_dir():
            return self.send_json({**answer, "error": "You already created this model repo"}, status=409)
        folder.mkdir(parents=True)
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.state.private.add(repo)
        self.send_json(answer)

    def validate(self, data: bytes) -> None:
        content = json.loads(data)["content"]
        problems = []
        try:
            _, header, text = content.split("---", 2)
            values = yaml.safe_load(header)
        except (ValueError, yaml.YAMLError) as error:
            values, text, problems = {}, "", [f"no metadata: {error}"]
        strings = ("license", "library_name", "pipeline_tag", "base_model")
        problems += [f"{n} must be a string" for n in strings if not isinstance(values.get(n, ""), str)]
        lists = ("tags", "datasets", "model-index")
        problems += [f"{n} must be a list" for n in lists if not isinstance(values.get(n, []), list)]
        problems += ["More Information Needed"] if "More Information Needed" in text else []
        errors = [{"message": problem} for problem in problems]
        self.send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def branch(self, data: bytes, repo: str, branch: str) -> None:
        if self.may_write(repo):
            folder = self.folder(repo, branch)
            if folder.is_dir():
                return self.send_json({"error": "Reference already exists"}, status=409)
            shutil.copytree(self.folder(repo, None), folder)
            self.send_json({})

    def preupload(self, data: bytes, repo: str, revision: str) -> None:
        if self.may_write(repo):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            self.send_json({"files": files})

    def lfs(self, data: bytes, repo: str) -> None:
        if self.may_write(repo):
            objects = []
            for wanted in json.loads(data)["objects"]:
                upload = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}
                objects.append(wanted | ({} if wanted["oid"] in self.state.blobs else {"actions": upload}))
            self.send_json({"transfer": "basic", "objects": objects})

    def commit(self, data: bytes, repo: str, revision: str) -> None:
        if not self.may_write(repo):
            return
        files, summary = {}, ""
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
        for name, content in files.items():
            place = self.folder(repo, revision) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        self.state.commits.append((repo, revision, summary))
        self.send_json({
            "success": True, "commitOid": REVISION, "commitUrl": f"{self.endpoint}/{repo}/commit/{REVISION}",
            "hookOutput": "", "pullRequestUrl": f"{self.endpoint}/{repo}/discussions/1",
        })  # fmt: skip

    # Answers

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def dropped(self) -> bool:
        if self.refused():
            return True
        for pattern in self.state.drop:
            if re.search(pattern, self.path):
                self.state.drop.remove(pattern)
                self.rfile.read(1)
                self.close_connection = True
                self.connection.close()
                return True
        return False

    def refused(self) -> bool:
        for pattern, status in self.state.refuse:
            if re.search(pattern, self.path):
                self.state.refuse.remove((pattern, status))
                self.read()
                self.error(status)
                return True
        return False

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_json(self, content: object, body: bool = True, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), body, {"Content-Type": "application/json"}, status)

    def send(self, data: bytes, body: bool, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def error(self, status: int, code: str | None = None) -> None:
        self.send(b"", False, {"X-Error-Code": code} if code else {}, status)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve the repositories under `root` (as `user/name/`); gives the endpoint's address."""
    with serve_writable(root) as (endpoint, _):
        yield endpoint


@contextmanager
def serve_writable(root: Path) -> Iterator[tuple[str, State]]:
    """The same, with what the hub knows."""
    state = State(root)
    handler = type("RootedHandler", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def connected(folder: Path, monkeypatch: Any) -> Iterator[tuple[str, State]]:
    """The address and the state of a hub; this process's client talks to it, and does not wait long."""
    with serve_writable(folder) as (endpoint, state):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(push, "FIRST_PAUSE", 0.01)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield endpoint, state
