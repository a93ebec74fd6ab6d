"""Training and evaluation from the command line: results, settings, pictures, the final summary."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from paths import CARDS
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSequenceClassification, pipeline

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.commands.runs import WRITTEN_TO, run_of
from hf_skiprnn.commands.summary import gate_lines
from hf_skiprnn.hub.card import number, render_card, write_card
from hf_skiprnn.tasks import TASKS, Digits
from scripts import demo

QUIET = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu"]
DIGITS_RUN = [
    *("--task", "digits", "--max_steps", "40", "--hidden_size", "24", "--warmup_steps", "4"),
    *("--eval_steps", "20", "--save_steps", "20", *QUIET),
]


def refusal(capsys, call, *arguments):
    """Return the exit status and error message of a script that refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        call(list(arguments))
    assert stopped.value.code != 0
    return f"{stopped.value.code} {capsys.readouterr().err}"


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The results and options of a short training on digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = train.main([*DIGITS_RUN, "--output_dir", str(folder)])
    return folder, results, said.getvalue()


def test_a_run_leaves_model_processor_and_results(digits_run):
    folder, results, _ = digits_run
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["model"]["hidden_size"] == 24
    assert results["training"]["max_steps"] == 40
    assert results["train"]["steps"] == 40
    assert results["training"]["seed"] == 42
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["metrics"]) == {"validation", "test"}
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    test = Digits().load(0).test
    with torch.no_grad():
        out = model(**processor(test["image"][:], return_tensors="pt"), labels=torch.tensor(test["label"][:]))
    metrics = results["metrics"]["test"]
    assert metrics["accuracy"] == pytest.approx((out.logits.argmax(1).numpy() == test["label"][:]).mean())
    assert metrics["task_loss"] == pytest.approx(out.task_loss.item(), rel=1e-5)
    assert metrics["updates"] == pytest.approx(out.num_updates.mean().item(), rel=1e-5)
    assert results["multiply_accumulates"] == {
        "read": pytest.approx(metrics["updates"] * 4 * 24 * 25),
        "every_step": pytest.approx(64 * 4 * 24 * 25),
    }
    assert model.config.id2label[7] == "7"


def test_what_training_says_at_its_end(digits_run):
    folder, results, said = digits_run
    test, rate = results["metrics"]["test"], results["metrics"]["test"]["update_rate"]
    most = np.bincount(Digits().load(0).test["label"][:]).max() / 360
    expected = [
        f"test accuracy: {number(test['accuracy'])} (always guessing the most frequent class: {number(most)})",
        f"steps read: {number(test['updates'])} of 64 a row",
        *(["The gate hardly skips: "] if rate > 0.95 else []),
        f"folder: {folder}",
        f"picture: {folder}/steps-read-test.png",
        "next:",
        f"  hf-skiprnn evaluate {folder}",
        f"  hf-skiprnn publish {folder} YOUR_NAME/digits --dry-run",
    ]
    assert [line.startswith(start) for line, start in zip(said.splitlines()[-len(expected) :], expected, strict=True)]
    assert (folder / "steps-read-test.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("gate", "updates", "rate", "message"),
    [
        ("learned", 1.0, 0.02, "The gate has closed: .* Lower --budget_weight"),
        ("learned", 49.0, 0.98, "The gate hardly skips: 98.0 % .* Raise --budget_weight"),
        ("learned", 25.0, 0.5, None),
        ("always", 50.0, 1.0, None),
    ],
)
def test_a_gate_that_learnt_nothing_is_said_to(gate, updates, rate, message):
    results = {"model": {"gate": gate}, "metrics": {"test": {"updates": updates, "update_rate": rate}}}
    lines = gate_lines(results)
    assert bool(lines) == bool(message)
    assert not message or re.match(message, lines[0])
    assert gate_lines(results | {"steering": {"reached": True}}) == []  # the share was asked for


