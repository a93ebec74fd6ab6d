"""The server's data, in memory: users, repositories, commits, large files."""

import hashlib
import json
import threading
from dataclasses import dataclass, field

LARGE = (".safetensors", ".bin", ".pt", ".png")  # stored outside git, on the second origin


@dataclass(frozen=True)
class User:
    name: str
    may_write: bool


# Tests search for the tokens in everything that the server receives, so each must be unique.
USERS = {
    "hf_alicewritesAAAAAAAAAAAAAAAAAAAAAAAA": User("alice", True),
    "hf_alicereadsonlyBBBBBBBBBBBBBBBBBBBBB": User("alice", False),
    "hf_bobwritesCCCCCCCCCCCCCCCCCCCCCCCCCC": User("bob", True),
}


@dataclass(frozen=True)
class Entry:
    """A file in a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash of the blob; for a large file, of its LFS pointer."""
        blob = self.content
        if self.large:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def describe(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        found = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        return found | ({"lfs": lfs} if self.large else {})


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    files: dict[str, Entry]
    number: int

    @property
    def sha(self) -> str:
        parts = [self.parent, self.title, self.number, sorted((path, e.oid) for path, e in self.files.items())]
        return hashlib.sha1(json.dumps(parts).encode()).hexdigest()


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add("main", "initial commit", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)})

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def add(self, branch: str, title: str, files: dict[str, Entry]) -> str:
        commit = Commit(self.branches.get(branch), title, files, len(self.commits))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def find(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    def history(self, revision: str) -> list[Commit]:
        commit, found = self.find(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found


@dataclass
class Fault:
    """An error in the next `times` requests with this method and a matching path.

    action: an HTTP status to answer with; "drop" (close the connection while the body arrives); "lose answer" (do the
    work, then close the connection); "hang" (do nothing until the faults are cleared); "truncate" or "corrupt" (change
    the downloaded file).
    """

    method: str
    path: str
    action: int | str
    times: int = 1


@dataclass
class Received:
    """A request that the server received; `headers` without the Authorization to the Hub."""

    origin: str
    method: str
    path: str
    headers: str
    authorized: bool
    body: bytes = b""


@dataclass
class Store:
    repos: dict[str, Repo] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def places_of(self, text: str) -> list[str]:
        """Return where a text occurs in requests and stored files."""
        needle = text.encode()
        found = [f"{r.method} {r.path}" for r in self.received if needle in r.body or text in r.headers + r.path]
        found += [f"large file {sha}" for sha, content in self.large_files.items() if needle in content]
        for repo in self.repos.values():
            for commit in repo.commits.values():
                found += [f"{repo.id}/{path}" for path, entry in commit.files.items() if needle in entry.content]
                found += [f"{repo.id}: {commit.title}"] if text in commit.title else []
        return found
