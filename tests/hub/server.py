"""A small Hub on this machine: enough of its protocol to push models and data sets and load them.

Set HF_ENDPOINT to `HubServer.url` before huggingface_hub is imported, and HF_HUB_DISABLE_XET.
Weights (`*.safetensors`) go up by LFS and come down from another host, other files go up inside
commits. Everything lives in memory. `hf_any` is the one token that is known: it is needed for every
change and for private repositories.
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
TOKEN = "hf_any"

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_RESOLVE = rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
_LFS = rf"/(?P<kind>datasets/)?{_REPO}\.git/info/lfs/objects"


class HubError(Exception):
    """A refusal as the Hub words it: an HTTP status, the X-Error-Code header and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass
class Repository:
    """Commits of one repository: revision -> path -> content; branches and tags name them."""

    private: bool = False
    revisions: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The newest commit of the main branch."""
        return self.names.get("main", "")

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make `files` the content of a branch; returns the new revision."""
        digest = hashlib.sha1(self.names.get(branch, "").encode())
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        revision = digest.hexdigest()
        self.names[branch], self.revisions[revision] = revision, files
        return revision

    def resolve(self, revision: str) -> str:
        """The commit behind a branch, a tag or a commit; raises RevisionNotFound."""
        commit = self.names.get(revision, revision)
        if commit not in self.revisions:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class HubServer:
    """The endpoint at `url`, as a context manager.

    Attributes:
        requests: what was asked, in order: method, address and, where one was asked for, the range.
        break_off: bytes after which the next download of weights breaks off; None = it does not.
        damaged: weights come down with one byte in the middle changed.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by their SHA-256
        self.requests: list[str] = []
        self.break_off: int | None = None
        self.damaged = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another name of this machine: clients treat it as the host of a content network.
        self.objects_url = f"http://localhost:{self._server.server_port}/objects"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, *words: str) -> list[str]:
        """The requests that contain all the words."""
        return [request for request in self.requests if all(word in request for word in words)]


class _Handler(BaseHTTPRequestHandler):
    """One request; the routes stand in `_ROUTES` below."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {unquote(self.path)} {wanted}".rstrip())
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        try:
            for method, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    groups = match.groupdict().items()
                    route(self, **{name: text and unquote(text) for name, text in groups})
                    return
            raise HubError(404, "NotFound", f"No route {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._answer_json({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    @property
    def _known(self) -> bool:
        """Whether the request comes with the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str | None, name: str, change: bool = False) -> Repository:
        """The repository, if the request may see (and `change`) it; or the Hub's refusal."""
        kind = {None: "models", "datasets/": "datasets"}.get(kind, kind)
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not self._known):
            status = 404 if self.headers.get("Authorization") else 401
            raise HubError(status, "RepoNotFound", "Repository not found")
        if change:
            self._check_token()
        return repository

    def _check_token(self) -> None:
        if not self._known:
            raise HubError(401, "", "Invalid username or password.")

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
        repository = self._repository(kind, repo)
        commit = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.revisions[commit])]
        self._answer_json(_about(repo, repository) | {"sha": commit, "siblings": siblings})

    def repositories(self, kind: str) -> None:
        """The repositories of an author that the request may see."""
        author = parse_qs(urlsplit(self.path).query).get("author", [""])[0]
        seen = [
            _about(name, repository)
            for (its_kind, name), repository in sorted(self.hub.repositories.items())
            if its_kind == kind
            and name.startswith(author)
            and (self._known or not repository.private)
        ]
        self._answer_json(seen)

    def tree(self, kind: str, repo: str, revision: str, path: str | None) -> None:
        """Files and folders in a folder, with sizes and content hashes; all below if recursive."""
        repository = self._repository(kind, repo)
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
        """A file's content (or, for HEAD, its headers); weights have another address."""
        repository = self._repository(kind, repo)
        commit = repository.resolve(revision)
        content = repository.revisions[commit].get(path)
        if content is None:
            raise HubError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not _is_lfs(path):
            self._answer_range(content, headers | {"ETag": f'"{_blob(content)}"'})
            return
        oid = _sha256(content)
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._answer(b"", 302, headers | {"Location": f"{self.hub.objects_url}/{oid}"})

    def download(self, oid: str) -> None:
        """Weights, by their hash."""
        content = self.hub.objects.get(oid)
        if content is None:
            raise HubError(404, "EntryNotFound", "Object not found")
        if self.hub.damaged:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self._answer_range(content, {"ETag": f'"{oid}"'})

    def _answer_range(self, content: bytes, headers: dict[str, str]) -> None:
        """Content, whole or the bytes that are asked for; the connection may break off."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, first, last = 200, 0, len(content) - 1
        if asked:
            status, first, last = 206, int(asked[1]), min(int(asked[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        part = content[first : last + 1]
        if self.command == "GET" and self.hub.break_off is not None and "objects" in self.path:
            headers["Content-Length"] = str(len(part))
            part, self.hub.break_off = part[: self.hub.break_off], None
            self.close_connection = True
        self._answer(part, status, headers)

    # Writing

    def create(self) -> None:
        """A new, empty repository; 409, with its address, where there is one already."""
        self._check_token()
        asked = json.loads(self.body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        key = (f"{asked.get('type', 'model')}s", name)
        status = 409 if key in self.hub.repositories else 200
        if status == 200:
            private = asked.get("private", False) or asked.get("visibility") == "private"
            self.hub.repositories[key] = Repository(private)
            self.hub.repositories[key].commit({})
        self._answer_json({"name": name, "id": name, "url": f"{self.hub.url}/{name}"}, status)

    def name(self, kind: str, repo: str, what: str, name: str) -> None:
        """A new branch, or a new tag of the revision `name`; 409 where it is there already."""
        repository = self._repository(kind, repo, change=True)
        asked = json.loads(self.body)
        start = asked.get("startingPoint", "main") if what == "branch" else name
        name = name if what == "branch" else asked["tag"]
        if name in repository.names:
            raise HubError(409, "", f"Reference {name} exists already")
        repository.names[name] = repository.resolve(start)
        self._answer_json({})

    def validate_yaml(self) -> None:
        """Every model card is fine but for what the Hub says of some licences."""
        if "license: no-such" in json.loads(self.body)["content"]:
            errors = [{"message": '"license" must be one of [apache-2.0, mit, other]'}]
            self._answer_json({"errors": errors, "warnings": []}, 400)
            return
        self._answer_json({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        """How to upload each file: weights by LFS, all others inside the commit."""
        self._repository(kind, repo, change=True).resolve(revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer_json({"files": files})

    def batch(self, kind: str | None, repo: str) -> None:
        """Where the objects of LFS go that are not here yet."""
        self._repository(kind, repo, change=True)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.objects_url}/{wanted['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        self._answer_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        """An object of LFS; refused unless it has its hash."""
        if _sha256(self.body) != oid:
            raise HubError(400, "BadRequest", "The content does not have its hash")
        self.hub.objects[oid] = self.body
        self._answer(b"")

    def verify(self, kind: str | None, repo: str) -> None:
        """Whether an object has arrived in its size."""
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "", "Object not found")
        self._answer_json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        """One commit on top of a branch, from lines of JSON: a header, then files."""
        repository = self._repository(kind, repo, change=True)
        files = dict(repository.revisions[repository.resolve(revision)])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] != "header":
                raise HubError(400, "BadRequest", f"Unknown operation {line['key']}")
        commit = repository.commit(files, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._answer_json({"success": True, "commitOid": commit, "commitUrl": url})


def _is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _about(name: str, repository: Repository) -> dict[str, object]:
    """A repository, as lists describe it."""
    return {"id": name, "sha": repository.main, "private": repository.private}


def _blob(content: bytes) -> str:
    """The hash git gives a file of this content, as the Hub uses for ETag and oid."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes | None = None) -> dict[str, object]:
    """A file, or without content a folder, as tree describes it."""
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": _blob(path.encode())}
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


_ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/(?P<kind>models|datasets)", _Handler.repositories),
    ("GET", _API, _Handler.info),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("GET|HEAD", _RESOLVE, _Handler.resolve),
    ("GET|HEAD", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.download),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", _API + r"/(?P<what>branch|tag)/(?P<name>[^/]+)", _Handler.name),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _LFS + r"/batch", _Handler.batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("POST", _LFS + r"/verify", _Handler.verify),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
]
