"""The scripts as a user runs them: settings, kills, results, pictures."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from paths import CARDS, SCRIPTS
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSequenceClassification, pipeline

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.commands import evaluate, train
from hf_skiprnn.hub.card import render_card
from hf_skiprnn.tasks import TASKS, Digits
from hf_skiprnn.training.checkpoints import COMPLETE, last_complete_checkpoint

RECIPES = [path for path in sorted((SCRIPTS / "recipes").glob("*.yaml")) if "own_data" not in path.stem]  # needs data
LAUNCHERS = SCRIPTS / "accelerate"

QUIET = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu"]


def run(script, *arguments, check=True, **kwargs):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True, check=False, **kwargs
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def refusal(capsys, call, *arguments):
    """What a script says when it refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        call(list(arguments))
    assert stopped.value.code != 0
    return f"{stopped.value.code} {capsys.readouterr().err}"


# Settings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_make_a_model_and_paper_recipes_have_the_papers_settings(path, tmp_path):
    settings = train.parse(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu"])
    task, config, args = settings.task, settings.config, settings.args
    assert path.stem.startswith(f"{task.name}-skip-{config.cell_type}")
    model = SkipRNNForSequenceClassification(config)
    assert model.classifier.out_features == task.model_defaults()["num_labels"]
    assert settings.chosen["learning_rate"] == args.learning_rate
    assert args.max_grad_norm == 1.0
    assert config.gate == "learned"
    if path.stem.endswith("-paper") and task.name in ("adding", "frequency", "mnist"):
        settings = (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay)
        assert settings == (1e-4, 0.9, 0.999, 1e-8, 0.0)
        assert args.lr_scheduler_type == "constant"
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
        assert (config.hidden_size, config.num_hidden_layers) == (110, 1)
        assert config.budget_weight in (1e-5, 1e-4)
        assert config.budget_loss == "cost"


def test_every_task_and_cell_has_both_recipes():
    names = {path.stem for path in RECIPES}
    for task in ("adding", "digits", "frequency", "mnist"):
        for cell in ("lstm", "gru"):
            assert f"{task}-skip-{cell}" in names
            assert f"{task}-skip-{cell}-paper" in names or task == "digits"  # not a task of the paper


def recipe(tmp_path, **settings):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: adding\n" + "".join(f"{name}: {value}\n" for name, value in settings.items()))
    return str(path)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, learning_rate="1e-3", budget_weight="2e-5", hidden_size=32, length=20, bf16="false")
    settings = train.parse(["--config", path, "--hidden_size", "48", "--learning-rate=0.5", "--use_cpu"])
    config, args = settings.config, settings.args
    assert args.learning_rate == 0.5
    assert config.budget_weight == 2e-5  # a string in YAML 1.1
    assert config.hidden_size == 48
    assert config.input_size == 2  # the task's
    assert settings.task.length == 20
    assert not args.bf16
    assert args.output_dir == str(Path("runs/recipe"))
    assert settings.chosen == {"learning_rate": 0.5, "bf16": False, "use_cpu": True}


def test_lists_dicts_and_nothing_in_a_recipe(tmp_path):
    path = recipe(
        tmp_path,
        label_names="[labels]",
        lr_scheduler_kwargs="{min_lr: 1.0e-5}",
        lr_scheduler_type="cosine_with_min_lr",
        budget_target="null",
        update_bias=-1,
    )
    settings = train.parse(["--config", path, "--use_cpu"])
    config, args = settings.config, settings.args
    assert args.label_names == ["labels"]
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert config.budget_target is None
    assert config.update_bias == -1.0


def test_a_steered_lambda_takes_the_place_of_a_recipes_target():
    settings = train.parse(["--task", "digits", "--target_update_rate", "0.5", "--use_cpu"])
    assert train.read_recipe(Path("digits-skip-lstm"))["budget_loss"] == "l2"
    assert (settings.config.budget_loss, settings.config.budget_target) == ("cost", None)
    assert settings.args.load_best_model_at_end is False
    assert settings.args.logging_steps == 25


def test_every_field_of_the_configuration_is_an_option(tmp_path):
    own = {field.name for field in dataclasses.fields(SkipRNNConfig)} & set(SkipRNNConfig.__annotations__)
    offered = {field.name: field.type for field in dataclasses.fields(train.model_arguments())}
    assert set(offered) == own
    settings = train.parse(
        [
            *("--config", recipe(tmp_path), "--use_cpu", "--cell_type", "gru", "--gru_reset", "after"),
            *("--learn_initial_state", "false", "--budget_loss", "l1", "--budget_target", "0.5"),
        ]
    )
    config = settings.config
    assert (config.cell, config.learn_initial_state, config.budget_target) == ("gru_reset_after", False, 0.5)


