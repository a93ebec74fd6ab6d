"""The server: `python server.py` prints the URLs of its two origins and serves until its input ends.

The second origin holds large files and must never receive an Authorization header. Paths under /_control are for the
tests.
"""

import base64
import json
import re
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from store import LARGE, USERS, Entry, Fault, Received, Repo, Store, User

STORE = Store()
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "other")
HANG_SECONDS = 60


class Answer(NamedTuple):
    status: int = 200
    body: bytes | dict | list = b""
    headers: tuple[tuple[str, str], ...] = ()


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        headers = (("X-Error-Message", message), *((("X-Error-Code", code),) if code else ()))
        self.answer = Answer(status, {"error": message}, headers)


class Origin(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, name: str, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.name, self.host = name, host

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client was killed
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin

    def do(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/_control/"):
            self.send(control(path.removeprefix("/_control/"), json.loads(self.read_body() or b"{}")))
        else:
            self.serve(path)

    def serve(self, path: str) -> None:
        note = Received(
            self.server.name,
            self.command,
            self.path,
            str([(k, v) for k, v in self.headers.items() if k.lower() != "authorization" or self.server.name != "hub"]),
            "authorization" in self.headers,
        )
        with STORE.lock:
            STORE.received.append(note)
            fault = take_fault(self.command, path)
        if fault == "drop":
            self.rfile.read1(1024)
            self.hang_up()
            return
        note.body = self.read_body()
        if fault == "hang":
            end = time.monotonic() + HANG_SECONDS
            while STORE.faults and time.monotonic() < end:
                time.sleep(0.02)
        elif isinstance(fault, int):
            self.send(Answer(fault, {"error": f"fault {fault}"}, (("X-Error-Message", f"fault {fault}"),)))
            return
        else:
            try:
                with STORE.lock:
                    answer = respond(self, path, note.body)
            except RefusedError as refused:
                answer = refused.answer
            except Exception:  # noqa: BLE001 - a bug of this server: otherwise the client sees only a closed connection
                answer = Answer(400, {"error": traceback.format_exc()})
            if fault != "lose answer":
                self.send(answer, fault)
                return
        self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do  # noqa: N815 - names in http.server

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def send(self, answer: Answer, fault: str | None = None) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = dict(answer.headers)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.hang_up()
            return
        if fault == "corrupt":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - name in http.server
        pass


def take_fault(method: str, path: str) -> int | str | None:
    for fault in STORE.faults:
        if fault.method == method and fault.times > 0 and re.search(fault.path, path):
            fault.times -= 1
            return fault.action
    return None


def control(name: str, request: dict[str, Any]) -> Answer:
    with STORE.lock:
        if name == "fault":
            STORE.faults.append(Fault(**request))
        elif name == "clear":
            left = [fault.times for fault in STORE.faults]
            STORE.faults.clear()
            return Answer(body=left)
        elif name == "requests":
            return Answer(body=[[r.origin, r.method, r.path, r.authorized] for r in STORE.received])
        elif name == "places":
            return Answer(body=STORE.places_of(request["text"]))
        elif name == "repo":
            repo = STORE.repos[request["id"]]
            files = {path: entry.sha256 for path, entry in repo.find(request["revision"]).files.items()}
            titles = [commit.title for commit in repo.history(request["revision"])]
            return Answer(body={"files": files, "titles": titles, "tags": repo.tags, "branches": repo.branches})
        else:
            return Answer(404)
    return Answer()


def respond(request: Handler, path: str, body: bytes) -> Answer:
    if request.server.name == "storage":
        return storage(request, path, body)
    user = user_of(request)
    for methods, pattern, route in ROUTES:
        found = re.fullmatch(pattern, path)
        if found and request.command in methods:
            query = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
            parts = {name: part for name, part in found.groupdict().items() if part is not None}
            if "repo" in parts:
                writes = request.command != "GET" and request.command != "HEAD" and "paths-info" not in path
                parts["repo"] = accessible(parts["repo"], user, writes)
            kind = request.headers.get("content-type", "")
            parsed = json.loads(body) if body and kind.endswith("json") and not kind.endswith("ndjson") else body
            return route(user=user, body=parsed, query=query, method=request.command, **parts)
    raise RefusedError(404, f"no route for {request.command} {path}")


def storage(request: Handler, path: str, body: bytes) -> Answer:
    sha = path.rsplit("/", 1)[1]
    if "authorization" in request.headers:
        raise RefusedError(400, "this origin must not see the token")
    if request.command == "PUT":
        entry = Entry(body, True)
        if entry.sha256 != sha:
            raise RefusedError(400, "the content is not what was announced")
        STORE.large_files[sha] = body
        return Answer()
    content = STORE.large_files[sha]
    start = int((re.match(r"bytes=(\d+)-", request.headers.get("range", "")) or [0, 0])[1])
    ranged = (("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"),) if start else ()
    return Answer(206 if start else 200, content[start:], (("ETag", f'"{sha}"'), *ranged))


def user_of(request: Handler) -> User | None:
    token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if token and token not in USERS:
        raise RefusedError(401, "Invalid credentials in Authorization header")
    return USERS.get(token)


def accessible(repo_id: str, user: User | None, writes: bool) -> Repo:
    repo = STORE.repos.get(repo_id)
    if repo is None or (repo.private and (user is None or user.name != repo.owner)):
        raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
    if writes and user is None:
        raise RefusedError(401, "Authentication required to write")
    if writes and (user.name != repo.owner or not user.may_write):
        role = "a token with the role 'write'" if user.name == repo.owner else f"the right to write to {repo_id}"
        raise RefusedError(403, f"Forbidden: you need {role}")
    return repo


def commit_of(repo: Repo, revision: str) -> Any:
    commit = repo.find(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def who(user: User | None, **_: Any) -> Answer:
    if user is None:
        raise RefusedError(401, "Invalid username or password.")
    role = "write" if user.may_write else "read"
    return Answer(body={"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": {"role": role}}})


def create(user: User | None, body: dict, **_: Any) -> Answer:
    if user is None:
        raise RefusedError(401, "Authentication required to create a repository")
    owner = body.get("organization") or user.name
    repo_id = f"{owner}/{body['name']}"
    url = {"url": f"{HUB.url}/{repo_id}", "id": repo_id}
    if repo_id in STORE.repos:
        return Answer(409, url | {"error": "You already created this model repo"})
    if owner != user.name or not user.may_write:
        raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    private = body.get("visibility") == "private" or body.get("private") is True
    STORE.repos[repo_id] = Repo(repo_id, private=private)
    return Answer(body=url)


def settings(repo: Repo, body: dict, **_: Any) -> Answer:
    repo.gated = bool(body.get("gated", repo.gated))
    return Answer(body={})


def validate(body: dict, **_: Any) -> Answer:
    found = re.search(r"^license: (\S+)", body["content"], re.MULTILINE)
    wrong = (
        [{"message": f'"license" must be one of [{", ".join(LICENSES)}]'}] if found and found[1] not in LICENSES else []
    )
    return Answer(400 if wrong else 200, {"errors": wrong, "warnings": []})


def preupload(repo: Repo, rev: str, body: dict, **_: Any) -> Answer:
    files = commit_of(repo, rev).files
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            "shouldIgnore": False,
            "oid": files[file["path"]].etag if file["path"] in files else None,
        }
        for file in body["files"]
    ]
    return Answer(body={"files": modes})


