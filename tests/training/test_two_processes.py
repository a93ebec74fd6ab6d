"""Training in two gloo processes equals training in one: numbers, rows read by each process, and sharded weights."""

import importlib
import json
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from paths import SCRIPTS
from small_trainers import new_trainer, rows, summed_cross_entropy
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hf_skiprnn import SkipRNNForSequenceClassification
from hf_skiprnn.training.callbacks import BudgetController

HERE = Path(__file__).parent
LAUNCHERS = SCRIPTS / "accelerate"
OVER_GLOO = ["--num_processes", "2", "--mixed_precision", "no"]  # options for a machine without a GPU


def streamed(shards):
    return {"train_dataset": rows().to_iterable_dataset(num_shards=shards)}


# The trainings that two processes run: functions that return the arguments of new_trainer.
RUNS = {
    "plain": dict,
    "smoothed": lambda: {"label_smoothing_factor": 0.1},
    "own-loss": lambda: {"trainer_kwargs": {"compute_loss_func": summed_cross_entropy}},
    "controlled": lambda: {"trainer_kwargs": {"callbacks": [BudgetController(0.4)]}},
    "streamed": lambda: {"trainer_kwargs": streamed(1), "max_steps": 6},
    "streamed-controlled": lambda: {
        "trainer_kwargs": streamed(4) | {"callbacks": [BudgetController(0.4)]},
        "max_steps": 6,
    },
}
# Here every process reads its own part of the stream. Batches differ from one process's, so only the rows are compared.
SHARDED = {
    f"sharded-{shards}": lambda shards=shards: {
        "trainer_kwargs": streamed(shards),
        "max_steps": 3,
        "accelerator_config": {"dispatch_batches": False},
    }
    for shards in (1, 4)
}
FSDP = {name: RUNS[name] for name in ("plain", "controlled")}