def test_settings_that_are_refused(tmp_path, capsys):
    def said(*arguments, **settings):
        return refusal(capsys, train.parse, "--config", recipe(tmp_path, **settings), "--use_cpu", *arguments)

    assert "unknown setting 'learning_rat'. Did you mean 'learning_rate'?" in said(learning_rat=1)
    assert "unknown: --hiden_size 3" in said("--hiden_size", "3")
    assert "invalid float value: 'fast'" in said(learning_rate="fast")
    assert "invalid choice: 'rnn'" in said("--cell_type", "rnn")
    (tmp_path / "other.yaml").write_text("task: tetris\n")
    assert f"one of {', '.join(sorted(TASKS))}" in refusal(
        capsys, train.parse, "--config", str(tmp_path / "other.yaml")
    )
    assert "There is no recipe" in refusal(capsys, train.parse, "--config", str(tmp_path / "none.yaml"))
    assert "give either --task" in refusal(capsys, train.parse, "--seed", "1")
    assert "give either --task" in refusal(capsys, train.parse, "--task", "digits", "--config", "x.yaml")
    assert "invalid choice: 'tetris'" in refusal(capsys, train.parse, "--task", "tetris")


# Runs


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A short training run on digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--task", "digits", "--output_dir", str(folder), "--max_steps", "40", "--hidden_size", "24"]
    results = train.main([*options, "--eval_steps", "20", "--save_steps", "20", "--warmup_steps", "4", *QUIET])
    return folder, results


def test_a_run_leaves_model_processor_and_results(digits_run):
    folder, results = digits_run
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


def test_the_pipeline_takes_the_run(digits_run):
    folder, _ = digits_run
    test = Digits().load(0).test
    classify = pipeline("image-classification", model=str(folder), device="cpu", trust_remote_code=True)
    answers = classify([test[i]["image"] for i in range(8)], top_k=1)  # it turns images into RGB on the way
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**Digits().collate([test[i] for i in range(8)])).logits
    assert [answer[0]["label"] for answer in answers] == [str(i) for i in logits.argmax(1).tolist()]
    assert answers[0][0]["score"] == pytest.approx(logits.softmax(1).max(1).values[0].item(), rel=1e-5)


def test_another_run_in_the_same_folder_is_refused(digits_run, capsys):
    folder, _ = digits_run
    said = refusal(capsys, train.main, "--task", "digits", "--output_dir", str(folder), "--hidden_size", "25", *QUIET)
    assert "holds another run: hidden_size was 24 and is now 25. Choose another --output_dir" in said


def test_evaluation_repeats_the_runs_metrics_and_draws(digits_run, tmp_path, capsys):
    folder, results = digits_run
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


def test_evaluation_of_a_checkpoint_without_a_run(tmp_path, capsys):
    config = SkipRNNConfig(hidden_size=4, **TASKS["frequency"]().model_defaults())
    SkipRNNForSequenceClassification(config).save_pretrained(tmp_path)
    assert "no run.json or results.json at the checkpoint: give --task too" in refusal(
        capsys, evaluate.main, str(tmp_path)
    )
    found = evaluate.main([str(tmp_path), "--task", "frequency", "--eval_rows", "64", "--split", "validation"])
    assert found["rows"] == 64
    assert (tmp_path / "steps-read-validation.png").stat().st_size > 10_000


ADDING = ["--task", "adding", "--hidden_size", "8", "--eval_rows", "64", "--per_device_train_batch_size", "16"]


def adding(folder, steps):
    options = ["--max_steps", str(steps), "--save_steps", "20", "--eval_steps", "20", "--logging_steps", "10"]
    return [*ADDING, *options, "--lr_scheduler_type", "constant", "--output_dir", str(folder), *QUIET]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Killed without warning in the middle, the same command ends with the weights of a run that was left alone."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *adding(killed, 400)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not any(killed.glob(f"checkpoint-*/{COMPLETE}")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    checkpoint = last_complete_checkpoint(killed)
    at = int(checkpoint.rsplit("-", 1)[1])
    assert 20 <= at < 400
    end = at + 30
    done = run("train.py", *adding(killed, end))
    assert f"Going on from {checkpoint}." in done.stdout
    results = json.loads((killed / "results.json").read_text())
    assert results["train"]["resumed_from"] == checkpoint
    assert results["train"]["steps"] == end
    train.main(adding(whole, end))
    ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


