"""A stand-in of the Hugging Face hub on loopback: the endpoints that reading and writing a model needs, and a second
server that large files are redirected to, as the hub does."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInTokenThatNobodyShouldSee"
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(refs/pr/\d+|[^/]+)(/.*)?)?")
LARGE = 1000
"""Bytes: a larger file is served by the other server."""


@dataclass
class Hub:
    """What the stand-in holds, and what it was asked."""

    url: str = ""
    cdn: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by path, by commit, by repository."""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    """Readable with the token."""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers, in lower case, of each request; those of the other server begin with `cdn`."""
    ignores_ranges: bool = False
    broken: int = 0
    """So many requests are answered with 500."""
    uploaded: dict[str, bytes] = field(default_factory=dict)
    """Large files that were sent, by SHA-256."""

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files, and let the branch stand for it."""
        number = sum(len(commits) for commits in self.repos.values())
        sha = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[sha] = files
        self.branches[repo, branch] = sha
        return sha

    def bodies(self) -> int:
        """Return how many requests were for the content of large files."""
        return sum(
            method == "GET" and ("/resolve/" in path or path.startswith("cdn")) for method, path, _ in self.asked
        )


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, name)) for name in ("hub", "cdn")]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            headers = {key.lower(): value for key, value in self.headers.items()}
            hub.asked.append((self.command, path if name == "hub" else f"cdn{path}", headers))
            if hub.broken:
                hub.broken -= 1
                self.answer(500, {}, b"")
            elif name == "cdn":
                repo, sha, file = path.removeprefix("/").split("|")
                self.content(hub.repos[repo][sha][file], {})
            elif found := _API.fullmatch(path):
                repo, kind, revision, inside = found.groups()
                self.api(repo, kind or "revision", revision or "main", (inside or "").strip("/"))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*found.groups())
            else:
                self.refuse(404, "")

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            data = self.body()
            hub.uploaded[self.path.rpartition("/")[2]] = data
            self.answer(200, {"ETag": '"x"'}, b"")

        def do_POST(self) -> None:
            path, data = unquote(urlsplit(self.path).path), self.body()
            headers = {key.lower(): value for key, value in self.headers.items()}
            hub.asked.append((self.command, path, headers))
            if hub.broken:
                hub.broken -= 1
                self.answer(500, {}, b"")
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse(401, "RepoNotFound")
            elif path == "/api/validate-yaml":
                self.answer(200, {}, b'{"errors": [], "warnings": []}')
            elif path == "/api/repos/create":
                asked = json.loads(data)
                repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                if repo in hub.repos:
                    self.answer(409, {}, json.dumps({"url": f"{hub.url}/{repo}"}).encode())
                    return
                hub.commit(repo, {".gitattributes": b""})
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(repo)
                self.answer(200, {}, json.dumps({"url": f"{hub.url}/{repo}", "name": repo}).encode())
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                hub.branches.setdefault((found[1], found[2]), hub.branches[found[1], "main"])
                self.answer(200, {}, b"{}")
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                files = [
                    {**file, "uploadMode": "lfs" if file["size"] > LARGE else "regular", "shouldIgnore": False}
                    for file in json.loads(data)["files"]
                ]
                self.answer(200, {}, json.dumps({"files": files}).encode())
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.cdn}/upload/{each['oid']}"}}}
                    for each in json.loads(data)["objects"]
                ]
                body = json.dumps({"transfer": "basic", "objects": objects}).encode()
                self.answer(200, {"Content-Type": "application/vnd.git-lfs+json"}, body)
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                self.commit_files(found[1], found[2], [json.loads(line) for line in data.splitlines()])
            else:
                self.refuse(404, "")

        def commit_files(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
            before = hub.branches[repo, branch]
            if lines[0]["value"].get("parentCommit") not in (None, before):
                self.refuse(412, "")
                return
            files = dict(hub.repos[repo][before])
            for line in lines[1:]:
                path = line["value"]["path"]
                if line["key"] == "deletedFile":
                    del files[path]
                elif line["key"] == "lfsFile":
                    files[path] = hub.uploaded[line["value"]["oid"]]
                else:
                    files[path] = base64.b64decode(line["value"]["content"])
            sha = hub.commit(repo, files, branch)
            answer = {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"}
            self.answer(200, {}, json.dumps(answer).encode())

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def commit(self, repo: str, revision: str) -> str | None:
            """Return the commit of a revision, or None after a refusal."""
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            sha = revision if revision in hub.repos.get(repo, {}) else hub.branches.get((repo, revision))
            if repo in hub.gated and not allowed:
                self.refuse(403, "GatedRepo")
            elif repo not in hub.repos or (repo in hub.private and not allowed):
                self.refuse(401, "RepoNotFound")
            elif sha is None:
                self.refuse(404, "RevisionNotFound")
            else:
                return sha
            return None

        def api(self, repo: str, kind: str, revision: str, inside: str) -> None:
            sha = self.commit(repo, revision)
            if sha is None:
                return
            entries = _tree(hub.repos[repo][sha], inside, recursive="recursive=true" in self.path.lower())
            if kind == "revision":
                self.answer(200, {}, json.dumps({"id": repo, "sha": sha, "siblings": []}).encode())
            elif inside and not entries:
                self.refuse(404, "EntryNotFound")
            else:
                self.answer(200, {}, json.dumps(entries).encode())

        def resolve(self, repo: str, revision: str, file: str) -> None:
            sha = self.commit(repo, revision)
            if sha is None:
                return
            data = hub.repos[repo][sha].get(file)
            if data is None:
                self.refuse(404, "EntryNotFound")
                return
            marks = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if len(data) <= LARGE:
                self.content(data, marks)
                return
            marks |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            self.answer(302, {**marks, "Location": f"{hub.cdn}/{repo}|{sha}|{file}"}, b"")

        def content(self, data: bytes, headers: dict[str, str]) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not found or hub.ignores_ranges:
                self.answer(200, headers, data)
                return
            start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
            where = f"bytes {start}-{stop - 1}/{len(data)}"
            self.answer(206, {**headers, "Content-Range": where}, data[start:stop])

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, {"X-Error-Code": code} if code else {}, b"")

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _tree(files: dict[str, bytes], inside: str, *, recursive: bool) -> list[dict[str, object]]:
    """Return what lies in a folder, as the hub's API lists it."""
    prefix = f"{inside}/" if inside else ""
    entries: dict[str, dict[str, object]] = {}
    for path, data in files.items():
        first, deeper, _ = path.removeprefix(prefix).partition("/")
        if not path.startswith(prefix):
            continue
        if deeper and not recursive:
            entries[first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
            continue
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if len(data) > LARGE:
            digest = hashlib.sha256(data).hexdigest()
            entries[path]["lfs"] = {"size": len(data), "oid": digest, "pointerSize": 134}
    return list(entries.values())
