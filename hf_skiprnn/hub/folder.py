"""A checkpoint folder: which of its files belong to it, and whether they would work where nothing else is.

Only known files are published (an allow-list): whatever else lies in a run's folder stays here. Every file is read
once, for its checksums and for keys in it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .card_checks import card_problems
from .private import LONGEST_KEY, keys_in, public

MODEL_CODE = Path(__file__).parents[1] / "model"
ALLOWED = re.compile(
    r"config\.json|generation_config\.json|(preprocessor|processor|tokenizer)_config\.json|results\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|[\w-]+\.onnx"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|README\.md|LICENSE(\.md|\.txt)?|NOTICE(\.txt)?|(steps-read|operating-points)-[\w.-]+\.(png|html)"
)
PARSED = (".json", ".md", ".py")  # files whose content is looked into
CHUNK = 2**20  # bytes read at a time


@dataclass(frozen=True)
class CheckpointFile:
    """A file as it will be in the repository: its path there, its bytes, and two checksums in hexadecimal."""

    path: str
    size: int
    sha256: str
    git_sha1: str  # of git's blob: what the Hub lists of small files


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a checkpoint folder.

    files: what belongs to it, in order of path. left_out: names of other files. problems: sentences about what would be
    refused, or would not load, on the Hub.
    """

    folder: Path
    files: list[CheckpointFile]
    left_out: list[str]
    problems: list[str] = field(default_factory=list)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder, each file once, and find its problems.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    folder = Path(folder)
    names, left_out = belonging(folder)
    problems = [f"{name} {reason}" for name in names if (reason := leaves(folder, name))]
    names = [name for name in names if not leaves(folder, name)]
    files, contents = [], {}
    for name in names:
        file, content, keys = _read(folder, name)
        files.append(file)
        if content is not None:
            contents[name] = content
        problems += [f"{name} holds what looks like {key}. Take it out, and revoke it." for key in keys]
    problems += [f"{name} is missing." for name in ("config.json", "README.md") if name not in names]
    problems += [*_weight_problems(folder, names), *_content_problems(contents, set(names))]
    if "README.md" in contents:
        problems += card_problems(contents["README.md"].decode("utf-8", "replace"), folder)
    return Checkpoint(folder, files, left_out, problems)


def checkpoint_files(folder: str | Path) -> list[CheckpointFile]:
    """Return what of a folder belongs to the checkpoint; errors as read_checkpoint's."""
    return read_checkpoint(folder).files


def checkpoint_problems(folder: str | Path) -> list[str]:
    """Return sentences about what would be refused, or would not load, on the Hub; errors as read_checkpoint's."""
    return read_checkpoint(folder).problems