def test_the_pipeline_takes_the_run(digits_run):
    folder, _, _ = digits_run
    test = Digits().load(0).test
    classify = pipeline("image-classification", model=str(folder), device="cpu", trust_remote_code=True)
    answers = classify([test[i]["image"] for i in range(8)], top_k=1)  # it turns images into RGB on the way
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**Digits().collate([test[i] for i in range(8)])).logits
    assert [answer[0]["label"] for answer in answers] == [str(i) for i in logits.argmax(1).tolist()]
    assert answers[0][0]["score"] == pytest.approx(logits.softmax(1).max(1).values[0].item(), rel=1e-5)


def test_another_run_in_the_same_folder_is_refused(digits_run, capsys):
    folder, _, _ = digits_run
    said = refusal(capsys, train.main, "--task", "digits", "--output_dir", str(folder), "--hidden_size", "25", *QUIET)
    assert "holds another run: hidden_size was 24 and is now 25; " in said
    assert "To go on with it, give it the old values." in said


@pytest.mark.parametrize("option", ["learning_rate=0.5", "optim=sgd", "max_steps=400", "adam_beta2=0.9"])
def test_a_run_does_not_go_on_with_other_training_options(option, digits_run, capsys):
    """Its optimizer and schedule would go on as they were, but results.json would name the new ones."""
    said = refusal(capsys, train.main, *DIGITS_RUN, f"--{option}", "--output_dir", str(digits_run[0]))
    assert f"holds another run: {option.partition('=')[0]} was" in said


def test_a_finished_run_that_is_repeated_keeps_the_facts_of_its_training(tmp_path, monkeypatch):
    options = ["--task", "digits", "--max_steps", "2", "--save_steps", "2", "--eval_steps", "2", "--warmup_steps", "0"]
    options += ["--output_dir", str(tmp_path), *QUIET]
    monkeypatch.setattr(train, "commit", lambda: "1" * 12)
    first = train.main(options)
    monkeypatch.setattr(train, "commit", lambda: "2" * 12)
    again = train.main(options)
    for name in ("commit", "train", "finished"):
        assert again[name] == first[name]
    assert first["train"]["resumed_from"] is None
    assert json.loads((tmp_path / "run.json").read_text())["commits"] == ["1" * 12]
    (tmp_path / "results.json").unlink()  # as if evaluation had failed
    assert train.main(options)["commit"] == "1" * 12


