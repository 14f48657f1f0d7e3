"""A stand-in for the Hugging Face Hub's HTTP API, as far as uploading and loading a model need it: all in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: who sends this may write, and read what is private
TOKEN = "hf_secret"
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories: commits by their hash, branches, and which are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Files] = {}
        self.private: set[str] = set()
        self.large: Files = {}  # by SHA-256

    def commit(self, repo: str, branch: str, files: Files) -> str:
        content = json.dumps(
            [repo, len(self.commits), {name: hashlib.sha256(f).hexdigest() for name, f in files.items()}]
        )
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[repo][branch] = sha
        return sha

    def at(self, repo: str, revision: str) -> str | None:
        return self.branches[repo].get(revision, revision if revision in self.commits else None)


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str, status: int = 404) -> None:
        self.reply(status, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound", X_Error_Message=f"no {what}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if repo in self.server.branches:
                return self.reply(409, {"error": "You already created this model repo", "url": f"/{repo}"})
            self.server.branches[repo] = {}
            self.server.commit(repo, "main", {})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(repo)
            self.reply(200, {"url": f"{self.server.address}/{repo}", "name": repo})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.server.branches[found[1]]
            if found[2] in branches:
                return self.reply(409, {"error": "Reference already exists"})
            branches[found[2]] = branches["main"]
            self.reply(200, {})
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            asked = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.reply(200, {"files": files})
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.address}/large/{each['oid']}"}}
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            repo, branch = found[1], found[2]
            files = dict(self.server.commits[self.server.branches[repo][branch]])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
            sha = self.server.commit(repo, branch, files)
            self.reply(
                200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.address}/{repo}/commit/{sha}"}
            )
        else:
            self.missing("Entry")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.large[self.path.rpartition("/")[2]] = body
        self.reply(200)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        if found is None:
            return self.missing("Entry")
        repo, kind, revision, name = found[1], found[2], found[3] or "main", found[4]
        secret = repo in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo not in self.server.branches or secret:
            return self.missing("Repo", 401 if secret else 404)
        if (sha := self.server.at(repo, revision)) is None:
            return self.missing("Revision")
        files = self.server.commits[sha]
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": digest(files[name])} for name in files
            ]
            return self.reply(200, entries)
        if kind != "resolve":
            known = {"id": repo, "modelId": repo, "sha": sha, "private": repo in self.server.private, "tags": []}
            return self.reply(200, {**known, "siblings": [{"rfilename": name} for name in files]})
        if name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content, first = files[name], 0
        if asked := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "")):
            first = int(asked[1])
        length = str(len(content) - first)
        self.reply(200, content[first:], ETag=f'"{digest(content)}"', X_Repo_Commit=sha, Content_Length=length)

    do_HEAD = do_GET


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """Run a stand-in meanwhile."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
