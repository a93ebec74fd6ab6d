"""Trainings that are killed, that run in two processes, and the files of accelerate that start them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from paths import SCRIPTS
from safetensors.torch import load_file

from hf_skiprnn.commands import train
from hf_skiprnn.tasks import TASKS
from hf_skiprnn.training.checkpoints import COMPLETE, last_complete_checkpoint

LAUNCHERS = SCRIPTS / "accelerate"
QUIET = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu"]
ADDING = ["--task", "adding", "--hidden_size", "8", "--eval_rows", "64", "--per_device_train_batch_size", "16"]


def adding(folder, steps):
    options = ["--max_steps", str(steps), "--save_steps", "20", "--eval_steps", "20", "--logging_steps", "10"]
    return [*ADDING, *options, "--lr_scheduler_type", "constant", "--output_dir", str(folder), *QUIET]


def test_a_killed_run_goes_on_where_it_was(tmp_path, capsys):
    """After a kill, the same command ends with the same weights as an uninterrupted run."""
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
    train.main(adding(killed, end))
    assert f"Going on from {checkpoint}." in capsys.readouterr().out
    results = json.loads((killed / "results.json").read_text())
    assert results["train"]["resumed_from"] == checkpoint
    assert results["train"]["steps"] == end
    train.main(adding(whole, end))
    ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


def launch(config, *options):
    """Start `accelerate launch` with a file of scripts/accelerate, without waiting for it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / config)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_two_machines_train_on_an_endless_task(tmp_path):
    """Two processes on this machine stand for two machines."""
    training = [str(SCRIPTS / "train.py"), *adding(tmp_path, 20), "--ddp_find_unused_parameters", "false"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    options = [*meeting, "--num_processes", "2", "--mixed_precision", "no"]
    for process in [launch("multi_node.yaml", *options, "--machine_rank", rank, *training) for rank in "01"]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    two = json.loads((tmp_path / "results.json").read_text())
    assert two["processes"] == 2
    alone = train.main([*adding(tmp_path / "alone", 20), "--per_device_train_batch_size", "32"])
    for name in ("loss", "mse", "updates", "update_rate"):  # the same rows, split over two processes
        assert two["metrics"]["test"][name] == pytest.approx(alone["metrics"]["test"][name], rel=1e-4)


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launcher_is_understood_and_its_command_is_one(path):
    """accelerate knows all keys of the file, and the command in its first comment is valid."""
    config = load_config_from_file(str(path))
    command = re.sub(r"\\\n# +", "", path.read_text())
    (arguments,) = re.findall(r"^#   accelerate launch (.*)$", command, re.MULTILINE)
    launch, script, options = arguments.partition(" scripts/train.py ")
    assert script
    parsed = launch_command_parser().parse_args([*launch.split(), "scripts/train.py"])
    assert Path(parsed.config_file) == path.relative_to(SCRIPTS.parent)
    assert train.parse([*options.split(), "--use_cpu", "true"]).task.name in TASKS
    assert config.num_machines <= config.num_processes
