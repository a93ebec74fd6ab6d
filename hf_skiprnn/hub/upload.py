"""Upload a checkpoint to the Hub, and verify it by downloading it again.

`publish` uploads the checkpoint's files to a branch so that it holds exactly these, then downloads and compares them.
After an interruption it can be run again: no file is sent twice. A branch never holds half a checkpoint, because all
files arrive in one commit, whose parent must still be the newest commit of the branch.
"""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # httpx or httpx2, whichever it runs on

from .folder import Checkpoint, CheckpointFile, read_checkpoint

ATTEMPTS = 4  # tries of a request that fails with a temporary error
WAIT = 1.0  # seconds before the second attempt; doubled at each
GIT_FILES = (".gitattributes", ".gitignore")  # files that the Hub adds

T = TypeVar("T")


class HubError(RuntimeError):
    """Raised if a checkpoint did not reach the Hub, or came back different; the message says what to do."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint: its place on the Hub and its files."""

    repo_id: str
    commit: str
    tag: str | None
    files: list[CheckpointFile]
    url: str


def publish(
    folder: str | Path | Checkpoint,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "main",
    version: str | None = None,
    delete: bool = False,
    message: str | None = None,
) -> Published:
    """Upload a checkpoint to `branch` of a repository, verify it by downloading it, and tag it with `version`.

    Args:
        folder: the checkpoint's folder; or what read_checkpoint returned, so that files are not read again.
        repo_id: OWNER/NAME. The repository is created if it does not exist. The token comes from `hf auth login` or
            HF_TOKEN.
        private: make a new repository private.
        branch: branch to upload to; created if it does not exist.
        version: name of a tag; an existing tag is never moved. None: no tag.
        delete: delete the other files on the branch.
        message: commit message.

    Raises:
        ValueError: the checkpoint has problems; the message lists them.
        HubError: the token is missing, wrong or may not write; the Hub refuses the metadata; the branch holds other
            files; the version exists with other files; the Hub does not answer; or downloaded files differ.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
    if checkpoint.problems:
        problems = "\n".join(f"- {problem}" for problem in checkpoint.problems)
        raise ValueError(f"{checkpoint.folder} is not ready for the Hub:\n{problems}")
    api = HfApi(library_name="hf_skiprnn")
    with explained(repo_id):
        if get_token() is None:
            raise LocalTokenNotFoundError("no token")
        check_card(checkpoint.folder)
        repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if version is not None:
            _check_version(api, repo_id, version, checkpoint.files)
        if branch != "main":
            _retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        text = message or f"Publish {version or checkpoint.folder.resolve().name}"
        commit = _retried(lambda: _commit(api, checkpoint, repo_id, branch, delete, text))
        verify_published(checkpoint.files, repo_id, commit)
        if version is not None:
            _retried(lambda: _tag(api, repo_id, version, commit))
    return Published(repo_id, commit, version, checkpoint.files, f"{api.endpoint}/{repo_id}")


def check_card(folder: Path) -> None:
    """Ask the Hub to check the metadata of README.md: only the Hub knows which licences and tags it accepts."""
    try:
        _retried(ModelCard.load(folder / "README.md").validate)
    except ValueError as error:  # its text is the Hub's answer, as JSON
        told = re.findall(r'"message": "((?:[^"\\]|\\.)*)"', str(error)) or [str(error)]
        raise HubError(f"The Hub refuses README.md: {'; '.join(told)}") from error


def _commit(api: HfApi, checkpoint: Checkpoint, repo_id: str, branch: str, delete: bool, message: str) -> str:
    """Return the id of the branch's commit that holds the files; make that commit unless the branch has the files."""
    head = api.repo_info(repo_id, revision=branch).sha
    changed, others = differences(checkpoint.files, remote_checksums(api, repo_id, str(head)))
    if others and not delete:
        raise HubError(
            f"{repo_id} holds files that are not of this checkpoint: {', '.join(others)}. Delete them there, publish "
            "to another repository, or use --delete."
        )
    operations: list[Any] = [CommitOperationDelete(path) for path in others]
    operations += [CommitOperationAdd(path, checkpoint.folder / path) for path in changed]
    if not operations:
        return str(head)
    return api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=head).oid


