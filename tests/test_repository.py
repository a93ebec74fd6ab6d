"""Check the printed tree, the code blocks in documents, the import, the wheel, and the pinned versions."""

import fnmatch
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

import hf_skiprnn

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Every file in these folders stands in the tree.
OPEN_FOLDERS = ("hf_skiprnn", "scripts")
NATIVE_SOURCES = (".cpp", ".h")  # not in a wheel, which holds the libraries built from them


def run_python(code: str, folder: Path, **environment: str) -> None:
    """Run code in a new process in `folder`, with this checkout; if it fails, fail with its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def tracked() -> list[PurePosixPath]:
    """The tracked files that exist, relative to the root."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [PurePosixPath(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def read_tree(text: str) -> dict[PurePosixPath, list[str]]:
    """Return what each folder lists in the fenced block below "## The tree"; the root is "."."""
    block = re.search(r"^## The tree\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, 'there must be a fenced block below the heading "## The tree"'
    listed: dict[PurePosixPath, list[str]] = {}
    parents = [(-1, PurePosixPath())]  # (indentation, folder) from the root down to the folder that is being listed
    for line in block[1].splitlines():
        if not line.strip() or line.strip().startswith("# "):  # a line that is only a comment
            continue
        indent = len(line) - len(line.lstrip(" │├└─"))
        names = re.split(r"\s{2,}|\s#", line[indent:].rstrip())[0].split(", ")
        while parents[-1][0] >= indent:
            parents.pop()
        folder = parents[-1][1]
        listed.setdefault(folder, []).extend(names)
        if names[-1].endswith("/"):
            parents.append((indent, folder / names[-1]))
    return listed


def contents(folder: PurePosixPath, files: list[PurePosixPath]) -> set[str]:
    """Return the names of the tracked files directly in `folder` and, with a slash, of its folders."""
    inside = [path.relative_to(folder) for path in files if path.is_relative_to(folder)]
    return {path.parts[0] + ("/" if len(path.parts) > 1 else "") for path in inside}


def disagreements(listed: dict[PurePosixPath, list[str]], files: list[PurePosixPath]) -> list[str]:
    """Return the errors of a tree. A folder that lists anything must list everything; *.yaml stands for its files."""
    found = []
    for folder, names in listed.items():
        on_disk = contents(folder, files)
        patterns = [name for name in names if "*" in name and not name.endswith(".py")]
        covered = {name for name in on_disk if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
        found += [f"missing in the tree: {folder / name}" for name in sorted(on_disk - covered - set(names))]
        found += [f"not on disk: {folder / name}" for name in names if name not in on_disk and name not in patterns]
        found += [f"matches nothing: {folder / name}" for name in patterns if not fnmatch.filter(on_disk, name)]
    return found


def test_the_printed_tree_is_the_tree_on_disk(tracked: list[PurePosixPath]) -> None:
    (text,) = [text for path in DOCUMENTS if "\n## The tree\n" in (text := path.read_text(encoding="utf-8"))]
    listed = read_tree(text)
    opened = {path.parent for path in tracked if path.parts[0] in OPEN_FOLDERS}
    found = disagreements(listed, tracked) + [f"lists nothing: {folder}/" for folder in sorted(opened - set(listed))]
    assert not found, "\n".join(found)


def test_a_wrong_tree_is_noticed() -> None:
    block = "b/   what\n    # a, comment\n├── c.py, d.py  # what\n└── e/\n    └── *.yaml\na.md\n"
    text = f"# x\n## The tree\n\n```\n{block}```\n"
    files = [PurePosixPath(name) for name in ("a.md", "b/c.py", "b/d.py", "b/e/1.yaml", "b/e/2.yaml")]
    assert disagreements(read_tree(text), files) == []
    assert disagreements(read_tree(text), files[1:]) == ["not on disk: a.md"]
    assert disagreements(read_tree(text), files[:3]) == ["not on disk: b/e", "matches nothing: b/e/*.yaml"]
    new = PurePosixPath("b/new.py")
    assert disagreements(read_tree(text), [*files, new]) == ["missing in the tree: b/new.py"]


# Blocks network access in this process. Child processes do not inherit it; environment variables keep them offline.
OFFLINE = """\
import sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        raise PermissionError(f"no network here: {event} {arguments}")

sys.addaudithook(refuse)
"""


RUN_BLOCKS = """
import os, pathlib, runpy

for path in sorted(pathlib.Path.cwd().glob("*.py")):
    folder = path.with_suffix("")
    folder.mkdir()
    os.chdir(folder)
    runpy.run_path(str(path), run_name="__main__")
"""


def python_blocks(text: str) -> dict[int, str]:
    """Return the code of every ```python block of a document, by the line of its fence."""
    found = re.finditer(r"^```python\b.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {text[: block.start()].count("\n") + 1: block[1] for block in found}


WITH_CODE = [path for path in DOCUMENTS if python_blocks(path.read_text(encoding="utf-8"))]


def test_the_readme_shows_code() -> None:
    assert ROOT / "README.md" in WITH_CODE


@pytest.mark.parametrize("document", WITH_CODE, ids=lambda path: path.name)
def test_code_in_the_documents_runs(document: Path, tmp_path: Path) -> None:
    """Each block runs in an empty folder. One process runs all blocks of a document, as an import takes seconds."""
    for line, code in python_blocks(document.read_text(encoding="utf-8")).items():
        block = tmp_path / f"{document.stem}-{line:04}.py"
        block.write_text("\n" * line + code, encoding="utf-8")  # an error names the line of the document
    run_python(OFFLINE + RUN_BLOCKS, tmp_path)


def test_network_is_refused_to_the_documents(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no network here"):
        run_python(f"{OFFLINE}\nimport socket\nsocket.create_connection(('127.0.0.1', 9))", tmp_path)


# Hides these packages as if they were not installed, and records which of them hf_skiprnn tries to import.
LIGHT = """\
import builtins, importlib.machinery, sys

HIDDEN = {"triton", "datasets", "accelerate", "sklearn", "matplotlib"}
asked = []

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

def noting_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and name.partition(".")[0] in HIDDEN and importer.partition(".")[0] == "hf_skiprnn":
        asked.append((importer, name))
    return real_import(name, globals, locals, fromlist, level)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
real_import, builtins.__import__ = builtins.__import__, noting_import
"""

RUN = """
import torch
import hf_skiprnn

assert not asked, asked
model = hf_skiprnn.SkipRNNForSequenceClassification(hf_skiprnn.SkipRNNConfig(hidden_size=8, num_labels=10))
assert model(input_values=torch.zeros(2, 5, 1)).logits.shape == (2, 10)
"""


def test_import_and_run_without_the_extras_and_without_a_compiler(tmp_path: Path) -> None:
    run_python(LIGHT + RUN, tmp_path, PATH=str(tmp_path), CC="/bin/false", CXX="/bin/false")


def test_hidden_packages_are_hidden(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'datasets'"):
        run_python(LIGHT + "import datasets", tmp_path)


def undocumented(name: str, value: object) -> list[str]:
    """List the public name, and the public methods of a class of this package, if they have no docstring."""
    doc = (value.__doc__ or "").strip()
    generated = doc.startswith(f"{name}(")  # a dataclass or named tuple without a docstring gets its signature
    missing = [] if doc and not generated else [name]
    if inspect.isclass(value) and value.__module__.startswith("hf_skiprnn"):
        kinds = (FunctionType, classmethod, staticmethod, property)
        own = [key for key, member in vars(value).items() if isinstance(member, kinds) and not key.startswith("_")]
        missing += [f"{name}.{key}" for key in own if not inspect.getdoc(getattr(value, key))]
    return missing


def test_public_names_have_docstrings() -> None:
    assert {"SkipRNNConfig", "SkipRNNForSequenceClassification", "SkipLSTM", "SkipGRU"} <= set(hf_skiprnn.__all__)
    assert not [gap for name in hf_skiprnn.__all__ for gap in undocumented(name, getattr(hf_skiprnn, name))]


def test_a_missing_docstring_is_noticed() -> None:
    class Bare(NamedTuple):
        x: int

        def method(self) -> None: ...

    Bare.__module__ = "hf_skiprnn.bare"
    assert undocumented("Bare", Bare) == ["Bare", "Bare.method"]


LISTING = """\
from setuptools.dist import Distribution

distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
build = distribution.get_command_obj("build_py")
build.build_lib = "wheel"
build.ensure_finalized()
print(*build.get_outputs(include_bytecode=False), sep="\\n")
"""


def test_the_wheel_holds_every_file_of_the_package(tracked: list[PurePosixPath]) -> None:
    """setuptools lists the files that it would copy; nothing is built."""
    done = subprocess.run([sys.executable, "-c", LISTING], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = {PurePosixPath(line).relative_to("wheel") for line in done.stdout.splitlines()}
    package = {path for path in tracked if path.parts[0] == "hf_skiprnn" and path.suffix not in NATIVE_SOURCES}
    assert PurePosixPath("hf_skiprnn/py.typed") in wheel
    assert package <= wheel, f"add to package-data in pyproject.toml: {sorted(package - wheel)}"


def test_every_requirement_is_pinned_at_a_version_that_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line[0] != "#")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        if requirement.name == "triton":  # a CUDA build of torch asks for one version of it, a CPU build for none
            continue
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt does not pin {text}"
        assert requirement.specifier.contains(pinned), f"{text}: constraints.txt pins {pinned}"


def test_the_version_is_the_same_everywhere() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:1]
    versions += re.findall(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert versions == [hf_skiprnn.__version__] * 2


def test_no_tracked_file_names_a_machine(tracked: list[PurePosixPath]) -> None:
    paths = [f"/{folder}".encode() for folder in ("work/", "opt/wheels", "farm/")]
    assert not [file for file in tracked if any(path in (ROOT / file).read_bytes() for path in paths)]


def test_no_file_is_called_utils(tracked: list[PurePosixPath]) -> None:
    assert not [file for file in tracked if file.name == "utils.py"]


def test_memory_that_nobody_wrote_is_nan_in_tests() -> None:
    x = torch.zeros(2, 3)
    fresh = [torch.empty(2, 3), torch.empty_like(x), torch.empty_strided((2, 3), (3, 1)), x.new_empty(2, 3)]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert torch.empty(3, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
