"""Read a checkpoint folder: which files belong to it, and whether they work without anything else.

Only files on an allow-list are published; other files in a run's folder are not. Every file is read once, to compute
its checksums and to search it for keys and passwords.
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
from torch import Tensor

from .card_checks import card_problems
from .private import LONGEST_KEY, keys_in, public

MODEL_CODE = Path(__file__).parents[1] / "model"
ALLOWED = re.compile(
    r"config\.json|generation_config\.json|(preprocessor|processor|tokenizer)_config\.json|results\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|[\w-]+\.onnx"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|README\.md|LICENSE(\.md|\.txt)?|NOTICE(\.txt)?|(steps-read|operating-points)-[\w.-]+\.(png|html)"
)
PARSED = (".json", ".md", ".py")  # files whose content is checked
CHUNK = 2**20  # bytes read at a time


@dataclass(frozen=True)
class CheckpointFile:
    """A file as it will be in the repository: its path there, its bytes, and two checksums in hexadecimal."""

    path: str
    size: int
    sha256: str
    git_sha1: str  # of the git blob: the checksum that the Hub lists for small files


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a checkpoint folder.

    files: the files that belong to it, sorted by path. left_out: names of other files. problems: sentences about what
    the Hub would refuse, or what would not load from it.
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
    """Return the files of a folder that belong to the checkpoint; errors as in read_checkpoint."""
    return read_checkpoint(folder).files


def checkpoint_problems(folder: str | Path) -> list[str]:
    """Return sentences about what the Hub would refuse, or what would not load; errors as in read_checkpoint."""
    return read_checkpoint(folder).problems


def belonging(folder: Path) -> tuple[list[str], list[str]]:
    """Return (names of the files that belong to a checkpoint, names of the others), in order.

    A module belongs to it if config.json or a processor's file names it, or if such a module imports it.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. A checkpoint is a folder that save_pretrained wrote.")
    found = sorted(path.name for path in folder.iterdir())
    known = [name for name in found if ALLOWED.fullmatch(name) and (folder / name).is_file()]
    settings = [name for name in known if name.endswith("config.json") and not leaves(folder, name)]
    modules = {reference.split(".")[0] for name in settings for _, reference in code_references(_json(folder / name))}
    code = [f"{module}.py" for module in with_imports(modules, folder) if f"{module}.py" in found]
    return sorted([*known, *code]), [name for name in found if name not in (*known, *code)]


def leaves(folder: Path, name: str) -> str:
    """Return why a file must not be read: it is a link out of the folder. Return "" if it may be read."""
    path = folder / name
    if not path.is_symlink() or path.resolve().is_relative_to(folder.resolve()):
        return ""
    return f"is a link that leaves the folder, to {path.resolve()}. Copy the file here if it belongs to the checkpoint."


def with_imports(modules: Iterable[str], folder: Path) -> set[str]:
    """Return the modules and everything in the folder that they import by relative imports."""
    found, open_ = set[str](), [module for module in modules if re.fullmatch(r"\w+", module)]
    while open_:
        module = open_.pop()
        path = folder / f"{module}.py"
        if module not in found and path.is_file() and not leaves(folder, path.name):
            found.add(module)
            open_ += imports_of(path.read_bytes())
    return found


def imports_of(code: bytes) -> list[str]:
    """Return the modules that code imports relatively: x in `from .x import y`.

    A regular expression finds them, as in transformers: ast.parse sometimes fails in threads of Python 3.11.
    """
    return [name.decode() for name in re.findall(rb"^\s*from\s+\.(\w+)\s+import\b", code, re.MULTILINE)]


def _read(folder: Path, name: str) -> tuple[CheckpointFile, bytes | None, list[str]]:
    """Return (the file's description, its content if its suffix is in PARSED, the kinds of keys in it)."""
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
                broken = [key for key in file.keys() if not is_finite(file.get_tensor(key))]  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            yield f"{name} cannot be read ({error}): it is truncated. Save the checkpoint again."
            continue
        yield from (f"{name}: {key} holds NaN or infinite numbers." for key in broken)


def is_finite(part: Tensor) -> bool:
    """Return whether all numbers are finite; torch cannot tell it of a float8 tensor."""
    return bool((part.float() if part.is_floating_point() and part.itemsize == 1 else part).isfinite().all())


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
        yield f"{name} is not valid JSON: {error}."
        return
    if name == "results.json" and public(held) != held:
        yield f"{name} names folders or users of a machine: stage() or `hf-skiprnn publish` leaves them out."
    shards = held.get("weight_map") if isinstance(held, dict) and name.endswith(".safetensors.index.json") else None
    if isinstance(shards, dict):
        yield from (f"{name} names {part}, which is not in the folder." for part in sorted({*shards.values()} - names))
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
    """Yield (key, "module.Class") for every class that a JSON file names in its auto_map."""
    if not isinstance(content, dict):
        return
    auto_map, pipelines = content.get("auto_map") or {}, content.get("custom_pipelines") or {}
    for auto, references in auto_map.items() if isinstance(auto_map, dict) else ():
        parts = [references] if isinstance(references, str) else references
        yield from ((auto, part) for part in parts if isinstance(part, str) and part)
    for task, pipeline in pipelines.items() if isinstance(pipelines, dict) else ():
        yield f'pipeline("{task}")', str(pipeline.get("impl")) if isinstance(pipeline, dict) else ""


def _json(path: Path) -> Any:
    """Return a file's JSON; None if it is not valid, which read_checkpoint reports as a problem."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def stage(
    folder: str | Path, repo_id: str, into: str | Path, *, code: bool = True, license_id: str | None = None
) -> Path:
    """Put a checkpoint's files into a new folder; if it has a results.json, render a card for `repo_id`.

    Local paths and user names are removed from results.json. Large files become hard links if the disk allows it.

    Args:
        folder: the checkpoint; it is not changed.
        repo_id: Hub id that the card's example loads.
        into: the folder to create.
        code: add the modules that config.json names; if the folder has none, this package's modules.
        license_id: see render_card.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: a file is a link that leaves the folder.
        KeyError: results.json lacks a fact that every card needs.
    """
    from .card import RESULTS, render_card  # imports the tasks, which need datasets, an extra

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
    """Copy a file; make a hard link to weights if possible, because they are large and never written to."""
    if source.suffix in (".safetensors", ".onnx"):
        with contextlib.suppress(OSError):  # another disk, or a file system without hard links
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def add_code(folder: Path) -> None:
    """Copy into the folder the modules of this package that its JSON files name, and the modules that those import.

    A folder that already holds code is not changed.
    """
    if any(folder.glob("*.py")):
        return
    contents = [_json(path) for path in folder.glob("*.json")]
    modules = {reference.split(".")[0] for content in contents for _, reference in code_references(content)}
    for module in with_imports(modules, MODEL_CODE):
        shutil.copyfile(MODEL_CODE / f"{module}.py", folder / f"{module}.py")
