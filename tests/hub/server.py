"""A small Hub on this machine: enough of its protocol to push models and data sets and load them.

Set HF_ENDPOINT to `HubServer.url` before huggingface_hub is imported. Everything lives in memory,
nothing is checked for authorisation, and every file is uploaded in the commit itself (no LFS).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_RESOLVE = rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"


class HubError(Exception):
    """A refusal as the Hub words it: an HTTP status, the X-Error-Code header and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass
class Repository:
    """Commits of one repository: revision -> path -> content; `main` names the newest."""

    revisions: dict[str, Files] = field(default_factory=dict)
    main: str = ""

    def commit(self, files: Files) -> str:
        """Make `files` the content of main; returns the new revision."""
        digest = hashlib.sha1(self.main.encode())
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        self.main = digest.hexdigest()
        self.revisions[self.main] = files
        return self.main

    def resolve(self, revision: str) -> str:
        """The commit behind a branch name or a commit; raises RevisionNotFound."""
        commit = self.main if revision == "main" else revision
        if commit not in self.revisions:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class HubServer:
    """The endpoint at `url`, as a context manager; `requests` lists what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, kind: str, name: str) -> Repository:
        """The repository, or the Hub's RepoNotFound."""
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[kind, name]


class _Handler(BaseHTTPRequestHandler):
    """One request; the routes stand in `_ROUTES` below."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        try:
            for method, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    route(self, **match.groupdict())
                    return
            raise HubError(404, "NotFound", f"No route {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._answer_json({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output quiet; `hub.requests` has the list."""

    def _answer(self, content: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer_json(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._answer(json.dumps(value).encode(), status, headers)

    # Reading

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        """What a repository holds at a revision."""
        repository = self.hub.repository(kind, repo)
        commit = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.revisions[commit])]
        self._answer_json({"id": repo, "sha": commit, "private": False, "siblings": siblings})

    def tree(self, kind: str, repo: str, revision: str, path: str | None) -> None:
        """Files and folders in a folder, with sizes and content hashes; all below if recursive."""
        repository = self.hub.repository(kind, repo)
        files = repository.revisions[repository.resolve(revision)]
        folder = f"{path}/" if path else ""
        below = [name for name in sorted(files) if name.startswith(folder)]
        if folder and not below:
            raise HubError(404, "EntryNotFound", "Entry not found")
        recursive = "true" in parse_qs(urlsplit(self.path).query.lower()).get("recursive", [])
        direct = [name for name in below if recursive or "/" not in name.removeprefix(folder)]
        folders = {name.removeprefix(folder).split("/")[0] for name in below if name not in direct}
        self._answer_json(
            [_entry(folder + name) for name in sorted(folders)]
            + [_entry(name, files[name]) for name in direct]
        )

    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        """A file's content (or, for HEAD, its headers), whole or the asked range of bytes."""
        repository = self.hub.repository("datasets" if kind else "models", repo)
        commit = repository.resolve(revision)
        content = repository.revisions[commit].get(path)
        if content is None:
            raise HubError(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._answer(content, 200, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(content[first : last + 1], 206, headers)

    # Writing

    def create(self) -> None:
        """A new, empty repository; 409, with its address, where there is one already."""
        asked = json.loads(self.body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        key = (f"{asked.get('type', 'model')}s", name)
        status = 409 if key in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[key] = Repository()
            self.hub.repositories[key].commit({})
        self._answer_json({"name": name, "id": name, "url": f"{self.hub.url}/{name}"}, status)

    def validate_yaml(self) -> None:
        """Every model card is fine."""
        self._answer_json({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        """How to upload each file: all of them inside the commit."""
        self.hub.repository(kind, repo).resolve(revision)
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self._answer_json({"files": files})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        """One commit on top of main, from lines of JSON: a header, then files."""
        repository = self.hub.repository(kind, repo)
        files = dict(repository.revisions[repository.resolve(revision)])
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            elif line["key"] != "header":
                raise HubError(400, "BadRequest", f"Unknown operation {line['key']}")
        commit = repository.commit(files)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._answer_json({"success": True, "commitOid": commit, "commitUrl": url})


def _blob(content: bytes) -> str:
    """The hash git gives a file of this content, as the Hub uses for ETag and oid."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes | None = None) -> dict[str, object]:
    """A file, or without content a folder, as tree describes it."""
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": _blob(path.encode())}
    return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}


_ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", _API, _Handler.info),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("GET|HEAD", _RESOLVE, _Handler.resolve),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
]