def lfs_batch(repo: Repo, body: dict, **_: Any) -> Answer:
    objects = []
    for wanted in body["objects"]:
        href = {"href": f"{STORAGE.url}/lfs/{wanted['oid']}"}
        verify = {"href": f"{HUB.url}/api/lfs/verify"}
        new = wanted["oid"] not in STORE.large_files
        objects.append(wanted | ({"actions": {"upload": href, "verify": verify}} if new else {}))
    return Answer(body={"transfer": "basic", "objects": objects})


def lfs_verify(body: dict, **_: Any) -> Answer:
    content = STORE.large_files.get(body["oid"])
    return Answer(200 if content is not None and len(content) == body["size"] else 404, {})


def commit(repo: Repo, rev: str, body: bytes, **_: Any) -> Answer:
    base = commit_of(repo, rev)
    lines = [json.loads(line) for line in body.splitlines()]
    header, files = lines[0]["value"], dict(base.files)
    if header.get("parentCommit") not in (None, base.sha):
        raise RefusedError(412, f"A commit has happened since: {rev} is at {base.sha}")
    for line in lines[1:]:
        kind, value = line["key"], line["value"]
        if kind == "file":
            files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            if value["oid"] not in STORE.large_files:
                raise RefusedError(400, f"{value['path']} was never uploaded")
            files[value["path"]] = Entry(STORE.large_files[value["oid"]], True)
        elif kind == "deletedFile":
            del files[value["path"]]
        else:
            raise RefusedError(400, f"cannot {kind}")
    sha = repo.add(rev, header["summary"], files)
    return Answer(body={"commitUrl": f"{HUB.url}/{repo.id}/commit/{sha}", "commitOid": sha, "success": True})