def test_a_run_that_goes_on_at_another_commit_names_both(tmp_path, monkeypatch):
    options = ["--task", "digits", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--warmup_steps", "0"]
    options += ["--output_dir", str(tmp_path), *QUIET]
    monkeypatch.setattr(train, "commit", lambda: "1" * 12)
    train.main(options)
    shutil.rmtree(tmp_path / "checkpoint-4")
    monkeypatch.setattr(train, "commit", lambda: "2" * 12)
    results = train.main(options)
    assert (results["commit"], results["train"]["commits"]) == ("2" * 12, ["1" * 12, "2" * 12])


def test_evaluation_repeats_the_runs_metrics_and_draws(digits_run, tmp_path, capsys):
    folder, results, _ = digits_run
    for checkpoint in (folder, folder / "checkpoint-40"):
        found = evaluate.main(
            [str(checkpoint), "--output_dir", str(tmp_path), "--batch_size", "100", "--figure_rows", "3"]
        )
        assert json.loads((tmp_path / "evaluation-test.json").read_text()) == found
        assert found["task"] == "digits"
        assert found["rows"] == 360
        if checkpoint == folder:
            for name in ("accuracy", "loss", "task_loss", "updates", "updates_std", "updates_p80", "update_rate"):
                assert found["metrics"][name] == pytest.approx(results["metrics"]["test"][name], rel=1e-5)
            assert found["multiply_accumulates"]["read"] == pytest.approx(results["multiply_accumulates"]["read"])
    printed = capsys.readouterr().out
    assert f"updates: {results['metrics']['test']['updates']:.2f} +- " in printed
    with Image.open(tmp_path / "steps-read-test.png") as picture:
        colors = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert (colors[:, 0] - colors[:, 1] > 60).mean() > 0.02  # red: pixels that were read


@pytest.mark.parametrize("name", ["results.json", "run.json"])
def test_a_checkpoints_files_are_data_and_set_only_the_tasks_own_fields(tmp_path, capsys, name):
    """They cannot set where to write or whether to run code, nor any value of a wrong type."""
    options = {"length": 20, "eval_rows": 64, "trust_remote_code": True, "output_dir": "/x", "batch_size": 1}
    (tmp_path / name).write_text(json.dumps({"task": "adding", "task_options": options | {"cache_folder": "/x"}}))
    settings, task = evaluate.parse([str(tmp_path)])
    assert (task.length, task.eval_rows) == (20, 64)
    assert (settings.trust_remote_code, settings.output_dir, settings.batch_size) == (False, None, 256)
    assert evaluate.parse([str(tmp_path), "--length", "30"])[1].length == 30
    for wrong in ("20", 2.5, None, [20], True):
        (tmp_path / name).write_text(json.dumps({"task": "adding", "task_options": {"length": wrong}}))
        said = refusal(capsys, evaluate.main, str(tmp_path))
        assert f"option length of task adding must be <class 'int'>; got {wrong!r}" in said
    for content in ("[]", "{", '{"task": ["adding"]}'):
        (tmp_path / name).write_text(content)
        assert "Traceback" not in refusal(capsys, evaluate.main, str(tmp_path))


@pytest.mark.parametrize("option", ["--gate_shifts", "--update_rates"])
def test_only_a_learned_gate_is_evaluated_at_other_shares(tmp_path, capsys, option):
    config = SkipRNNConfig(hidden_size=4, gate="strided", **TASKS["frequency"]().model_defaults())
    SkipRNNForSequenceClassification(config).save_pretrained(tmp_path)
    said = refusal(capsys, evaluate.main, str(tmp_path), "--task", "frequency", "--eval_rows", "8", option, "0.5")
    assert "move a learned gate" in said
    assert "has gate='strided'" in said


def test_the_budget_of_a_checkpoint_is_not_that_of_its_fine_tuning(tmp_path):
    """Its lambda has the unit of its own budget; a controller's may even be below 0."""
    held = {"budget_loss": "rate", "budget_weight": -0.9, "budget_target": 0.2, "gate_noise": 0.25}
    SkipRNNForSequenceClassification(
        SkipRNNConfig(hidden_size=4, **TASKS["frequency"]().model_defaults(), **held)
    ).save_pretrained(tmp_path)
    start = ["--task", "frequency", "--use_cpu", "--model_name_or_path", str(tmp_path)]
    for options, loss, target in (
        (["--budget_loss", "l2", "--budget_target", "0.4"], "l2", 0.4),
        (["--budget_loss", "cost"], "cost", None),
        (["--budget_warmup_steps", "10"], "cost", None),
        (["--steered_update_rate", "0.3"], "cost", None),
    ):
        config = train.parse([*start, *options]).config
        assert (config.budget_loss, config.budget_target, config.budget_weight) == (loss, target, 1e-4)


def test_two_ways_to_set_the_budget_are_refused(capsys):
    for own in (["--budget_weight", "1e-3"], ["--budget_loss", "l2"], ["--budget_target", "0.4"]):
        for share in (["--target_update_rate", "0.3"], ["--dial", "0.1", "0.5"]):
            said = refusal(capsys, train.parse, "--task", "frequency", "--use_cpu", *own, *share)
            assert f"{own[0]} and {share[0]} both set the budget" in said


def test_the_best_checkpoint_of_a_steered_training_is_refused(capsys):
    start = ["--task", "frequency", "--use_cpu", "--target_update_rate", "0.3", "--eval_strategy", "epoch"]
    wanted = [*start, "--save_strategy", "epoch", "--load_best_model_at_end"]
    assert "may read another share of steps" in refusal(capsys, train.parse, *wanted)
    assert not train.parse([*wanted, "false"]).args.load_best_model_at_end


def test_a_data_folder_of_another_machine_is_not_looked_for(tmp_path, caplog):
    for data, kept in (
        ("../gone/data/mnist", False),
        ("data/of/mine", False),
        ("mnist", False),
        ("you/digits", True),
        (str(tmp_path), True),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"task": "mnist", "task_options": {"dataset_name": data}}))
        assert run_of(str(tmp_path)) == ("mnist", {"dataset_name": data} if kept else {})
        assert (f"names the data {data}, which are not here: give --dataset_name" in caplog.text) is not kept
        caplog.clear()
        assert evaluate.parse([str(tmp_path)])[1].dataset_name == (data if kept else "ylecun/mnist")
        assert evaluate.parse([str(tmp_path), "--dataset_name", "my/own"])[1].dataset_name == "my/own"
    (tmp_path / "run.json").write_text(json.dumps({"task": "mnist", "task_options": {"dataset_name": "../gone/mnist"}}))
    assert run_of(str(tmp_path)) == ("mnist", {"dataset_name": "../gone/mnist"})  # this machine's own run: data moved