def launch(config, script, folder):
    """Run a script in two gloo processes with a file of scripts/accelerate, and wait for its end."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / config)]
    with socket.socket() as free:  # two workers of pytest may launch at the same time: not the default port
        free.bind(("127.0.0.1", 0))
        command += ["--main_process_port", str(free.getsockname()[1])]
    done = subprocess.run(
        [*command, *OVER_GLOO, str(HERE / script), str(folder)],
        timeout=900,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def gathered(tensor):
    """Return the whole tensor, of which every process may hold a shard."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Notes(TrainerCallback):
    """Records the gradients of every step and the numbers of its rows, which are their first values."""

    def __init__(self):
        self.gradients, self.rows = [], [[]]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([gathered(p.grad).flatten() for p in model.parameters()]).tolist())
        self.rows.append([])

    def watch(self, trainer):
        step = trainer.training_step

        def noted(model, inputs, *args):
            self.rows[-1] += inputs["input_values"][:, 0, 0].tolist()
            return step(model, inputs, *args)

        trainer.training_step = noted
        trainer.add_callback(self)
        return self


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Run name -> results of two gloo processes: [process 0, process 1]."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch("multi_gpu.yaml", "two_processes.py", folder)
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for name in (*RUNS, *SHARDED, "streams")
    }


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """The folder with the results of two gloo processes that trained with sharded weights."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch("fsdp.yaml", "fsdp_processes.py", folder)
    return folder


def on_one_process(folder, name):
    """Run a training with batches of double size in this process; return (trainer, its notes, metrics)."""
    trainer = new_trainer(folder, **({"per_device_train_batch_size": 8} | RUNS[name]()))
    notes = Notes().watch(trainer)
    trainer.train()
    return trainer, notes, trainer.evaluate()


def assert_same_training(process, trainer, notes, metrics):
    """Check that a process has the same logs, metrics, lambda, gradients and weights as a single process."""
    assert process["world_size"] == 2
    assert process["budget_weight"] == pytest.approx(trainer.model.config.budget_weight, rel=1e-9)
    logs = [[log for log in logs if "task_loss" in log] for logs in (trainer.state.log_history, process["logs"])]
    assert len(logs[0]) == 3
    for log, other in zip(*logs, strict=True):
        for key in ("loss", "task_loss", "budget_loss", "updates", "update_rate"):
            assert other[key] == pytest.approx(log[key], rel=1e-6), key
    for key in ("loss", "task_loss", "budget_loss", "updates", "updates_std", "updates_p20", "update_rate"):
        assert process["metrics"][f"eval_{key}"] == pytest.approx(metrics[f"eval_{key}"], rel=1e-6), key
    for gradient, other in zip(notes.gradients, process["gradients"], strict=True):
        np.testing.assert_allclose(other, gradient, rtol=1e-6, atol=1e-8)  # transformers smooths in float32
    for parameter, values in zip(trainer.model.parameters(), process["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), parameter.data, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(two_processes, tmp_path, name):
    """Logs, gradients, weights, lambda and metrics equal those of one process with batches of double size."""
    theirs = two_processes[name]
    trainer, notes, metrics = on_one_process(tmp_path, name)
    for process in theirs:
        assert process["rows"] == 11
        assert_same_training(process, trainer, notes, metrics)
    assert theirs[0]["budget_weight"] == theirs[1]["budget_weight"]
    assert theirs[0]["weights"] == theirs[1]["weights"]  # to the bit
    for ours_read, *both in zip(notes.rows, theirs[0]["read"], theirs[1]["read"], strict=True):
        assert sorted(both[0] + both[1]) == sorted(ours_read)


@pytest.mark.parametrize("name", FSDP)
def test_two_processes_with_sharded_weights_equal_one(fsdp, tmp_path, name):
    trainer, notes, metrics = on_one_process(tmp_path, name)
    theirs = [json.loads((fsdp / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    for process in theirs:
        assert process["type"] == "FSDP"
        assert_same_training(process, trainer, notes, metrics)
    sizes = [parameter.numel() for parameter in trainer.model.parameters()]
    assert [sum(shards) for shards in zip(*(process["shards"] for process in theirs), strict=True)] == sizes
    saved = SkipRNNForSequenceClassification.from_pretrained(fsdp / name / "model")
    assert [parameter.tolist() for parameter in saved.parameters()] == theirs[0]["weights"]


def test_sharded_weights_resume_to_the_bit(fsdp):
    for rank in (0, 1):
        ends = json.loads((fsdp / f"ends-{rank}.json").read_text())
        assert ends["whole"] == ends["resumed"]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_streams_neither_overlap_nor_lose_rows(two_processes, name):
    """Two processes, which each read their part of a stream of 24 rows, together read every row once."""
    first, second = ([row for step in process["read"] for row in step] for process in two_processes[name])
    assert len(first) == len(second) == 12
    assert sorted(first + second) == sorted(row["input_values"][0][0] for row in rows())


def test_an_evaluated_stream_counts_every_row_once_or_is_refused(two_processes, tmp_path):
    metrics = new_trainer(tmp_path).evaluate()
    for dealt_out, read_by_each in two_processes["streams"]:
        for key in ("loss", "updates", "updates_std", "update_rate"):
            assert dealt_out[f"eval_{key}"] == pytest.approx(metrics[f"eval_{key}"], rel=1e-9), key
        assert read_by_each.startswith("With dispatch_batches=False, a stream does not tell")


def test_two_processes_on_a_cpu_are_those_of_several_gpus():
    """cpu.yaml equals multi_gpu.yaml with the options that these tests use."""
    cpu, gpus = (yaml.safe_load((LAUNCHERS / name).read_text()) for name in ("cpu.yaml", "multi_gpu.yaml"))
    del gpus["gpu_ids"]
    assert cpu == gpus | {"num_processes": 2, "mixed_precision": "no"}


def test_deepspeed_understands_its_launcher(monkeypatch, tmp_path):
    """A dry run: accelerate reads the file, and DeepSpeed, if it is installed, parses it."""
    environment = {}

    def note(arguments):
        environment.update(prepare_deepspeed_cmd_env(arguments)[1])

    monkeypatch.setattr(accelerate_launch, "deepspeed_launcher", note)
    file = str(LAUNCHERS / "deepspeed.yaml")
    arguments = accelerate_launch.launch_command_parser().parse_args(
        ["--config_file", file, "--main_process_port", "0", "train.py"]
    )
    accelerate_launch.launch_command(arguments)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    config = DeepSpeedPlugin().hf_ds_config.config
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"  # the Trainer fills them in
    if find_spec("deepspeed") is not None:  # not a dependency of the tests: it is large and needs a GPU
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
        filled = HfTrainerDeepSpeedConfig(config)
        filled.trainer_config_process(TrainingArguments(str(tmp_path), use_cpu=True, **settings))
        parsed = importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig(filled.config)
        assert (parsed.zero_optimization_stage, parsed.train_batch_size, parsed.gradient_clipping) == (2, 8, 0.5)
