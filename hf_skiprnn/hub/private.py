"""Find keys and passwords in files before they are published, and remove local paths from results."""

import re
import shlex
from pathlib import PureWindowsPath
from typing import Any

KEYS = {
    "a Hugging Face token": rb"hf_(?:[a-z]{2,10}_)?[A-Za-z0-9]{30,}\b",
    "a private key": rb"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d",
    "an AWS key": rb"A[KS]IA[0-9A-Z]{16}\b|aws_secret_access_key['\" :=]{1,8}[A-Za-z0-9/+]{40}",
    "a GitHub token": rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}",
    "a GitLab token": rb"glpat-[\w-]{20,}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{20,}",
    "a Google key": rb"AIza[\w-]{35}\b|\bya29\.[\w-]{30,}",
    "a Slack token": rb"xox[abeprs]-[\w-]{10,}",
    "a Weights & Biases key": rb"(?:wandb|WANDB)[\w.]{0,20}['\" :=]{1,8}[0-9a-f]{40}\b|wandb_v\d_\w{20,}",
    "an Azure key": rb"AccountKey=[A-Za-z0-9/+]{40,}",
    "a PyPI, npm or Docker token": rb"pypi-[\w-]{50,}|\bnpm_[A-Za-z0-9]{36}\b|dckr_pat_[\w-]{20,}",
    "a web token (JWT)": rb"\beyJ[\w-]{10,100}\.eyJ[\w-]{10,}",
    "a password of .netrc": rb"machine\s+\S{1,80}\s+login\s+\S{1,80}\s+password\s+\S",
    "a password in an address": rb"://[^\s/:@'\"<>]{1,64}:[^\s/@'\"<>]{1,64}@[\w.-]",
    "a signature in an address": rb"[?&](?:sig|token|access_token|api_?key|X-Amz-Signature)=[\w%+/-]{16,}",
}
LONGEST_KEY = 300  # largest length of a match in bytes: chunks of a file overlap by as much
_PATTERNS = {what: re.compile(pattern) for what, pattern in KEYS.items()}

_CREDENTIALS = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s/@]+@|\b[\w.%+-]+:[^\s/:@]+@(?=[\w-]+\.)")
# Where a local path starts: a home folder (~), a Windows drive, a variable, or ".." up to the folder of all homes.
_START = r"~[\w.-]*|[A-Za-z]:|\$\{?\w+\}?|%\w+%|(?:\.{1,2}[/\\])*\.\.(?=[/\\](?:home|Users)[/\\])"
# The folders in such a path or in an absolute one; not the "//" of a URL.
_FOLDERS = re.compile(
    r"(?<![\w./~\\-])(?!(?<=:)//)(?:file:/*(?=/))?(?:" + _START + r")?[/\\]+(?=\S)(?:[^\s/\\\"',;:\])}]+[/\\]+)*"
)
_WHOLE_PATH = re.compile(rf"(?:file:/+|{_START})?[/\\][^=]*")


def keys_in(content: bytes) -> list[str]:
    """Return the kinds of keys that the bytes seem to hold."""
    return [what for what, pattern in _PATTERNS.items() if pattern.search(content)]


def public(value: Any) -> Any:
    """Remove local folders, user names and passwords from the strings of a JSON value.

    An absolute path, or one from a home folder (~), keeps only its last part. A URL loses only `user:password@`.
    """
    if isinstance(value, dict):
        return {public(name): public(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    return _public_text(value) if isinstance(value, str) else value


def _public_text(text: str) -> str:
    text = _CREDENTIALS.sub(r"\1", text)
    if _WHOLE_PATH.fullmatch(text) and " -" not in text:  # folders may hold spaces
        return PureWindowsPath(text).name
    if not _FOLDERS.search(text):
        return text
    try:
        words = shlex.split(text)
    except ValueError:  # not a command line: a text with a single quote
        return _FOLDERS.sub("", text)
    if any(" " in word for word in words):  # quoted paths with spaces
        return shlex.join(_public_word(word) for word in words)
    return _FOLDERS.sub("", text)


def _public_word(word: str) -> str:
    name, sign, value = word.rpartition("=")
    return f"{name}{sign}{_public_text(value)}" if sign or " " in value else _FOLDERS.sub("", word)