def test_a_file_beside_the_checkpoint_counts_for_the_trainers_own_folders_only(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"task": "adding", "task_options": {"length": 20}}))
    assert run_of(str(tmp_path / "checkpoint-20")) == ("adding", {"length": 20})
    assert run_of(str(tmp_path / "model")) == (None, {})


def test_every_text_option_of_a_task_is_read_from_not_written_to():
    """Check each new option by hand: a folder to write to must be added to WRITTEN_TO."""
    read = {"dataset_name", "dataset_config", "input_column", "label_column", "vectors", "feature_model"}
    read |= {"feature_folder", "features", "sound_features"}
    read |= {"held_out_speaker", "validation_speaker", "test_speaker", "input_kind", "sequence_id"}
    for task in TASKS.values():
        texts = {
            field.name for field in dataclasses.fields(task) if "str" in str(field.type) or "Lit" in str(field.type)
        }
        assert texts <= read | set(WRITTEN_TO)


def test_evaluation_of_a_checkpoint_without_a_run(tmp_path, capsys):
    config = SkipRNNConfig(hidden_size=4, **TASKS["frequency"]().model_defaults())
    SkipRNNForSequenceClassification(config).save_pretrained(tmp_path)
    assert "no run.json or results.json at the checkpoint: give --task too" in refusal(
        capsys, evaluate.main, str(tmp_path)
    )
    assert "there is no folder absent (the checkpoint stands before the options); if it is an id" in refusal(
        capsys, evaluate.main, "absent"
    )
    found = evaluate.main([str(tmp_path), "--task", "frequency", "--eval_rows", "64", "--split", "validation"])
    assert found["rows"] == 64
    assert (tmp_path / "steps-read-validation.png").stat().st_size > 10_000


