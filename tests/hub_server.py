"""A small Hub on loopback, for the real `huggingface_hub` client to talk to, with faults on demand.

It knows what a model repository needs: create, info with file hashes, preupload, LFS, atomic commits with a parent,
branches, pull requests, and downloads with ETag and Range. Everything lives in memory.

    with HubServer() as hub:
        hub.fail("POST", "/commit/", "lost")   # the next commit is stored, and its answer never arrives
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "writes" * 6
READ_TOKEN = "hf_" + "reads0" * 6
REVOKED_TOKEN = "hf_" + "gone00" * 6
USER = "me"


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pulls: list[dict] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)  # paths that were committed through LFS
    names: list[str] = field(default_factory=list)  # hostile names to list besides the files

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        commits, sha = [], self.branches[revision]
        while sha is not None:
            commits.append(self.commits[sha])
            sha = self.commits[sha].parent
        return commits

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]


@dataclass
class Fault:
    """What the next `times` requests that match meet."""

    method: str
    path: str
    what: int | str  # a status before anything is done, "N-after", "reset", "lost", "corrupt", "cut", "html"
    times: int
    first: Callable[[], None] | None  # done before the request is looked at


class HubServer:
    """
    The server. `url` is for `HF_ENDPOINT`; `repos`, `requests` and `objects` are there to look at.

    Attributes:
        repos (`dict[str, Repo]`): repo id -> repository.
        requests (`list[str]`): every request so far, "METHOD path".
        objects (`dict[str, bytes]`): LFS objects by sha256.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._http.server_close()

    def create(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def fail(self, method: str, path: str, what: int | str, *, times: int = 1, first: Callable | None = None) -> None:
        """Let the next `times` requests whose path matches the regular expression fail."""
        self.faults.append(Fault(method, path, what, times, first))

    def environment(self, home: str) -> dict[str, str]:
        """The variables that point a new client process at this server, with a cache of its own in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def client_of(hub: HubServer, home, monkeypatch, token: str | None = TOKEN):
    """Point the client that this process has already imported at a server, with a cache of its own."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    close_session()  # it may have been opened offline
    yield hub
    close_session()


class _Answer(Exception):
    def __init__(self, status: int, body=b"", **headers):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def _error(status: int, code: str | None = None, message: str = "refused") -> _Answer:
    headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
    return _Answer(status, {"error": message}, **headers)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every small answer waits 40 ms
    wbufsize = -1

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {url.path}")
        fault = self.hub.take_fault(self.command, url.path)
        what = str(fault.what) if fault else ""
        if fault and fault.first:
            fault.first()
        if what == "reset":
            return self._hang_up()
        if what == "html":
            return self._send(_Answer(503, b"<html>down</html>"))
        if what.isdigit():
            return self._send(_error(int(what), message="injected"))
        try:
            with self.hub.lock:
                answer = self._route(url.path)
        except _Answer as refusal:
            answer = refusal
        if what == "lost":
            return self._hang_up()
        if what.endswith("-after"):
            answer = _error(int(what.removesuffix("-after")), message="injected")
        if what == "corrupt":
            answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])
        self._send(answer, cut=what == "cut")

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer: _Answer, cut: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        if cut:
            self.wfile.flush()
            self._hang_up()

    # ---- routes ------------------------------------------------------------------------------------------------

    def _route(self, path: str) -> _Answer:
        for method, pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return handle(self, **{name: unquote(value or "") for name, value in found.groupdict().items()})
        return _error(404)

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, READ_TOKEN):
            raise _error(401, message="Invalid credentials in Authorization header")
        return token

    def _repo(self, repo: str, write: bool = False) -> Repo:
        token = self._token()
        found = self.hub.repos.get(repo)
        if found is None or (found.private and token is None):
            raise _error(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if write and token != TOKEN:
            raise _error(403 if token else 401, message="You don't have the rights")
        return found

    def _revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision or "main")
        if commit is None:
            raise _error(404, "RevisionNotFound", "Invalid rev id")
        return commit

    def whoami(self) -> _Answer:
        if self._token() is None:
            raise _error(401)
        return _Answer(200, {"type": "user", "name": USER, "auth": {}})

    def check_rights(self, repo: str) -> _Answer:
        self._repo(repo, write=True)
        return _Answer(200, {})

    def create(self) -> _Answer:
        if self._token() != TOKEN:
            raise _error(403 if self._token() else 401)
        asked = json.loads(self.sent)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if repo_id in self.hub.repos:
            return _Answer(409, {"error": "exists", "url": f"{self.hub.url}/{repo_id}"})
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        return _Answer(200, {"url": f"{self.hub.url}/{repo_id}"})

    def validate_yaml(self) -> _Answer:
        content = json.loads(self.sent)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        faults = []
        try:
            data = yaml.safe_load(header.group(1)) if header else {}
            faults += [f'"{key}" is not allowed to be empty' for key, value in data.items() if value in ("", [])]
        except yaml.YAMLError as error:
            faults.append(str(error))
        answer = {"errors": [{"message": fault} for fault in faults], "warnings": []}
        return _Answer(400 if faults else 200, answer)

    def info(self, repo: str, revision: str = "") -> _Answer:
        found = self._repo(repo)
        commit = self._revision(found, revision)
        siblings = []
        for name, content in sorted(commit.files.items()):
            sibling = {"rfilename": name, "size": len(content), "blobId": git_sha(content)}
            if name in found.lfs:
                sibling["lfs"] = {
                    "size": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "pointerSize": 134,
                }
            siblings.append(sibling if "blobs" in self.query else {"rfilename": name})
        siblings += [{"rfilename": name, "size": 1, "blobId": "0" * 40} for name in found.names]
        return _Answer(200, {"id": repo, "sha": commit.sha, "private": found.private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> _Answer:
        found = self._repo(repo)
        entries = []
        for name, content in sorted(self._revision(found, revision).files.items()):
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha(content)}
            if name in found.lfs:
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "oid": oid, "pointerSize": 134}
            entries.append(entry)
        return _Answer(200, entries)

    def preupload(self, repo: str, revision: str) -> _Answer:
        found = self._repo(repo, write=True)
        commit = self._revision(found, revision)
        files = []
        for file in json.loads(self.sent)["files"]:
            lfs = file["path"].endswith((".safetensors", ".png", ".pt"))
            known = commit.files.get(file["path"])
            oid = None
            if known is not None:
                oid = hashlib.sha256(known).hexdigest() if lfs else git_sha(known)
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        return _Answer(200, {"files": files})

    def batch(self, repo: str) -> _Answer:
        self._repo(repo, write=True)
        objects = []
        for item in json.loads(self.sent)["objects"]:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
            objects.append(item)
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> _Answer:
        if hashlib.sha256(self.sent).hexdigest() != oid:
            raise _error(400)
        self.hub.objects[oid] = self.sent
        return _Answer(200)

    def verify(self) -> _Answer:
        asked = json.loads(self.sent)
        content = self.hub.objects.get(asked["oid"])
        return _Answer(200, {}) if content is not None and len(content) == asked["size"] else _error(404)

    def commit(self, repo: str, revision: str) -> _Answer:
        found = self._repo(repo, write=True)
        parent = self._revision(found, revision)
        lines = [json.loads(line) for line in self.sent.splitlines()]
        header, files, through_lfs = {}, dict(parent.files), set()
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                through_lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _error(400)
        create_pr = "create_pr" in self.query
        if not create_pr and header.get("parentCommit") not in (None, parent.sha):
            raise _error(412, message="A commit has happened since. Please refresh and try again.")
        number = len(found.pulls) + 1
        branch = f"refs/pr/{number}" if create_pr else revision
        if create_pr:
            found.branches[branch] = parent.sha
            found.pulls.append({"num": number, "title": header["summary"], "status": "open"})
        found.lfs |= through_lfs
        stored = found.commit(branch, header["summary"], files)
        answer = {
            "success": True,
            "commitOid": stored.sha,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{stored.sha}",
        }
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        return _Answer(200, answer)

    def branch(self, repo: str, branch: str) -> _Answer:
        found = self._repo(repo, write=True)
        if branch in found.branches:
            raise _error(409)
        found.branches[branch] = found.branches["main"]
        return _Answer(200, {})

    def discussions(self, repo: str) -> _Answer:
        wanted = self.query.get("status", ["open"])[0]
        discussions = [
            {
                **pull,
                "isPullRequest": True,
                "author": {"name": USER},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repo, "type": "model"},
            }
            for pull in self._repo(repo).pulls
            if pull["status"] == wanted
        ]
        return _Answer(200, {"count": len(discussions), "start": 0, "discussions": discussions})

    def resolve(self, repo: str, revision: str, path: str) -> _Answer:
        found = self._repo(repo)
        commit = self._revision(found, revision)
        if path not in commit.files:
            entry = _error(404, "EntryNotFound", "Entry not found")
            entry.headers["X-Repo-Commit"] = commit.sha
            raise entry
        content = commit.files[path]
        if path in found.lfs:
            sha256 = hashlib.sha256(content).hexdigest()
            self.hub.objects.setdefault(sha256, content)
            return _Answer(
                302,
                X_Repo_Commit=commit.sha,
                X_Linked_ETag=f'"{sha256}"',
                X_Linked_Size=str(len(content)),
                ETag=f'"{git_sha(content)}"',
                # Under another name, as on the Hub: the client asks the first server for metadata only.
                Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha256}",
            )
        return self._content(content, X_Repo_Commit=commit.sha, ETag=f'"{git_sha(content)}"')

    def cdn(self, oid: str) -> _Answer:
        return self._content(self.hub.objects[oid], ETag=f'"{oid}"')

    def _content(self, content: bytes, **headers: str) -> _Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return _Answer(200, content, Accept_Ranges="bytes", **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return _Answer(206, content[start : end + 1], **headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/auth-check/write", _Handler.check_rights),
    ("GET", rf"/api/models/{_REPO}/discussions", _Handler.discussions),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", r"/lfs-verify", _Handler.verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
