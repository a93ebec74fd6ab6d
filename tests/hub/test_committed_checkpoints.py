"""Every checkpoint in model_cards/, loaded from the clone, gives the numbers on its card."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from paths import ROOT
from PIL import Image
from test_model_card import untraced
from transformers import AutoModelForSequenceClassification

from hf_skiprnn.commands import evaluate, runs, train
from hf_skiprnn.hub.card import data_fingerprint, number, render_card
from hf_skiprnn.hub.folder import checkpoint_files
from hf_skiprnn.tasks import TASKS, Task
from scripts.paper import ship

DATA = ROOT.parent / "shared" / "data"
SHIPPED = sorted(path.parent for path in (ROOT / "model_cards").glob("*/model.safetensors"))

# Another processor sums in another order; near a tie (k * D = 0.5) a row may then read other steps. This affects a few
# of 10000 rows. The accuracy may differ by as much, and the other numbers by the same relative difference.
ACCURACY_TOLERANCE = 0.002
RELATIVE_TOLERANCE = 0.01

CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))  # some without weights

each = pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def task_of(folder: Path) -> Task:
    """Return the task with the options of training, but with the data from the folder of real data."""
    results = results_in(folder)
    options = dict(results["task_options"])
    if "dataset_name" in options:
        data = DATA / Path(options["dataset_name"]).name
        if not data.is_dir():
            pytest.skip(f"no real data: {data} is absent")
        options["dataset_name"] = str(data)
    task = TASKS[results["task"]](**options)
    task.use_processor(str(folder))
    return task


@each
def test_it_gives_the_numbers_on_its_card(folder: Path, tmp_path: Path) -> None:
    told, task = results_in(folder), task_of(folder)
    rows = task.load(seed=0).test
    assert data_fingerprint(rows, "test") == told["data"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    found = evaluate.evaluate(model, task, rows, batch_size=500, folder=tmp_path)
    wanted = told["metrics"]["test"]
    assert found["updates"] == pytest.approx(wanted["updates"], rel=RELATIVE_TOLERANCE)
    if "accuracy" in wanted:
        assert found["accuracy"] == pytest.approx(wanted["accuracy"], abs=ACCURACY_TOLERANCE)
    if "mse" in wanted:
        assert found["mse"] == pytest.approx(wanted["mse"], rel=RELATIVE_TOLERANCE)
    assert found.get("solved") == wanted.get("solved")


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_its_card_is_rendered_from_its_results(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == render_card(folder, f"model_cards/{folder.name}")
    assert len(card.splitlines()) <= 80
    assert untraced(folder, card) == set()
    test = results_in(folder)["metrics"]["test"]
    assert all(number(test[name]) in card for name in ("accuracy", "mse", "updates") if name in test)


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_command_on_its_card_trains_such_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, told = (folder / "README.md").read_text(encoding="utf-8"), results_in(folder)
    (line,) = re.findall(r"^    (python scripts/train\.py .*)$", card, re.MULTILINE)
    assert "../" not in line  # a stranger has no such folder
    monkeypatch.chdir(ROOT)
    start = told.get("start", {}).get("model_name_or_path")
    arguments = shlex.split(line)[2:]
    if start:  # weights that are not in this repository
        assert f"The weights started from {start}: {told['start']['made_by']}." in card
        arguments[arguments.index(start) - 1 : arguments.index(start) + 1] = []
    settings = train.parse([*arguments, "--use_cpu"])
    now = runs.describe(settings)
    measured = {"dataset_name", "gate_calibration", "gate_shift"}  # by training, or a folder of another machine
    budget = dict(told["budget"])
    if budget["target_update_rate"] is not None:  # a controller sets these while it trains
        measured |= {"budget_weight", "budget_loss", "budget_target", "budget_slope", "gate_noise", "gate_gradient"}
        measured |= {"update_bias"}
    for group in ("task_options", "model"):
        assert now[group] == now[group] | {n: v for n, v in told[group].items() if n not in measured}
    if told["model"]["budget_loss"] == "cost":  # version 0.1.0 had another name for it
        budget["steered_update_rate"] = budget.pop("target_update_rate")
    assert now["budget"] == now["budget"] | budget
    own = {"output_dir", "seed", "disable_tqdm", "use_cpu"}
    chosen = {name: value for name, value in settings.chosen.items() if name not in own}
    wanted = {name: value for name, value in told["training"].items() if name not in own}
    if "command_today" in told:  # an option says what a recipe said, or what was a default
        chosen = {name: value for name, value in chosen.items() if name in wanted}
    if settings.budget.steered_update_rate is not None:  # the last model is kept, whatever a recipe says
        wanted["load_best_model_at_end"] = False
    assert chosen == wanted


@each
def test_its_results_tell_of_the_trained_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {name: config.get(name) for name in results_in(folder)["model"]} == results_in(folder)["model"]


@each
def test_the_folder_is_complete_and_small(folder: Path, tmp_path: Path) -> None:
    assert ship.problems_of(folder, tmp_path) == []
    assert sum(file.size for file in checkpoint_files(folder)) <= ship.LARGEST
    assert all(
        file.path.rpartition(".")[2] in ("json", "md", "png", "safetensors") for file in checkpoint_files(folder)
    )
    results = results_in(folder)
    assert results["command"].startswith("python scripts/train.py ")
    assert results["versions"]["hf_skiprnn"]


@each
def test_the_lines_on_its_card_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"image": Image.new("L", (28, 28))}])
    monkeypatch.setattr(soundfile, "read", lambda *_, **__: (np.zeros(4000, np.float32), 8000))
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, f"{folder.name}/README.md", "exec"), {})
    assert "'updates':" in capsys.readouterr().out