def belonging(folder: Path) -> tuple[list[str], list[str]]:
    """Return (names of the files that belong to a checkpoint, names of the others), in order.

    Code belongs to it where config.json or a processor's file names it, or where such code imports it.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder. A checkpoint is what save_pretrained wrote.")
    found = sorted(path.name for path in folder.iterdir())
    known = [name for name in found if ALLOWED.fullmatch(name) and (folder / name).is_file()]
    settings = [name for name in known if name.endswith("config.json") and not leaves(folder, name)]
    modules = {reference.split(".")[0] for name in settings for _, reference in code_references(_json(folder / name))}
    code = [f"{module}.py" for module in with_imports(modules, folder) if f"{module}.py" in found]
    return sorted([*known, *code]), [name for name in found if name not in (*known, *code)]


def leaves(folder: Path, name: str) -> str:
    """Return why a file must not be followed: "" unless it is a link out of the folder."""
    path = folder / name
    if not path.is_symlink() or path.resolve().is_relative_to(folder.resolve()):
        return ""
    return f"is a link that leaves the folder, to {path.resolve()}. Copy the file here if it belongs to the checkpoint."


def with_imports(modules: Iterable[str], folder: Path) -> set[str]:
    """Return the modules and all that they import relatively, as far as they are in the folder."""
    found, open_ = set[str](), [module for module in modules if re.fullmatch(r"\w+", module)]
    while open_:
        module = open_.pop()
        path = folder / f"{module}.py"
        if module not in found and path.is_file() and not leaves(folder, path.name):
            found.add(module)
            open_ += imports_of(path.read_bytes())
    return found


def imports_of(code: bytes) -> list[str]:
    """Return the modules that code imports from beside itself: `from .x import y`.

    A regular expression, as transformers does it: ast.parse fails now and then in threads of Python 3.11.
    """
    return [name.decode() for name in re.findall(rb"^\s*from\s+\.(\w+)\s+import\b", code, re.MULTILINE)]


def _read(folder: Path, name: str) -> tuple[CheckpointFile, bytes | None, list[str]]:
    """Return (the file's description, its content if that is looked into, kinds of keys in it)."""
    path = folder / name
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    keys: set[str] = set()
    kept, overlap = [], b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            git.update(chunk)
            keys |= set(keys_in(overlap + chunk))
            overlap = chunk[-LONGEST_KEY:]
            if name.endswith(PARSED):
                kept.append(chunk)
    content = b"".join(kept) if name.endswith(PARSED) else None
    return CheckpointFile(name, size, sha256.hexdigest(), git.hexdigest()), content, sorted(keys)


def _weight_problems(folder: Path, names: list[str]) -> Iterator[str]:
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        yield "There are no weights: no file ends in .safetensors."
    for name in weights:
        try:
            with safe_open(folder / name, "pt") as file:
                broken = [key for key in file.keys() if not file.get_tensor(key).isfinite().all()]  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            yield f"{name} cannot be read ({error}): it was cut off. Save the checkpoint again."
            continue
        yield from (f"{name}: {key} holds NaN or infinite numbers." for key in broken)


def _content_problems(contents: dict[str, bytes], names: set[str]) -> Iterator[str]:
    for name, content in contents.items():
        if name.endswith(".json"):
            yield from _json_problems(name, content, names)
        if name.endswith(".py"):
            absent = [f"{module}.py" for module in imports_of(content) if f"{module}.py" not in names]
            yield from (f"{name} imports {module}, which is not in the folder." for module in absent)


def _json_problems(name: str, content: bytes, names: set[str]) -> Iterator[str]:
    try:
        held = json.loads(content)
    except ValueError as error:
        yield f"{name} is no JSON: {error}."
        return
    for kind, reference in code_references(held):
        if "--" in reference:
            yield f"{name}: {kind} names code in another repository ({reference}). Save the checkpoint again."
        elif f"{reference.split('.')[0]}.py" not in names:
            yield f"{name}: {kind} names {reference}, but {reference.split('.')[0]}.py is not in the folder."
    if name == "config.json" and not (isinstance(held, dict) and held.get("auto_map")):
        yield (
            "config.json names no code (auto_map), so the checkpoint loads only where hf_skiprnn is installed. "
            "Save it again with save_pretrained."
        )


def code_references(content: Any) -> Iterator[tuple[str, str]]:
    """Yield (what names it, "module.Class") for the code that a JSON file names."""
    if not isinstance(content, dict):
        return
    auto_map, pipelines = content.get("auto_map") or {}, content.get("custom_pipelines") or {}
    for auto, references in auto_map.items() if isinstance(auto_map, dict) else ():
        parts = [references] if isinstance(references, str) else references
        yield from ((auto, part) for part in parts if isinstance(part, str) and part)
    for task, pipeline in pipelines.items() if isinstance(pipelines, dict) else ():
        yield f'pipeline("{task}")', str(pipeline.get("impl")) if isinstance(pipeline, dict) else ""


def _json(path: Path) -> Any:
    """Return a file's JSON; None where it holds none, which is told as a problem elsewhere."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def stage(
    folder: str | Path, repo_id: str, into: str | Path, *, code: bool = True, license_id: str | None = None
) -> Path:
    """Put a checkpoint's files into a new folder, with a card for `repo_id` where there is a results.json.

    results.json loses what names this machine and its user. Large files are linked where the disk allows it.

    Args:
        folder: the checkpoint; it stays as it is.
        repo_id: what the card's example loads.
        into: the folder to make.
        code: with the code that config.json names, this package's where the folder has none.
        license_id: see render_card.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: a file is a link that leaves the folder.
        KeyError: results.json lacks a fact that every card tells.
    """
    from .card import RESULTS, render_card  # the tasks' pages need datasets, an extra

    folder, into = Path(folder), Path(into)
    into.mkdir(parents=True)
    for name in belonging(folder)[0]:
        if reason := leaves(folder, name):
            raise ValueError(f"{name} {reason}")
        if name not in (RESULTS, "README.md") and (code or not name.endswith(".py")):
            link_or_copy(folder / name, into / name)
    if code:
        add_code(into)
    if (folder / RESULTS).is_file():
        results = public(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
        (into / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (into / "README.md").write_text(
            render_card(folder, repo_id, license_id, True if code else None), encoding="utf-8"
        )
    elif (folder / "README.md").is_file():
        link_or_copy(folder / "README.md", into / "README.md")
    return into


def link_or_copy(source: Path, target: Path) -> None:
    """Copy a file; weights, which are large and never written to, become another name of the same file if possible."""
    if source.suffix in (".safetensors", ".onnx"):
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def add_code(folder: Path) -> None:
    """Put the modules of this package that the folder's JSON files name, and what those import, beside them.

    A folder with code of its own stays as it is.
    """
    if any(folder.glob("*.py")):
        return
    contents = [_json(path) for path in folder.glob("*.json")]
    modules = {reference.split(".")[0] for content in contents for _, reference in code_references(content)}
    for module in with_imports(modules, MODEL_CODE):
        shutil.copyfile(MODEL_CODE / f"{module}.py", folder / f"{module}.py")
