"""Build the package, install the wheel into an environment of its own, and use it from an empty folder.

`make test-wheel` runs this file; pytest does not collect it by itself, because the installation takes minutes. The
commands are those of docs/own_data.md. The new environment holds the wheel's extras train and figures, and no checkout.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checkout import tracked_files
from hub_server.process import HubClient
from paths import ROOT
from PIL import Image

# The tests' own settings stay here: the new environment must not find the checkout.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
SHORT = ["--max_steps", "30", "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
LIBRARIES = ["avx2", "avx512", "portable"] if IS_X86 else ["portable"]


class Built(NamedTuple):
    """What `python -m build` makes: the source distribution, and a wheel that is built from it."""

    sdist: Path
    wheel: Path


class Installed(NamedTuple):
    """The new environment."""

    scripts: Path  # folder of its commands

    def run(self, folder: Path, *command: str, status: int = 0, **environment: str) -> str:
        """Run one of its commands in a folder; check the exit status and return what it printed."""
        done = subprocess.run(
            [str(self.scripts / command[0]), *command[1:]],
            check=False,
            cwd=folder,
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, f"{' '.join(command)}: status {done.returncode}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build in a copy of the tracked files, so that nothing an earlier build left takes part."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked_files():
        if path.parts[0] not in ("tests", "model_cards"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, source / path)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source))
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built) -> Iterator[Installed]:
    """Install the wheel beside the versions that the project is tested with."""
    with tempfile.TemporaryDirectory(prefix="hf_skiprnn-wheel-") as folder:
        call(sys.executable, "-m", "venv", folder)
        scripts = Path(folder, "Scripts" if os.name == "nt" else "bin")
        # This very torch: where its version is open, pip may take a build for GPUs of several gigabytes.
        torch = f"torch=={importlib.metadata.version('torch')}"
        pip = [
            str(scripts / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            str(ROOT / "constraints.txt"),
        ]
        call(*pip, torch, f"{built.wheel}[train,figures]")
        yield Installed(scripts)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder; it begins empty."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def reviews(installed: Installed, empty: Path) -> Path:
    """A checkpoint that is trained on texts in a CSV file."""
    (empty / "reviews").mkdir()
    lines = [f'"a {word} film, number {i}",{label}' for i in range(40) for word, label in WORDS]
    (empty / "reviews" / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return train_as_documented(installed, empty, "reviews")


WORDS = (("fine", "good"), ("dull", "bad"))


def call(*command: str) -> None:
    """Run a command; if it fails, fail with its output."""
    done = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def train_as_documented(installed: Installed, folder: Path, data: str) -> Path:
    """Run the command that docs/own_data.md gives for a folder `data`, for a few steps; return the checkpoint."""
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"^    (hf-skiprnn train --dataset_name {data} .*)$", page, re.MULTILINE)
    said = installed.run(folder, *command.split(), *SHORT)
    assert "Traceback" not in said
    checkpoint = folder / "runs" / data
    assert f"hf-skiprnn evaluate runs/{data}" in said, said  # one of the next commands
    assert {"model.safetensors", "results.json", "steps-read-test.png"} <= {path.name for path in checkpoint.iterdir()}
    return checkpoint


def test_the_source_distribution_holds_what_a_build_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    package = {str(path) for path in tracked_files() if path.parts[0] in ("hf_skiprnn", "hf_skiprnn_cli.py")}
    assert package | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_holds_the_engine_and_the_package_alone(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
    libraries = [name for name in names if name.startswith("hf_skiprnn/kernels/cpu/_cpu_")]
    assert sorted(re.sub(r".*_cpu_|\..*", "", name) for name in libraries) == LIBRARIES
    assert len([name for name in names if name.endswith(".yaml")]) > 20  # recipes
    assert "-cp311-abi3-" in built.wheel.name
    metadata = {"hf_skiprnn_cli.py", "hf_skiprnn"}
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == metadata
    assert not [name for name in names if name.endswith((".h", ".cpp"))]


def test_the_engine_is_used(installed: Installed, empty: Path) -> None:
    said = installed.run(empty, "python", str(ROOT / "tests" / "wheel" / "engine.py"))
    assert "'cpu'" in said


def test_help(installed: Installed, empty: Path) -> None:
    assert "--dataset_name my_folder" in installed.run(empty, "hf-skiprnn", "train", "--help")
    assert "--target_update_rate" in installed.run(empty, "hf-skiprnn", "train", "--task", "digits", "--help")
    assert "digits-skip-lstm" in installed.run(empty, "python", "-m", "hf_skiprnn", "recipes")


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("train --task digit", "Did you mean 'digits'?"),
        ("train --task digits --hiden_size=3", "Did you mean 'hidden_size'?"),
        ("train --dataset_name ./nothing", "no data folder ./nothing"),
        ("evaluate ./nothing", "no checkpoint folder ./nothing"),
        ("export ./nothing out.onnx", "no checkpoint folder ./nothing"),
        ("publish ./nothing alice/x", "no checkpoint folder ./nothing"),
    ],
)
def test_wrong_input_is_answered_at_once(installed: Installed, empty: Path, command: str, answer: str) -> None:
    begin = time.monotonic()
    said = installed.run(empty, "hf-skiprnn", *command.split(), status=2)
    assert time.monotonic() - begin < 2
    assert answer in said
    assert "Traceback" not in said


def test_a_missing_extra_is_named(installed: Installed, empty: Path, reviews: Path) -> None:
    said = installed.run(empty, "hf-skiprnn", "export", "runs/reviews", "out.onnx", status=2)
    assert 'pip install "hf_skiprnn[export]"' in said


def test_texts_are_trained_and_evaluated(installed: Installed, empty: Path, reviews: Path) -> None:
    said = installed.run(empty, "hf-skiprnn", "evaluate", "runs/reviews")
    assert "accuracy" in said
    results = json.loads((reviews / "results.json").read_text())
    assert results["metrics"]["test"]["update_rate"] > 0


def test_series(installed: Installed, empty: Path) -> None:
    (empty / "walks").mkdir()
    generator = np.random.default_rng(0)
    with (empty / "walks" / "train.jsonl").open("w") as file:
        for i in range(60):
            signal = generator.normal(3 * (i % 2), 1, (20 + i % 9, 2)).round(2).tolist()
            file.write(json.dumps({"signal": signal, "label": ("sitting", "walking")[i % 2]}) + "\n")
    train_as_documented(installed, empty, "walks")
    installed.run(empty, "hf-skiprnn", "evaluate", "runs/walks")


def test_pictures(installed: Installed, empty: Path) -> None:
    generator = np.random.default_rng(0)
    for label, shade in (("cat", 60), ("dog", 200)):
        (empty / "pictures" / label).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(shade - 40, shade + 40, (6, 8), np.uint8)
            Image.fromarray(pixels).save(empty / "pictures" / label / f"{i}.png")
    train_as_documented(installed, empty, "pictures")
    installed.run(empty, "hf-skiprnn", "evaluate", "runs/pictures")


def test_the_lines_of_python_for_own_data(installed: Installed, empty: Path) -> None:
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        installed.run(empty, "python", "-c", block)


def test_published_and_loaded(installed: Installed, empty: Path, reviews: Path, hub: HubClient) -> None:
    there = {name: value for name, value in hub.environment().items() if name.startswith("HF_")}
    there |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": os.environ["HF_TOKEN"], "NO_PROXY": "127.0.0.1,localhost"}
    publish = ["hf-skiprnn", "publish", "runs/reviews", "alice/reviews", "--license", "mit"]
    assert "dry run: nothing was sent" in installed.run(empty, *publish, "--dry-run", **there)
    installed.run(empty, *publish, **there)
    state = hub.repo("alice/reviews")
    assert list(state["tags"]) == ["v1.0"]
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(state["files"])
    code = "import hf_skiprnn, transformers; p = transformers.pipeline('text-classification', 'alice/reviews'); "
    said = installed.run(empty, "python", "-c", code + "print(p('a dull film', return_updates=True))", **there)
    assert "'steps': 3" in said
