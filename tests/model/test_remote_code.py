"""A checkpoint where this package is not installed: the same numbers from the code that travels with it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server.process import HubClient, HubServer
from small_checkpoints import KINDS, small_checkpoint, small_model, small_tokenizer
from transformers import pipeline

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNFeatureExtractor,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    SkipRNNImageProcessor,
    SkipRNNModel,
)
from hf_skiprnn.hub.folder import checkpoint_problems
from hf_skiprnn.hub.upload import publish

# The client's upload of a large file passes it to httpx2 by a name that httpx2 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HEADS = {
    "image": ("AutoModelForImageClassification", SkipRNNForSequenceClassification),
    "text": ("AutoModelForSequenceClassification", SkipRNNForSequenceClassification),
    "audio": ("AutoModelForAudioClassification", SkipRNNForSequenceClassification),
    "series": ("AutoModel", SkipRNNModel),
    "regression": ("AutoModelForSequenceClassification", SkipRNNForSequenceClassification),
    "frames": ("AutoModelForTokenClassification", SkipRNNForFrameClassification),
}
TASKS = {
    "image": "image-classification",
    "text": None,  # the only one that the checkpoint can do, so it need not be named
    "audio": "audio-classification",
    "series": "sequence-classification",
    "regression": "sequence-classification",
}
RNG = np.random.default_rng(5)
RAW: dict[str, list[Any]] = {
    "image": list(RNG.integers(0, 256, (3, 28, 28), np.uint8)),
    "text": ["a good film .", "bad", "a film"],
    "audio": [RNG.normal(size=n).astype(np.float32) for n in (30, 41, 17)],
    "series": [RNG.normal(size=(n, 1)).astype(np.float32) for n in (12, 25, 7)],
    "regression": [RNG.normal(size=(n, 2)).astype(np.float32) for n in (12, 25, 7)],
}
HUB_REPO = "alice/remote-code"


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if kind == "image":
        return {"pixel_values": torch.rand(2, 1, 28, 28, generator=generator)}
    if kind == "text":
        return {"input_ids": torch.randint(1, 7, (2, 30), generator=generator)}
    width = {"regression": 2, "frames": 3}.get(kind, 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    return {"input_values": torch.randn(2, 40, width, generator=generator), "attention_mask": mask}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: small_checkpoint(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def elsewhere(
    hub_server: HubServer, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process without the package makes of them."""
    work = tmp_path_factory.mktemp("elsewhere")
    jobs: dict[str, tuple[str, tuple, dict]] = {}
    for kind, folder in folders.items():
        jobs[f"model {kind}"] = ("model", (HEADS[kind][0], str(folder), inputs_of(kind)), {})
        if kind in TASKS:
            jobs[f"pipeline {kind}"] = ("pipeline", (TASKS[kind], str(folder), RAW[kind]), {})
    for kind, auto, arguments in (
        ("image", "AutoImageProcessor", {}),
        ("text", "AutoTokenizer", {"padding": True}),
        ("audio", "AutoFeatureExtractor", {"sampling_rate": 8000}),
    ):
        jobs[f"processor {kind}"] = ("processor", (auto, str(folders[kind]), RAW[kind], arguments), {})
    jobs["hub model"] = ("model", (HEADS["image"][0], HUB_REPO, inputs_of("image")), {"revision": "v1"})
    jobs["hub pipeline"] = ("pipeline", (TASKS["image"], HUB_REPO, RAW["image"]), {"revision": "v1"})
    torch.save(jobs, work / "jobs.pt")
    with pytest.MonkeyPatch.context() as patch:
        hub = HubClient(hub_server, work / "hf_home", patch)
        publish(folders["image"], HUB_REPO, version="v1")
        (work / "code").mkdir()
        publish(small_checkpoint(work / "code" / "skip-lstm", seed=1), HUB_REPO)  # main moves on; v1 stays
        command = [sys.executable, str(Path(__file__).with_name("without_package.py")), "jobs.pt", "out.pt"]
        done = subprocess.run(command, cwd=work, env=hub.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(work / "out.pt", weights_only=False)


def here(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    model = HEADS[kind][1].from_pretrained(folder).eval()
    model.set_scan_backend("events")  # what runs elsewhere
    with torch.no_grad():
        out = model(**inputs_of(kind), output_update_gates=True)
    return {"main": out.logits if "logits" in out else out.last_hidden_state, "gates": out.update_gates}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_outputs_and_gates_also_saved_again(
    elsewhere: dict[str, Any], folders: dict[str, Path], kind: str
) -> None:
    found, wanted = elsewhere[f"model {kind}"], here(kind, folders[kind])
    assert found["module"].startswith("transformers_modules.")
    for name in ("first", "again"):
        assert torch.equal(found[name]["gates"], wanted["gates"])
        # The last bit of a matrix product depends on where in memory the weights lie.
        torch.testing.assert_close(found[name]["main"], wanted["main"], rtol=0, atol=1e-6)
    assert 0 < wanted["gates"].mean() < 1
    code = {path.name for path in folders[kind].glob("*.py")} - {"image_processing_skip_rnn.py"}
    assert code <= set(found["files"])


def test_processors_and_tokenizers(elsewhere: dict[str, Any], folders: dict[str, Path]) -> None:
    wanted = {
        "image": SkipRNNImageProcessor.from_pretrained(folders["image"])(RAW["image"], return_tensors="pt"),
        "text": small_tokenizer()(RAW["text"], padding=True, return_tensors="pt"),
        "audio": SkipRNNFeatureExtractor.from_pretrained(folders["audio"])(
            RAW["audio"], sampling_rate=8000, return_tensors="pt"
        ),
    }
    for kind, batch in wanted.items():
        found = elsewhere[f"processor {kind}"]
        assert batch.keys() == found["first"].keys() == found["again"].keys()
        for name, value in batch.items():
            assert torch.equal(found["first"][name], value)
            assert torch.equal(found["again"][name], value)
    assert "image_processing_skip_rnn.py" in elsewhere["processor image"]["files"]
    assert "feature_extraction_skip_rnn.py" in elsewhere["processor audio"]["files"]


def close(found: list[list[dict]], wanted: list[list[dict]]) -> bool:
    """Labels, updates and steps equal; scores to rounding (another scan may run here)."""
    names = [[[{**r, "score": None} for r in row] for row in results] for results in (found, wanted)]
    scores = [[r["score"] for row in results for r in row] for results in (found, wanted)]
    return names[0] == names[1] and np.allclose(*scores, rtol=1e-4, atol=1e-6)


def as_rows(results: list[Any]) -> list[list[dict]]:
    """A list of results for each input."""
    return [[row] if isinstance(row, dict) else row for row in results]


@pytest.mark.parametrize("kind", list(TASKS))
def test_pipelines(elsewhere: dict[str, Any], folders: dict[str, Path], kind: str) -> None:
    pipe = pipeline(TASKS[kind], model=str(folders[kind]), device="cpu", return_updates=True, trust_remote_code=True)
    found, wanted = elsewhere[f"pipeline {kind}"], pipe(RAW[kind], batch_size=2)
    assert close(as_rows(found), as_rows(wanted))
    assert all(0 < row[0]["updates"] <= row[0]["steps"] for row in as_rows(found))


def test_from_the_hub_at_a_revision(elsewhere: dict[str, Any], folders: dict[str, Path]) -> None:
    found, wanted = elsewhere["hub model"]["first"], here("image", folders["image"])
    assert torch.equal(found["gates"], wanted["gates"])
    torch.testing.assert_close(found["main"], wanted["main"], rtol=0, atol=1e-6)
    assert close(elsewhere["hub pipeline"], elsewhere["pipeline image"])


def test_code_never_stays_in_another_repository(tmp_path: Path) -> None:
    """Also where the config came with such references: saving names the code beside the weights."""
    model = small_model("image")
    model.config.auto_map = {"AutoConfig": "bob/other--configuration_skip_rnn.SkipRNNConfig", "AutoX": "bob/other--x.X"}
    model.save_pretrained(tmp_path)
    assert "bob/other" not in (tmp_path / "config.json").read_text()
    assert [p for p in checkpoint_problems(tmp_path) if "README" not in p] == []


def test_a_base_model_does_not_promise_a_classifier(tmp_path: Path) -> None:
    model = small_model("series")
    model.save_pretrained(tmp_path / "head")
    model.base_model.save_pretrained(tmp_path / "base")
    config = SkipRNNConfig.from_pretrained(tmp_path / "base")
    assert set(config.auto_map) == {"AutoConfig", "AutoModel"}
    assert config.custom_pipelines == {}


def test_only_what_travels_is_imported_at_load(folders: dict[str, Path]) -> None:
    """Flat, plain PyTorch: no file of a checkpoint asks for this package outside of a function, or for Triton."""
    for path in folders["series"].glob("*.py"):
        lines = path.read_text().splitlines()
        wrong = [line for line in lines if line.startswith(("from hf_skiprnn", "import hf_skiprnn", "import triton"))]
        assert not wrong, path.name