def model_info(repo: Repo, rev: str = "main", **_: Any) -> Answer:
    found = commit_of(repo, rev)
    siblings = [{"rfilename": path} for path in sorted(found.files)]
    gated = "manual" if repo.gated else False
    info = {"_id": "0" * 24, "id": repo.id, "modelId": repo.id, "sha": found.sha, "private": repo.private}
    return Answer(body=info | {"gated": gated, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})


def tree(repo: Repo, rev: str, **_: Any) -> Answer:
    return Answer(body=[entry.describe(path) for path, entry in sorted(commit_of(repo, rev).files.items())])


def paths_info(repo: Repo, rev: str, body: bytes, **_: Any) -> Answer:
    files = commit_of(repo, rev).files
    wanted = parse_qs(body.decode()).get("paths", [])
    return Answer(body=[files[path].describe(path) for path in wanted if path in files])


def refs(repo: Repo, **_: Any) -> Answer:
    def listed(kind: str, named: dict[str, str]) -> list[dict]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in named.items()]

    return Answer(body={"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})


def commits(repo: Repo, rev: str, **_: Any) -> Answer:
    commit_of(repo, rev)
    date = {"date": "2025-01-01T00:00:00.000Z", "authors": [], "message": ""}
    return Answer(body=[{"id": c.sha, "title": c.title, **date} for c in repo.history(rev)])


def tag(repo: Repo, rev: str, body: dict, method: str, **_: Any) -> Answer:
    if method == "DELETE":
        del repo.tags[rev]
    elif body["tag"] in repo.tags:
        raise RefusedError(409, f"Tag {body['tag']} already exists")
    else:
        repo.tags[body["tag"]] = commit_of(repo, rev).sha
    return Answer(body={})


def branch(repo: Repo, rev: str, body: dict, **_: Any) -> Answer:
    if rev in repo.branches:
        raise RefusedError(409, f"Branch {rev} already exists")
    repo.branches[rev] = commit_of(repo, body.get("startingPoint") or "main").sha
    return Answer(body={})


def resolve(repo: Repo, rev: str, path: str, user: User | None, **_: Any) -> Answer:
    if repo.gated and (user is None or user.name != repo.owner):
        raise RefusedError(401 if user is None else 403, f"Access to model {repo.id} is restricted", "GatedRepo")
    found = commit_of(repo, rev)
    if path not in found.files:
        raise RefusedError(404, "Entry not found", "EntryNotFound")
    entry, always = found.files[path], (("X-Repo-Commit", found.sha), ("Accept-Ranges", "bytes"))
    if not entry.large:
        return Answer(200, entry.content, (*always, ("ETag", f'"{entry.oid}"')))
    linked = (("X-Linked-Etag", f'"{entry.sha256}"'), ("X-Linked-Size", str(len(entry.content))))
    return Answer(302, b"", (*always, *linked, ("Location", f"{STORAGE.url}/lfs/{entry.sha256}")))


MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
REV = r"/(?P<rev>.+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", who),
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate),
    (("POST",), "/api/lfs/verify", lfs_verify),
    (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    (("GET", "HEAD"), r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", resolve),
    (("GET",), MODEL, model_info),
    (("GET",), rf"{MODEL}/revision{REV}", model_info),
    (("GET",), rf"{MODEL}/tree/(?P<rev>[^/]+)", tree),
    (("GET",), rf"{MODEL}/refs", refs),
    (("GET",), rf"{MODEL}/commits{REV}", commits),
    (("PUT",), rf"{MODEL}/settings", settings),
    (("POST",), rf"{MODEL}/preupload{REV}", preupload),
    (("POST",), rf"{MODEL}/commit{REV}", commit),
    (("POST",), rf"{MODEL}/paths-info{REV}", paths_info),
    (("POST", "DELETE"), rf"{MODEL}/tag{REV}", tag),
    (("POST",), rf"{MODEL}/branch{REV}", branch),
]

HUB, STORAGE = Origin("hub", "127.0.0.1"), Origin("storage", "localhost")

if __name__ == "__main__":
    for origin in (HUB, STORAGE):
        threading.Thread(target=origin.serve_forever, daemon=True).start()
    print(HUB.url, STORAGE.url, flush=True)
    sys.stdin.read()