def remote_checksums(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """Return path -> checksum as the Hub lists it: SHA-256 of a large file, git's SHA-1 of a small one."""
    return {
        entry.path: entry.blob_id if entry.lfs is None else entry.lfs.sha256
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }


def differences(files: list[CheckpointFile], there: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return (new or changed paths, paths that only the Hub has). `there`: what remote_checksums returned."""
    changed = [file.path for file in files if there.get(file.path) not in (file.sha256, file.git_sha1)]
    return changed, sorted(there.keys() - {file.path for file in files} - set(GIT_FILES))


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}


def _check_version(api: HfApi, repo_id: str, version: str, files: list[CheckpointFile]) -> None:
    """Raise HubError, before anything is sent, if the version already exists with other files."""
    tagged = _tags(api, repo_id).get(version)
    if tagged is not None and any(differences(files, remote_checksums(api, repo_id, tagged))):
        raise HubError(
            f"{repo_id} already has a version {version} with other files (commit {tagged[:8]}). Tags are never moved: "
            "choose a new one with --version."
        )


def _tag(api: HfApi, repo_id: str, version: str, commit: str) -> None:
    if version not in _tags(api, repo_id):
        api.create_tag(repo_id, tag=version, revision=commit)


def verify_published(files: list[CheckpointFile], repo_id: str, revision: str) -> None:
    """Download a revision without any cache, and compare it with `files`.

    Raises:
        HubError: files are absent or differ; the message names each.
    """
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        with explained(repo_id):
            snapshot_download(repo_id, revision=revision, local_dir=f"{scratch}/files", cache_dir=f"{scratch}/cache")
        problems = []
        for file in files:
            path = Path(scratch, "files", file.path)
            if not path.is_file():
                problems.append(f"{file.path} is missing")
            elif (got := hashlib.sha256(path.read_bytes()).hexdigest()) != file.sha256:
                problems.append(f"{file.path} has SHA-256 {got[:12]}..., expected {file.sha256[:12]}...")
    if problems:
        raise HubError(
            f"The files downloaded from {repo_id} at {revision[:8]} differ from those sent: {'; '.join(problems)}. "
            "Run it again. If they still differ, the repository is damaged: delete those files there first."
        )


def _retried(action: Callable[[], T]) -> T:
    """Return action(), repeated after temporary errors: a lost answer, a busy server, somebody else's push."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (httpx.TransportError, OSError, RuntimeError, ValueError) as error:
            if attempt == ATTEMPTS - 1 or not _may_pass(error):
                raise
            time.sleep(WAIT * 2**attempt)
    raise AssertionError("unreachable")


def _may_pass(error: BaseException | None) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (409, 412, 429)
    if error is None or isinstance(error, HubError):
        return False
    return isinstance(error, httpx.TransportError) or _may_pass(error.__cause__)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub's client into a HubError that says what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        if (sentence := explain(error, repo_id)) is None:
            raise
        raise HubError(sentence) from error


def explain(error: BaseException | None, repo_id: str) -> str | None:
    """Explain an error of the Hub's client and say what to do; return None for any other error."""
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token. Run `hf auth login`, or set HF_TOKEN to one with the role 'write'."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated. Request access on its page, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch, tag or commit: {error.response.headers.get('X-Error-Message', '')}."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist, or it is private and the token cannot see it. Check the name and the token."
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or ""
        if status == 401:
            return "The Hub does not know this token. Run `hf auth login` again, or set HF_TOKEN to a valid one."
        if status == 403:
            return f"This token may not write to {repo_id} ({said}). Use one with the role 'write' of an owner."
        if status == 412:
            return f"Others keep pushing to {repo_id}. Your files were not committed; run it again."
        return f"The Hub answered {status} for {repo_id} ({said}). What was sent is kept; run the same command again."
    if isinstance(error, httpx.TransportError):
        return f"The Hub cannot be reached or hung up ({error}). What was sent is kept; run the same command again."
    # The client wraps errors: those of uploads in a RuntimeError, those of downloads in a ValueError or OSError.
    return None if error is None or error.__cause__ is None else explain(error.__cause__, repo_id)
