"""A checkpoint folder: which of its files belong to it, and whether they would work where nothing else is."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from .card_checks import card_problems

# Left behind by training and tools; a pickle (training_args.bin) names folders of the machine, and the Hub warns of it.
MODEL_CODE = Path(__file__).parents[1] / "model"
LEFT_OUT = re.compile(
    r"(^|/)(checkpoint-\d+|runs|__pycache__|\.git|\.cache)(/|$)|(^|/)[_.]|\.tmp$|\.pyc$"
    r"|^(training_args|optimizer|scaler)\.(bin|pt)$|^(scheduler|rng_state.*)\.pt[h]?$|^complete$|^training_window\.json$|^run\.json$"
)
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass(frozen=True)
class CheckpointFile:
    """A file as it will be in the repository: its path there, bytes, and SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


def checkpoint_files(folder: str | Path) -> list[CheckpointFile]:
    """What of a folder belongs to the checkpoint, in order of path; a training run's leftovers do not.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder. A checkpoint is what save_pretrained wrote.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [(path, path.relative_to(folder).as_posix()) for path in paths]
    return [
        CheckpointFile(name, path.stat().st_size, sha256_of(path)) for path, name in named if not LEFT_OUT.search(name)
    ]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_problems(folder: str | Path) -> list[str]:
    """Sentences about what would be refused, or would not load, on the Hub; empty if nothing is wrong."""
    folder = Path(folder)
    files = {file.path for file in checkpoint_files(folder)}
    problems = [f"{name} is missing." for name in ("config.json", "README.md") if name not in files]
    if not any(name.endswith(".safetensors") for name in files):
        problems.append("There are no weights: no file ends in .safetensors.")
    problems += _weight_problems(folder, files)
    for name in sorted(files):
        if name.endswith(".json"):
            problems += _json_problems(folder, name, files)
        if name.endswith(".py"):
            absent = [f"{module}.py" for module in get_relative_imports(folder / name) if f"{module}.py" not in files]
            problems += [f"{name} imports {module}, which is not in the folder." for module in absent]
        if TOKEN.search((folder / name).read_bytes()):
            problems.append(f"{name} holds what looks like an access token. Take it out, and revoke it.")
    if "README.md" in files:
        problems += card_problems((folder / "README.md").read_text(encoding="utf-8"), folder)
    return problems


def _weight_problems(folder: Path, files: set[str]) -> Iterator[str]:
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(folder / name, "pt") as weights:
                broken = [key for key in weights.keys() if not weights.get_tensor(key).isfinite().all()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            yield f"{name} cannot be read ({error}): it was cut off. Save the checkpoint again."
            continue
        yield from (f"{name}: {key} holds NaN or infinite numbers." for key in broken)


def _json_problems(folder: Path, name: str, files: set[str]) -> Iterator[str]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"{name} is no JSON: {error}."
        return
    for kind, reference in _code_references(content):
        if "--" in reference:
            yield f"{name}: {kind} names code in another repository ({reference}). Save the checkpoint again."
        elif f"{reference.split('.')[0]}.py" not in files:
            yield f"{name}: {kind} names {reference}, but {reference.split('.')[0]}.py is not in the folder."
    if name == "config.json" and not content.get("auto_map"):
        yield (
            "config.json names no code (auto_map), so the checkpoint loads only where hf_skiprnn is installed. "
            "Save it again with save_pretrained."
        )


def _code_references(content: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(content, dict):
        return
    for auto, references in (content.get("auto_map") or {}).items():
        yield from ((auto, part) for part in ([references] if isinstance(references, str) else references) if part)
    for task, pipeline in (content.get("custom_pipelines") or {}).items():
        yield f'pipeline("{task}")', pipeline["impl"]


def stage(folder: str | Path, repo_id: str, into: str | Path, *, code: bool = True) -> Path:
    """Copy a checkpoint's files to a new folder `into`, with a card for `repo_id` where there is a results.json.

    results.json loses the folders of the machine that it was written on. `code`: with the code that config.json names,
    this package's where the folder has none; without, for a folder in this repository.

    Raises:
        NotADirectoryError: see checkpoint_files; errors of model_card.render_card.
    """
    from .card import RESULTS, public, render_card  # the tasks' pages need datasets, an extra

    folder, into = Path(folder), Path(into)
    for file in checkpoint_files(folder):
        if file.path.endswith(".py") and not code:
            continue
        (into / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file.path, into / file.path)
    if code:
        add_code(into)
    if (folder / RESULTS).is_file():
        results = public(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
        (into / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (into / "README.md").write_text(render_card(folder, repo_id), encoding="utf-8")
    return into


def add_code(folder: Path) -> None:
    """Put the modules of this package that the folder's JSON files name, and what those import, beside them.

    A folder with code of its own stays as it is.
    """
    if any(folder.glob("*.py")):
        return
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    modules = {reference.split(".")[0] for content in contents for _, reference in _code_references(content)}
    known = [path for module in modules if (path := MODEL_CODE / f"{module}.py").is_file()]
    for path in {*known, *(Path(name) for module in known for name in get_relative_import_files(module))}:
        shutil.copyfile(path, folder / path.name)