def launch(config, *options):
    """accelerate launch with a file of scripts/accelerate, not waited for."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / config)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_train_on_an_endless_task(tmp_path, machines):
    """Two machines: this one twice."""
    training = [str(SCRIPTS / "train.py"), *adding(tmp_path, 20), "--ddp_find_unused_parameters", "false"]
    if machines == 1:
        launched = [launch("cpu.yaml", *training)]
    else:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = str(unused.getsockname()[1])
        meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        options = [*meeting, "--num_processes", "2", "--mixed_precision", "no"]
        launched = [launch("multi_node.yaml", *options, "--machine_rank", rank, *training) for rank in "01"]
    for process in launched:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    two = json.loads((tmp_path / "results.json").read_text())
    assert two["processes"] == 2
    alone = train.main([*adding(tmp_path / "alone", 20), "--per_device_train_batch_size", "32"])
    for name in ("loss", "mse", "updates", "update_rate"):  # the same rows, split over two processes
        assert two["metrics"]["test"][name] == pytest.approx(alone["metrics"]["test"][name], rel=1e-4)


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launcher_is_understood_and_its_command_is_one(path):
    """accelerate refuses keys that it does not know; the command in the head names a task that there is."""
    config = load_config_from_file(str(path))
    command = re.sub(r"\\\n# +", "", path.read_text())
    (arguments,) = re.findall(r"^#   accelerate launch (.*)$", command, re.MULTILINE)
    launch, script, options = arguments.partition(" scripts/train.py ")
    assert script
    parsed = launch_command_parser().parse_args([*launch.split(), "scripts/train.py"])
    assert Path(parsed.config_file) == path.relative_to(SCRIPTS.parent)
    assert train.parse([*options.split(), "--use_cpu", "true"]).task.name in TASKS
    assert config.num_machines <= config.num_processes


def test_the_demo_trains_reloads_and_compares(tmp_path):
    done = run(
        "demo.py", "--output_dir", str(tmp_path), "--max_steps", "20", "--eval_steps", "20", "--save_steps", "20"
    )
    lines = done.stdout.splitlines()
    skip = json.loads((tmp_path / "skip-lstm/results.json").read_text())["metrics"]["test"]
    reloaded = f"loaded in a new process: accuracy {skip['accuracy']:.1%}, {skip['updates']:.1f} pixels read"
    assert reloaded in lines
    table = {line.split("  ")[0]: line.split() for line in lines[-7:]}
    assert table["Skip LSTM"][-3] == f"{skip['updates']:.1f}"
    assert table["plain LSTM"][-3] == "64.0"
    strided = json.loads((tmp_path / "strided-lstm/results.json").read_text())
    assert (strided["model"]["gate"], strided["metrics"]["test"]["updates"]) == ("strided", 32.0)
    random = json.loads((tmp_path / "random-lstm/results.json").read_text())
    assert random["model"]["gate"] == "random"
    assert random["metrics"]["test"]["updates"] == pytest.approx(skip["updates"], abs=1.5)
    assert (tmp_path / "skip-lstm/steps-read-test.png").is_file()


CHECKPOINT = CARDS / "skip-lstm-digits"


def test_a_checkpoint_is_fine_tuned(tmp_path, capsys):
    start = ["--task", "digits", "--model_name_or_path", str(CHECKPOINT), "--budget_target", "0.3"]
    settings = train.parse([*start, "--output_dir", str(tmp_path), *QUIET])
    held = SkipRNNConfig.from_pretrained(CHECKPOINT)
    assert settings.config.hidden_size == held.hidden_size != 16
    assert settings.config.budget_target == 0.3 != held.budget_target
    steps = ["--max_steps", "1", "--learning_rate", "0", "--per_device_train_batch_size", "4"]
    results = train.main([*start, *steps, "--output_dir", str(tmp_path), *QUIET])
    assert results["start"] == {"model_name_or_path": str(CHECKPOINT)}
    assert f"The weights started from `{CHECKPOINT.name}`." in render_card(tmp_path, "runs/digits")
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    anew = refusal(capsys, train.main, "--task", "digits", "--output_dir", str(tmp_path), *QUIET)
    assert "model_name_or_path was" in anew


def test_a_checkpoint_of_other_labels_gets_a_new_classifier_and_one_of_another_shape_is_refused(capsys):
    settings = train.parse(["--task", "frequency", "--model_name_or_path", str(CHECKPOINT), *QUIET])
    model = train.model_of(settings.start, settings.task, settings.config)
    before, after = load_file(CHECKPOINT / "model.safetensors"), model.state_dict()
    changed = [name for name in after if after[name].shape != before[name].shape]
    assert changed == [name for name in after if not torch.equal(after[name], before.get(name, after[name][:0]))]
    assert model.config.num_labels == 2
    assert {name.split(".")[0] for name in changed} == {"classifier"}
    for options in (["--task", "adding"], ["--task", "digits", "--hidden_size", "3"]):
        said = refusal(capsys, train.parse, *options, "--model_name_or_path", str(CHECKPOINT), *QUIET)
        assert "does not fit this task or these options: it has" in said


def test_mnist_trains_from_a_local_folder(shared_data, tmp_path):
    options = ["--task", "mnist", "--dataset_name", str(shared_data("mnist")), "--hidden_size", "8", "--max_steps", "2"]
    settings = train.parse([*options, "--output_dir", str(tmp_path), "--per_device_train_batch_size", "4", *QUIET])
    rows = settings.task.load(0)
    out = SkipRNNForSequenceClassification(settings.config)(**settings.task.collate([rows.test[i] for i in range(4)]))
    assert out.logits.shape == (4, 10)
    assert out.num_updates.max() <= 784