class InTurn(Executor):
    """Runs a job when it is submitted: a training in this process must not run beside an evaluation."""

    def submit(self, fn, /, *args, **kwargs):
        done = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_the_demo_trains_reloads_and_compares(tmp_path, monkeypatch, capsys):
    """One of the three trainings and the reload run in new processes, the others in this one, which is faster."""
    start = demo.start

    def here(folder, options, **streams):
        if folder.name == "skip-lstm":
            return start(folder, options)
        train.main(["--task", "find_digit", f"--output_dir={folder}", *options])
        return subprocess.Popen(["true"])

    monkeypatch.setattr(demo, "start", here)
    monkeypatch.setattr(demo, "ThreadPoolExecutor", lambda _: InTurn())
    short = ["--max_steps", "12", "--eval_strategy", "no", "--save_strategy", "no", "--places", "1", *QUIET]
    demo.main(["--output_dir", str(tmp_path), *short])
    lines = capsys.readouterr().out.splitlines()
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")}
    test = {name: result["metrics"]["test"] for name, result in results.items()}
    skip = test["skip-lstm"]
    assert f"loaded in a new process: accuracy {skip['accuracy']:.1%}, {skip['updates']:.1f} pixels read" in lines
    table = {line.split("  ")[0]: line.split() for line in lines if "  " in line}
    assert table["Skip LSTM"][-3] == f"{skip['updates']:.1f}"
    assert skip["update_rate"] == pytest.approx(0.33, rel=0.1)
    assert table["plain LSTM"][-3] == "256.0"
    assert (results["strided-lstm"]["model"]["gate"], test["strided-lstm"]["updates"]) == ("strided", 86.0)
    assert (tmp_path / "skip-lstm/steps-read-test.png").is_file()
    with Image.open(tmp_path / "skip-lstm/reading.gif") as animation:
        assert animation.n_frames > 30


CHECKPOINT = CARDS / "skip-lstm-digits"


def test_a_checkpoint_is_fine_tuned(tmp_path, capsys):
    start = ["--task", "digits", "--model_name_or_path", str(CHECKPOINT), "--budget_loss", "l2"]
    start += ["--budget_target", "0.3"]
    settings = train.parse([*start, "--output_dir", str(tmp_path), *QUIET])
    held = SkipRNNConfig.from_pretrained(CHECKPOINT)
    assert settings.config.hidden_size == held.hidden_size != 16
    assert settings.config.budget_target == 0.3 != held.budget_target
    steps = ["--max_steps", "1", "--learning_rate", "0", "--per_device_train_batch_size", "4"]
    results = train.main([*start, *steps, "--output_dir", str(tmp_path), *QUIET])
    assert results["start"] == {"model_name_or_path": str(CHECKPOINT)}
    trained = SkipRNNConfig.from_pretrained(tmp_path)
    assert (results["model"]["budget_loss"], results["model"]["budget_target"]) == ("l2", 0.3)
    assert all(getattr(trained, name) == value for name, value in results["model"].items())
    assert f"The weights started from {CHECKPOINT.name}." in render_card(tmp_path, "runs/digits")
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    anew = refusal(capsys, train.main, "--task", "digits", "--output_dir", str(tmp_path), *QUIET)
    assert "model_name_or_path was" in anew


def test_a_dial_is_evaluated_at_several_shares_and_its_card_tells_them(tmp_path):
    steps = ["--max_steps", "40", "--eval_steps", "40", "--save_steps", "40", "--warmup_steps", "4"]
    results = train.main(["--task", "digits", "--dial", "0.1", "0.8", *steps, "--output_dir", str(tmp_path), *QUIET])
    points = results["operating_points"]
    assert [point["update_rate_asked"] for point in points] == [0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7]
    shares = [point["update_rate"] for point in points]
    assert shares == sorted(shares)
    assert shares[0] < 0.2 < 0.5 < shares[-1]
    config = SkipRNNConfig.from_pretrained(tmp_path)
    assert config.gate_shift == results["steering"]["gate_shift"]  # the operating point is the target's
    assert config.gate_noise[0] < 0 < config.gate_noise[1]
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{shares[0]:.1%}".replace("%", " %") in card
    assert "](operating-points-test.png)" in card


def test_mnist_trains_from_a_local_folder(shared_data, tmp_path):
    options = ["--task", "mnist", "--dataset_name", str(shared_data("mnist")), "--hidden_size", "8", "--max_steps", "2"]
    settings = train.parse([*options, "--output_dir", str(tmp_path), "--per_device_train_batch_size", "4", *QUIET])
    rows = settings.task.load(0)
    out = SkipRNNForSequenceClassification(settings.config)(**settings.task.collate([rows.test[i] for i in range(4)]))
    assert out.logits.shape == (4, 10)
    assert out.num_updates.max() <= 784
