"""A Hub on 127.0.0.1 that speaks the protocol of huggingface_hub: enough of it to download, to upload, and to fail.
Data sets are read through it as well, by the client of `datasets`.

It keeps repositories in memory, hashes what it is given, and answers as the real one does: large files by a redirect to
another origin (as its CDN), uploads through LFS with signed addresses, errors with X-Error-Code. `requests` is the log.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SIGNATURE = "signed-0123456789abcdef"  # stands in every address that the CDN and the store hand out: must not leak
LFS = (".safetensors", ".bin", ".pth", ".onnx", ".gguf", ".parquet")
DATASETS = "datasets/"  # what the names of repositories of data begin with, as their addresses do


@dataclass
class Repo:
    """commits: {sha: {path: content}}; refs: {branch: sha}."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        content = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches: a status, or a cut after `cut` bytes."""

    pattern: str
    status: int = 0
    cut: int = 0
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """tokens: {token: (user, organisations, may write)}. requests: (method, path, range header, authorised)."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, tuple[str, tuple[str, ...], bool]] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)  # users who accepted the terms of the gated repositories
    faults: list[Fault] = field(default_factory=list)
    altering: set[str] = field(default_factory=set)  # files of which it changes a byte when they are committed
    requests: list[tuple[str, str, str | None, bool]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, files: dict[str, bytes], **kwargs) -> str:
        self.repos[name] = Repo(**kwargs)
        return self.repos[name].commit(files)

    def paths(self, method: str, part: str) -> list[str]:
        """What was asked for: the log's paths that contain `part`."""
        return [path for verb, path, _, _ in self.requests if verb == method and part in path]

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            result = next((f for f in self.faults if f.times and re.search(f.pattern, line)), None)
            if result:
                result.times -= 1
            return result


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Bound(_Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _row(path: str, data: bytes | None) -> dict:
    """What the Hub says of a path; data: None for a folder."""
    if data is None:
        return {"type": "directory", "path": path, "oid": git_sha(b""), "size": 0}
    row = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
    return row | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if path.endswith(LFS) else {})


