"""The GitHub Actions workflows: what they run exists, and cibuildwheel makes the wheels that are meant.

The workflows cannot run here. So their files are read, and cibuildwheel lists what it would build.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PLATFORMS = {  # archs in wheels.yml -> cibuildwheel's platform, and the one wheel for it
    "x86_64": ("linux", "cp311-manylinux_x86_64"),
    "aarch64": ("linux", "cp311-manylinux_aarch64"),
    "arm64": ("macos", "cp311-macosx_arm64"),
    "AMD64": ("windows", "cp311-win_amd64"),
}


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_sound(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]  # "on", which YAML 1.1 reads as a truth value
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert "latest" not in job["runs-on"]
        assert set(job.get("needs", [])) <= set(workflow["jobs"])
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@v\d+(\.\d+)*", step["uses"]), f"pin a version: {step['uses']}"


def test_the_tests_are_those_of_ci() -> None:
    (path,) = (path for path in WORKFLOWS if path.stem == "tests")
    assert [step["run"] for step in steps(path) if "run" in step] == [".ci/run"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = re.findall(r"^ *targets=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert len(called) == 2  # with Chromium and without
    for names in called:
        assert set(names.split()) <= targets


def test_only_a_tag_is_published_and_without_a_password() -> None:
    (path,) = (path for path in WORKFLOWS if path.stem == "wheels")
    found = jobs(path)
    assert found["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert found["publish"]["needs"] == [name for name in found if name != "publish"]
    assert [name for name, job in found.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert "secrets." not in path.read_text()


def test_cibuildwheel_makes_one_wheel_for_each_platform() -> None:
    (path,) = (path for path in WORKFLOWS if path.stem == "wheels")
    archs = [row["archs"] for row in jobs(path)["wheels"]["strategy"]["matrix"]["include"]]
    assert archs == list(PLATFORMS)
    for arch, (platform, wheel) in PLATFORMS.items():
        command = ["--print-build-identifiers", "--platform", platform, "--archs", arch, str(ROOT)]
        done = subprocess.run(
            [sys.executable, "-m", "cibuildwheel", *command], check=False, capture_output=True, text=True
        )
        assert done.stdout.split() == [wheel], done.stderr


def test_each_wheel_is_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    script = settings["test-command"].removeprefix("python {project}/")
    assert (ROOT / script).is_file()
