"""Whose code a pipeline runs: of checkpoint folders with and without code, of somebody else, of the Hub."""

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server.process import HubClient
from paths import ROOT
from small_checkpoints import small_checkpoint
from transformers import pipeline

from hf_skiprnn import SkipRNNConfig
from hf_skiprnn.hub.upload import publish

# The client's upload of a large file passes it to httpx2 by a name that httpx2 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RNG = np.random.default_rng(2)
TRUSTED: dict[str, Any] = {"trust_remote_code": True, "device": "cpu"}


WITHOUT_CODE: dict[str, tuple[str, Any]] = {
    "image": ("image-classification", np.full((28, 28), 99, np.uint8)),
    "text": ("text-classification", "a good film ."),
    "audio": ("audio-classification", np.linspace(-1, 1, 30)),
    "series": ("sequence-classification", np.linspace(-1, 1, 12).tolist()),
    "regression": ("sequence-classification", np.ones((12, 2)).tolist()),
}


@pytest.mark.parametrize("consent", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
@pytest.mark.parametrize("kind", WITHOUT_CODE)
def test_the_installed_code_serves_a_folder_without_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, consent: dict[str, bool]
) -> None:
    """Nobody is asked for consent, also where transformers would go on without an answer."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", questions.append)
    folder = small_checkpoint(tmp_path / kind, kind)
    for path in folder.glob("*.py"):
        path.unlink()
    task, given = WITHOUT_CODE[kind]
    pipe = pipeline(task, model=str(folder), return_updates=True, device="cpu", **consent)
    assert type(pipe).__module__ == "hf_skiprnn.model.pipeline_skip_rnn"
    assert pipe(given)[0]["steps"] > 0
    assert questions == []
    if kind == "text" and consent.get("trust_remote_code", True):  # it has one task, which need not be named
        assert pipeline(model=str(folder), device="cpu", **consent).task == task
    pipe.save_pretrained(tmp_path / "again")  # with code, for those who have no package
    assert (tmp_path / "again" / "pipeline_skip_rnn.py").is_file()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"][task]["impl"]


def test_a_shipped_folder_in_a_new_process() -> None:
    code = """
from transformers import pipeline
import hf_skiprnn
for consent in {}, {"trust_remote_code": False}, {"trust_remote_code": True}:
    pipe = pipeline("image-classification", model="model_cards/skip-lstm-digits", device="cpu", **consent)
    print(type(pipe).__name__)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["SkipRNNImageClassificationPipeline"] * 3, done.stderr


def test_a_pipeline_of_somebody_else_needs_consent(tmp_path: Path) -> None:
    """Code that is not the package's is never run unasked, also under the name of a task that the package has."""
    folder = small_checkpoint(tmp_path / "image", "image")
    config = json.loads((folder / "config.json").read_text())
    config["custom_pipelines"]["image-classification"]["impl"] = "evil.Pipeline"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('evil ran')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("image-classification", model=str(folder), device="cpu")
    with pytest.raises(SystemExit, match="evil ran"):
        pipeline("image-classification", model=str(folder), **TRUSTED)


def test_a_config_keeps_the_names_of_its_pipelines(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "text", "text")
    config = SkipRNNConfig.from_pretrained(tmp_path / "text")
    config.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("text", "again"))
    assert first["custom_pipelines"] == again["custom_pipelines"]
    assert list(config.custom_pipelines) == ["text-classification"]
    assert config == SkipRNNConfig.from_pretrained(tmp_path / "again")


def test_from_the_hub(hub: HubClient, tmp_path: Path) -> None:
    publish(small_checkpoint(tmp_path / "audio", "audio"), "alice/sounds", version="v1")
    pipe = pipeline("audio-classification", model="alice/sounds", revision="v1", return_updates=True, **TRUSTED)
    sounds = [RNG.normal(size=n).astype(np.float32) for n in (40, 25)]
    assert [row[0]["steps"] for row in pipe(sounds, batch_size=2)] == [40, 25]
    hub.lose_server()
    hub.offline()
    again = pipeline("audio-classification", model="alice/sounds", revision="v1", return_updates=True, **TRUSTED)
    assert again(sounds) == pipe(sounds)


HUB_INPUTS: dict[str, tuple[str, list[Any]]] = {
    "text": ("text-classification", ["a good film .", "bad"]),
    "series": ("sequence-classification", [np.ones((9, 1)), np.zeros((5, 1))]),
}


@pytest.mark.parametrize("kind", HUB_INPUTS)
def test_from_the_hub_as_from_a_folder(hub: HubClient, tmp_path: Path, kind: str) -> None:
    task, inputs = HUB_INPUTS[kind]
    folder = small_checkpoint(tmp_path / kind, kind)
    publish(folder, f"alice/{kind}", version="v1")
    results = [
        pipeline(task, model=name, return_updates=True, **extra, **TRUSTED)(inputs, batch_size=2)
        for name, extra in ((f"alice/{kind}", {"revision": "v1"}), (str(folder), {}))
    ]
    assert len(results[0]) == 2
    assert results[0] == results[1]
