"""A small server with the parts of the hub's API that prunet needs: files of commits, and uploads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Files = dict[str, bytes]


class Hub:
    """Repositories as lists of commits; `gated` and `cut` (files whose first download ends in the middle) by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, Files]]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.requests: list[tuple[str, str]] = []  # path, Range
        self.token: str | None = None  # uploads must send it
        self.role = "write"  # of the token

    def commit(self, repository: str, folder: Path) -> str:
        """Adds a commit with the files of a folder; returns its hash."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.add(repository, files)

    def add(self, repository: str, files: Files) -> str:
        """Adds a commit; returns its hash."""
        commits = self.repositories.setdefault(repository, [])
        sha = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """Returns the commit of a revision: a hash, or `main`."""
        commits = self.repositories[repository]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((path, self.headers.get("Range", "")))
        if path == "/api/whoami-v2":
            login = {"name": "owner", "auth": {"type": "access_token", "accessToken": {"role": self.hub.role}}}
            return self.json(login) if self.may_write() else self.refuse(401, "")
        api = re.fullmatch(r"/api/models/(\w+/[\w.-]+)/(revision|tree)/(\w+)", path)
        file = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/(\w+)/(.+)", path)
        found = api or file
        if not found or found[1] not in self.hub.repositories:
            return self.refuse(401, "RepoNotFound")
        commit = self.hub.find(found[1], found[3] if api else found[2])
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if api:
            return self.listing(api[1], api[2], *commit)
        return self.file(found[1], found[3], *commit)

    def listing(self, repository: str, what: str, sha: str, files: Files) -> None:
        if what == "tree":
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            return self.json(rows)
        siblings = [{"rfilename": name} for name in files]
        return self.json({"id": repository, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def file(self, repository: str, name: str, sha: str, files: Files) -> None:
        if repository in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        body, part = files[name], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        about = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        start = int(part[1]) if part else 0
        if part:
            about["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = name in self.hub.cut and self.command == "GET"
        self.hub.cut -= {name} if cut else set()
        return self.answer(206 if part else 200, body[start:], cut=cut, **about)

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.may_write():
            return self.refuse(401, "")
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if name in self.hub.repositories:
                return self.json({"url": f"http://{self.headers['Host']}/{name}"}, 409)
            self.hub.repositories[name] = []
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return self.json({"url": f"http://{self.headers['Host']}/{name}"})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.json({"files": files})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/main", path):
            rows = [json.loads(line) for line in body.splitlines()]
            new = {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
            commits = self.hub.repositories[found[1]]
            sha = self.hub.add(found[1], {**(commits[-1][1] if commits else {}), **new})
            url = f"http://{self.headers['Host']}/{found[1]}/commit/{sha}"
            return self.json({"commitUrl": url, "commitOid": sha, "success": True})
        return self.refuse(404, "")


@contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """Serves a hub on a free port of this machine; yields it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
