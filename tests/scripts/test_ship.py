"""scripts/paper/ship.py copies a run into this repository as a checkpoint folder, or refuses it with a reason."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_skiprnn.commands import train
from hf_skiprnn.hub.card import render_card
from hf_skiprnn.hub.folder import checkpoint_problems, stage
from scripts.paper import ship
from scripts.paper.readme_table import checkpoint_folders


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    quiet = ["--use_cpu", "--disable_tqdm=true", "--report_to=none", "--eval_strategy=no", "--save_strategy=no"]
    train.main(["--task=digits", f"--output_dir={folder}", "--max_steps=2", "--load_best_model_at_end=false", *quiet])
    return folder


@pytest.fixture(scope="module")
def copied(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of the run; it replaced an older one."""
    folder = tmp_path_factory.mktemp("cards") / "skip-lstm-digits"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    ship.main([str(run), str(folder)])
    return folder


def test_the_folder_holds_a_checkpoint_and_nothing_of_training(copied: Path) -> None:
    assert {path.name for path in copied.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
        "steps-read-test.png",
    }
    location = f"{copied.parent.name}/{copied.name}"
    assert render_card(copied, location) == (copied / "README.md").read_text(encoding="utf-8")
    model = AutoModelForImageClassification.from_pretrained(copied)
    assert type(model).__module__ == "hf_skiprnn.model.modeling_skip_rnn"
    assert AutoImageProcessor.from_pretrained(copied).size == {"height": 8, "width": 8}


def test_results_say_where_they_come_from(copied: Path) -> None:
    results = json.loads((copied / "results.json").read_text(encoding="utf-8"))
    assert results["commit"]
    assert results["command"]
    assert set(results["versions"]) >= {"torch", "transformers", "hf_skiprnn", "python"}


def test_publishing_adds_the_code(copied: Path, tmp_path: Path) -> None:
    folder = stage(copied, "alice/digits", tmp_path / "digits")
    assert checkpoint_problems(folder) == []
    code = {path.name for path in folder.glob("*.py")}
    assert {"modeling_skip_rnn.py", "image_processing_skip_rnn.py", "pipeline_skip_rnn.py"} <= code


def test_without_weights_the_card_says_how_to_make_them(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model_cards" / "skip-lstm-digits"
    ship.main([str(run), str(folder), "--without_weights"])
    kept = {"README.md", "config.json", "preprocessor_config.json", "results.json", "steps-read-test.png"}
    assert {path.name for path in folder.iterdir()} == kept
    card = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert "The weights are too large for this folder" in card
    assert f"\n    {results['command']}\n" in card
    assert f'model="{results["training"]["output_dir"]}"' in card  # the folder into which the command writes them
    assert checkpoint_folders(folder.parent) == [folder]


def test_results_that_the_checkpoint_does_not_give_are_refused(run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(run, tmp_path / "changed")
    results = json.loads((changed / "results.json").read_text(encoding="utf-8"))
    results["metrics"]["test"]["accuracy"] += 0.01
    (changed / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"accuracy is 0\.\d+, and results\.json says 0\.\d+"):
        ship.main([str(changed), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_unfinished_and_large_runs_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="it is not a finished run"):
        ship.main([str(tmp_path), str(tmp_path / "out")])
    monkeypatch.setattr(ship, "LARGEST", 1000)
    with pytest.raises(SystemExit, match="at most 1,000 belong here"):
        ship.main([str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
