"""Checkpoints on the Hub: getting them there whole, and knowing that they came back whole.

`publish` makes a repository's branch hold exactly the folder's files, downloads them again and compares. It may be cut
off anywhere and run again: nothing is sent twice, and a branch never holds half of a checkpoint, because all files
arrive in one commit on top of the one that was seen before.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # httpx or httpx2, whichever it runs on

from .folder import CheckpointFile, checkpoint_files, checkpoint_problems, sha256_of

ATTEMPTS = 4  # of a commit that failed for a reason that may pass
WAIT = 1.0  # seconds before the second attempt; doubled at each
GIT_FILES = (".gitattributes", ".gitignore")  # the Hub's own

T = TypeVar("T")


class HubError(RuntimeError):
    """Something did not reach the Hub, or did not come back whole; the message says what to do."""


@dataclass(frozen=True)
class Published:
    """Where a checkpoint is now."""

    repo_id: str
    commit: str
    tag: str | None
    files: list[CheckpointFile]
    url: str


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "main",
    version: str | None = None,
    delete: bool = False,
    message: str | None = None,
) -> Published:
    """Make `branch` of a repository hold this checkpoint, check it by downloading, and tag it with `version`.

    The repository is made if there is none (`private` or not); the token comes from `hf auth login` or HF_TOKEN.
    delete: delete what else the branch holds.

    Raises:
        ValueError: the checkpoint has problems; the message lists them.
        HubError: no or a wrong token, no right to write, files that are not the checkpoint's, a version that exists
            elsewhere, a Hub that does not answer, or files that came back different.
    """
    if problems := checkpoint_problems(folder):
        raise ValueError(f"{folder} is not ready for the Hub:\n" + "\n".join(f"- {problem}" for problem in problems))
    files = checkpoint_files(folder)
    api = HfApi(library_name="hf_skiprnn")
    with explained(repo_id):
        if get_token() is None:
            raise LocalTokenNotFoundError("no token")
        repo_id = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if version is not None:
            _check_version(api, Path(folder), repo_id, version, files)
        if branch != "main":
            _retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        text = message or f"Publish {version or Path(folder).resolve().name}"
        commit = _retried(lambda: _commit(api, Path(folder), repo_id, branch, files, delete, text))
        verify_published(files, repo_id, commit)
        if version is not None:
            _retried(lambda: _tag(api, repo_id, version, commit))
    return Published(repo_id, commit, version, files, f"{api.endpoint}/{repo_id}")


def _commit(
    api: HfApi, folder: Path, repo_id: str, branch: str, files: list[CheckpointFile], delete: bool, message: str
) -> str:
    """One commit on top of the branch as it is now; none where it holds the files already. -> the commit's id."""
    head = api.repo_info(repo_id, revision=branch).sha
    changed, others = differences(folder, files, remote_checksums(api, repo_id, str(head)))
    if others and not delete:
        raise HubError(
            f"{repo_id} holds files that are not of this checkpoint: {', '.join(others)}. Delete them there, publish "
            "to another repository, or say --delete."
        )
    operations: list[Any] = [CommitOperationDelete(path) for path in others]
    operations += [CommitOperationAdd(path, folder / path) for path in changed]
    if not operations:
        return str(head)
    return api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=head).oid


