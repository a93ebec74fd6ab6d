"""The files that describe a run: run.json (its settings) and results.json (its results).

A checkpoint may come from an untrusted source. So only two things are read from its files: the name of a known task,
and values for that task's own options, whose types are checked. Everything else in the files is ignored.
"""

import dataclasses
import json
import platform
import re
import shlex
import sys
import types
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers.utils import logging

from hf_skiprnn import __version__
from hf_skiprnn.evaluation.metrics import operation_counts
from hf_skiprnn.hub.card import HUB_ID
from hf_skiprnn.tasks import TASKS
from hf_skiprnn.training.provenance import cpu_name
from hf_skiprnn.training.trainer import SkipRNNTrainer

from .option_parser import model_arguments
from .train_options import LENGTH, Settings

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"  # in output_dir; a run can only be resumed with the same settings
RESULTS = "results.json"
WRITTEN_TO = ("cache_folder",)  # task options that name a folder to write to: never taken from a checkpoint's files
# Training arguments that a resumed run cannot change: its state on the disk continues with the old ones, or they mix.
DEFINING = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "weight_decay", "max_grad_norm", "label_smoothing_factor"),
)
OF_TRAINING = ("train", "commit", "command", "device", "processes", "versions", "finished")  # facts in results.json
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


def describe(settings: Settings) -> dict[str, Any]:
    """Return the settings that define a run: the content of run.json."""
    arguments = settings.args.to_dict()
    options = dataclasses.asdict(settings.task)
    if (data := options.get("dataset_name")) and Path(data).exists():
        options["dataset_name"] = str(Path(data).resolve())  # "data/mine" would look like an id of the Hub
    return {
        "task": settings.task.name,
        "start": dataclasses.asdict(settings.start),
        "task_options": options,
        "model": model_fields(settings.config),
        "training": {name: arguments.get(name) for name in (*DEFINING, *LENGTH)},
        "budget": dataclasses.asdict(settings.budget),
    }


def model_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config that are options of the command line."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(model_arguments())}


def check_run(folder: Path, run: dict[str, Any]) -> list[str]:
    """Return the commits that trained the run in the folder so far; [] if there is none.

    Raises:
        SystemExit: the folder holds checkpoints of a run with other settings; the message lists the differences.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return []
    before = read_object(path)
    may_change = LENGTH if run["training"]["lr_scheduler_type"].startswith("constant") else ()
    changes = [
        f"{name} was {before.get(group, {}).get(name)!r} and is now {value!r}"
        for group in ("start", "task_options", "model", "training", "budget")
        for name, value in run[group].items()
        if before.get(group, {}).get(name) != value
        if group != "training" or (name in before.get(group, {}) and name not in may_change)  # older files have fewer
    ]
    if before.get("task") != run["task"]:
        changes.insert(0, f"the task was {before.get('task')} and is now {run['task']}")
    if changes:
        raise SystemExit(
            f"{folder} holds another run: {'; '.join(changes)}. To go on with it, give it the old values. To train a "
            "new model, choose another --output_dir, or delete that folder."
        )
    return list(before.get("commits", []))


def results_of(
    settings: Settings, trainer: SkipRNNTrainer, train: dict[str, Any], test: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate on the validation split, and return the content of results.json."""
    args, config = settings.args, trainer.accelerator.unwrap_model(trainer.model).config
    validation = plain_names(trainer.evaluate(metric_key_prefix="validation"))
    return {
        **describe(settings),
        "model": model_fields(config),  # with what training set: the budget and the operating point
        "training": settings.chosen | {"seed": args.seed},
        "metrics": {"validation": validation, "test": test},
        "multiply_accumulates": operation_counts(config, test),
        "train": train,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else cpu_name(),
        "processes": args.world_size,
        "versions": {name: version(name) for name in PACKAGES}
        | {"hf_skiprnn": __version__, "python": platform.python_version()},
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def facts_before(folder: Path) -> dict[str, Any]:
    """Return the facts about the training in a folder's results.json, if there is one."""
    if not (folder / RESULTS).is_file():
        return {}
    before = read_object(folder / RESULTS)
    return {name: before[name] for name in OF_TRAINING if name in before}


def command_line() -> str:
    """Return the command line of this process, quoted so that it can be pasted into a shell."""
    program = Path(sys.argv[0])
    if program.stem == "hf-skiprnn":
        return shlex.join([program.stem, *sys.argv[1:]])
    return shlex.join(["python", *sys.orig_argv[1:]])


def plain_names(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics without Trainer's prefix and without its speeds, which say nothing about the model."""
    return {
        name.split("_", 1)[1]: value for name, value in metrics.items() if "_" in name and "_per_second" not in name
    }


def run_of(checkpoint: str | None) -> tuple[str | None, dict[str, Any]]:
    """Return (task, task options) of the run that a checkpoint folder belongs to; (None, {}) if no file tells them.

    They come from the folder's run.json or results.json, or, for a folder checkpoint-N, from run.json beside it.

    Raises:
        ValueError: a file does not hold a JSON object, or holds an option of the wrong type.
    """
    folder = Path(checkpoint or "")
    found = [folder / RUN_FILE, folder / RESULTS]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        found.insert(1, folder.parent / RUN_FILE)
    path = next((path for path in found if checkpoint and path.is_file()), None)
    if path is None:
        return None, {}
    run = read_object(path)
    task = run.get("task")
    if not isinstance(task, str) or task not in TASKS:
        return None, {}
    options = task_options(task, run.get("task_options"), path)
    if path.name == RESULTS and (data := options.get("dataset_name")) and is_elsewhere(data):
        options.pop("dataset_name")
        what = "%s names the data %s, which are not here: give --dataset_name, or the default of task %s is used."
        logger.warning(what, path, data, task)
    return task, options


def is_elsewhere(data: str) -> bool:
    """Return whether results name a data folder of another machine: it is not here, and no id of the Hub.

    Published results keep only the last part of an absolute path.
    """
    return "/" not in data or (not re.fullmatch(HUB_ID, data) and not Path(data).exists())


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ValueError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def task_options(task: str, found: Any, path: Path) -> dict[str, Any]:
    """Return the values of a task's own options that a file holds; ignore everything else in it.

    Raises:
        ValueError: a value does not have the type of its option.
    """
    held = found if isinstance(found, dict) else {}
    hints: dict[str, Any] = get_type_hints(TASKS[task])
    names = [field.name for field in dataclasses.fields(TASKS[task]) if field.init and field.name not in WRITTEN_TO]
    for name in names:
        if name in held and not fits(held[name], hints[name]):
            raise ValueError(f"{path}: option {name} of task {task} must be {hints[name]}; got {held[name]!r}.")
    return {name: held[name] for name in names if name in held}


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value from a JSON file has the type that a field is annotated with."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    if origin is list:
        return isinstance(value, list) and all(fits(part, get_args(annotation)[0]) for part in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)
