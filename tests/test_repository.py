"""Check light imports, docstrings of public names, the wheel, the pinned versions, and the version."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
from checkout import run_python, tracked_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

import hf_skiprnn

NATIVE_SOURCES = (".cpp", ".h")  # not in a wheel, which holds the libraries built from them


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


def test_the_wheel_holds_every_file_of_the_package() -> None:
    """setuptools lists the files that it would copy; nothing is built."""
    done = subprocess.run([sys.executable, "-c", LISTING], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = {PurePosixPath(line).relative_to("wheel") for line in done.stdout.splitlines()}
    package = {path for path in tracked_files() if path.parts[0] == "hf_skiprnn" and path.suffix not in NATIVE_SOURCES}
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


def test_no_tracked_file_names_a_machine() -> None:
    paths = [f"/{folder}".encode() for folder in ("work/", "opt/wheels", "farm/")]
    assert not [file for file in tracked_files() if any(path in (ROOT / file).read_bytes() for path in paths)]


def test_no_file_is_called_utils() -> None:
    assert not [file for file in tracked_files() if file.name == "utils.py"]


def test_memory_that_nobody_wrote_is_nan_in_tests() -> None:
    x = torch.zeros(2, 3)
    fresh = [torch.empty(2, 3), torch.empty_like(x), torch.empty_strided((2, 3), (3, 1)), x.new_empty(2, 3)]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert torch.empty(3, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