def remote_checksums(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """Path -> SHA-256 of a large file, or git's SHA-1 of a small one, as the Hub lists them."""
    return {
        entry.path: entry.blob_id if entry.lfs is None else entry.lfs.sha256
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }


def differences(folder: Path, files: list[CheckpointFile], there: dict[str, str]) -> tuple[list[str], list[str]]:
    """(paths that are new or changed, paths that only the Hub has); `there`: what remote_checksums returned."""
    changed = [file.path for file in files if there.get(file.path) not in (file.sha256, _git_name(folder / file.path))]
    return changed, sorted(there.keys() - {file.path for file in files} - set(GIT_FILES))


def _git_name(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}


def _check_version(api: HfApi, folder: Path, repo_id: str, version: str, files: list[CheckpointFile]) -> None:
    """Before anything is sent: a version that exists must be of these very files."""
    tagged = _tags(api, repo_id).get(version)
    if tagged is not None and any(differences(folder, files, remote_checksums(api, repo_id, tagged))):
        raise HubError(
            f"{repo_id} has a version {version} of other files already (commit {tagged[:8]}). Versions never move: "
            "choose a new one with --version."
        )


def _tag(api: HfApi, repo_id: str, version: str, commit: str) -> None:
    if version not in _tags(api, repo_id):
        api.create_tag(repo_id, tag=version, revision=commit)


def verify_published(files: list[CheckpointFile], repo_id: str, revision: str) -> None:
    """Download a revision anew and compare it with `files`.

    Raises:
        HubError: a file is absent or different; the message names each.
    """
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-") as scratch:
        with explained(repo_id):
            snapshot_download(repo_id, revision=revision, local_dir=f"{scratch}/files", cache_dir=f"{scratch}/cache")
        problems = []
        for file in files:
            path = Path(scratch, "files", file.path)
            if not path.is_file():
                problems.append(f"{file.path} is not there")
            elif (got := sha256_of(path)) != file.sha256:
                problems.append(f"{file.path} has SHA-256 {got[:12]}..., expected {file.sha256[:12]}...")
    if problems:
        raise HubError(
            f"What came back from {repo_id} at {revision[:8]} is not what was sent: {'; '.join(problems)}. "
            "Run it again; if it stays so, the repository is damaged: delete those files there first."
        )


def verify_cache(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> int:
    """Compare the downloaded files of a repository with the checksums that the Hub lists; returns how many there are.

    A download that was changed on its way at the same size is not noticed by the client; it is here.

    Raises:
        HubError: a file is different, or the Hub cannot be asked; the message says what to do.
    """
    with explained(repo_id):
        found = HfApi(library_name="hf_skiprnn").verify_repo_checksums(repo_id, revision=revision, cache_dir=cache_dir)
    if found.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in found.mismatches)
        raise HubError(
            f"The downloaded {names} of {repo_id} is not what the Hub has. Load it once with force_download=True."
        )
    return found.checked_count


def _retried(action: Callable[[], T]) -> T:
    """Do it, again after what may pass: an answer that was lost, a server that is busy, another push in between."""
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


class explained:  # noqa: N801 - used as a context manager only
    """Turns what the Hub's client raises into a HubError that says what to do."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HubError) or (sentence := explain(error, self.repo_id)) is None:
            return
        raise HubError(sentence) from error


def explain(error: BaseException | None, repo_id: str) -> str | None:
    """A sentence about an error of the Hub's client and what to do; None for any other error."""
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token. Run `hf auth login`, or set HF_TOKEN to one with the role 'write'."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated. Ask for access on its page, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch, tag or commit: {error.response.headers.get('X-Error-Message', '')}."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no {repo_id}, or it is private and the token may not see it. Check the name and the token."
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or ""
        if status == 401:
            return "The Hub does not know this token. Run `hf auth login` again, or set HF_TOKEN to a valid one."
        if status == 403:
            return f"This token may not write to {repo_id} ({said}). Use one with the role 'write' of an owner."
        if status == 412:
            return f"Others keep pushing to {repo_id}. Nothing of yours is there; run it again."
        return f"The Hub answered {status} for {repo_id} ({said}). What was sent is kept; run the same command again."
    if isinstance(error, httpx.TransportError):
        return f"The Hub cannot be reached or hung up ({error}). What was sent is kept; run the same command again."
    # The client wraps: an upload's failure in a RuntimeError, a download's in a ValueError or OSError.
    return None if error is None or error.__cause__ is None else explain(error.__cause__, repo_id)