class _Refusal(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client went away, or was killed
            self.close_connection = True

    def do_GET(self):
        hub, url = self.hub, urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        line = f"{self.command} {path}"
        self.cut = 0
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Range"), self.token is not None))
        try:
            if fault := hub.fault(line):
                self.cut = fault.cut
                if fault.status:
                    return self.reply(fault.status, {"error": "on demand"}, fault.headers)
            for pattern, action in _ROUTES:
                if match := re.fullmatch(pattern, line):
                    if self.token is not None and self.token not in hub.tokens:
                        raise _Refusal(401, None, "Invalid credentials in Authorization header")
                    with hub.lock:
                        answer = action(self, *match.groups())
                    return self.reply(*answer)
            raise _Refusal(404, None, "no such page")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            return self.reply(refusal.status, {"error": refusal.message}, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def reply(self, status: int, content: bytes | dict | list = b"", headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = dict(headers or {})
        if span and status == 200:
            start = int(span[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.cut and len(data) > self.cut:
                self.wfile.write(data[: self.cut])
                self.close_connection = True
                return
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------------- rights

    def repo(self, name: str) -> Repo:
        result, user = self.hub.repos.get(name), self.hub.tokens.get(self.token)
        if result is None or (result.private and not (user and name.split("/")[0] in (user[0], *user[1]))):
            if user is None:
                raise _Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        return result

    def writer(self, owner: str) -> None:
        user = self.hub.tokens.get(self.token)
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.")
        if not user[2] or owner not in (user[0], *user[1]):
            raise _Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner}")

    def at(self, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.repo(name)
        if (sha := repo.sha(revision)) is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    # ------------------------------------------------------------------------------------------------------ reading

    def info(self, name: str, revision: str = "main"):
        repo, sha = self.at(name, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        if "blobs" in self.query:
            siblings = [s | {"size": len(repo.commits[sha][s["rfilename"]])} for s in siblings]
        return 200, {
            "id": name.removeprefix(DATASETS),
            "sha": sha,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }

    def tree(self, name: str, revision: str, folder: str = ""):
        """What lies in a folder: its files and folders, or with `recursive` all that lies below it."""
        repo, sha = self.at(name, revision)
        start = f"{folder}/" if folder else ""
        result = {path: data for path, data in sorted(repo.commits[sha].items()) if path.startswith(start)}
        if folder and not result:
            raise _Refusal(404, "EntryNotFound", f"{folder} does not exist")
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return 200, [_row(path, data) for path, data in result.items()]
        inside = {path.removeprefix(start).split("/")[0] for path in result}
        return 200, [_row(start + name, result.get(start + name)) for name in sorted(inside)]

    def resolve(self, name: str, revision: str, path: str):
        repo, sha = self.at(name, revision)
        user = self.hub.tokens.get(self.token)
        if repo.gated and not (user and user[0] in self.hub.readers):
            raise _Refusal(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        data = repo.commits[sha].get(path)
        if data is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not path.endswith(LFS):
            return 200, data, headers | {"ETag": f'"{git_sha(data)}"'}
        self.hub.store[sha256(data)] = data
        cdn = self.hub.url.replace("127.0.0.1", "localhost")  # another origin, as the real one's CDN
        return (
            302,
            b"",
            headers
            | {
                "X-Linked-Etag": f'"{sha256(data)}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{cdn}/cdn/{sha256(data)}?Signature={SIGNATURE}",
            },
        )

    def cdn(self, oid: str):
        assert self.token is None, "a token was sent to the CDN"
        return 200, self.hub.store[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}

    def whoami(self):
        user = self.hub.tokens.get(self.token)
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.")
        return 200, {"type": "user", "name": user[0], "orgs": [{"name": org} for org in user[1]]}

    # ------------------------------------------------------------------------------------------------------ writing

    def create(self):
        requests = json.loads(self.body)
        owner = requests["organization"] or self.hub.tokens[self.token][0]
        self.writer(owner)
        name = f"{owner}/{requests['name']}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
        self.hub.add(
            name,
            {".gitattributes": b"*.safetensors filter=lfs\n"},
            private=requests.get("visibility") == "private" or bool(requests.get("private")),
        )
        return 200, {"url": f"{self.hub.url}/{name}"}

    def validate(self):
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.S)
        if faults := card_faults(yaml.safe_load(block[1]) if block else {}):
            return 400, {"errors": [{"message": fault} for fault in faults], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str):
        repo, sha = self.at(name, revision)
        self.may_commit(name)
        rows = []
        for file in json.loads(self.body)["files"]:
            lfs, data = file["path"].endswith(LFS), repo.commits[sha].get(file["path"])
            row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if data is not None:
                row["oid"] = sha256(data) if lfs else git_sha(data)
            rows.append(row)
        return 200, {"files": rows}

    def may_commit(self, name: str) -> None:
        """Anyone who is logged in may propose; only a writer may commit."""
        if "create_pr" not in self.query:
            self.writer(name.split("/")[0])
        elif self.hub.tokens.get(self.token) is None:
            raise _Refusal(401, None, "Invalid username or password.")

    def batch(self, name: str):
        requests = json.loads(self.body)
        if "ref" in requests:
            self.writer(name.split("/")[0])
        objects = []
        for item in requests["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.store:
                href = f"{self.hub.url}/store/{item['oid']}?Signature={SIGNATURE}"
                row["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(row)
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, oid: str):
        assert self.token is None, "a token was sent to the store"
        if self.query.get("Signature") != [SIGNATURE] or sha256(self.body) != oid:
            raise _Refusal(403, None, "the content is not what was signed")
        self.hub.store[oid] = self.body
        return 200, b""

    def verify(self):
        item = json.loads(self.body)
        held = self.hub.store.get(item["oid"], b"")
        return (200 if len(held) == item["size"] else 404), {}

    def commit(self, name: str, revision: str):
        repo, sha = self.at(name, revision)
        self.may_commit(name)
        files = dict(repo.commits[sha])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        for path in files.keys() & self.hub.altering:
            files[path] = files[path][:-1] + bytes([files[path][-1] ^ 1])
        proposed = "create_pr" in self.query
        new = repo.commit(files, "refs/pr/1" if proposed else revision)
        answer = {"success": True, "commitOid": new, "commitUrl": f"{self.hub.url}/{name}/commit/{new}"}
        return 200, answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if proposed else {})


def card_faults(data: object) -> list[str]:
    """What the Hub refuses in a card's metadata (its documented rules for models)."""
    if not isinstance(data, dict):
        return ["metadata is not a mapping"]
    faults = []
    for key in ("license", "pipeline_tag", "library_name", "base_model_relation"):
        if key in data and not isinstance(data[key], str):
            faults.append(f"{key} must be a string")
    if data.get("license") == "other" and not data.get("license_name"):
        faults.append("license_name is required with license: other")
    if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        faults.append("base_model_relation is unknown")
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            faults.append(f"base_model {base!r} is no model id")
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            faults.append(f"language {language!r} is no ISO code")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        faults.append("tags must be strings")
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                faults.append("model-index: task and dataset need a type, the dataset a name")
            faults += [
                "model-index: a metric lacks type or value"
                for m in result["metrics"]
                if not m.get("type") or m.get("value") is None
            ]
    return faults


_NAME, _REV = r"([\w.-]+/[\w.-]+)", r"(refs/[\w/]+|[^/]+)"
_DATASET = r"(datasets/[\w.-]+/[\w.-]+)"
_ROUTES = [
    (rf"GET /api/{_DATASET}", _Handler.info),
    (rf"GET /api/{_DATASET}/revision/(.+)", _Handler.info),
    (rf"GET /api/{_DATASET}/tree/{_REV}", _Handler.tree),
    (rf"GET /api/{_DATASET}/tree/{_REV}/(.+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_DATASET}/resolve/{_REV}/(.+)", _Handler.resolve),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/{_REV}", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/{_REV}/(.+)", _Handler.resolve),
    (r"GET /cdn/(\w+)", _Handler.cdn),
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/{_REV}", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /store/(\w+)", _Handler.put),
    (r"POST /verify", _Handler.verify),
    (rf"POST /api/models/{_NAME}/commit/{_REV}", _Handler.commit),
]
