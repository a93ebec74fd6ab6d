"""Train a Skip RNN on a task.

    python scripts/train.py --task digits
    python scripts/train.py --config scripts/recipes/adding-skip-lstm-paper.yaml --seed 1 --output_dir runs/adding-1
    python scripts/train.py --dataset_name HUB_ID_OR_FOLDER --label_column NAME
    python scripts/train.py --task mnist --model_name_or_path model_cards/skip-lstm-mnist --shift 1    # fine-tune

`--task NAME` is short for `--config scripts/recipes/NAME-skip-lstm.yaml`; without either, `--dataset_name` is for own
data. A recipe sets options of the task, fields of SkipRNNConfig and of TrainingArguments; the command line wins over
it. `--task NAME --help` lists all options of a task.

The same command again, after a kill, goes on from the last complete checkpoint in `output_dir`. There, at the end, are
the model, its image processor and results.json.
"""

import dataclasses
import difflib
import json
import platform
import shlex
import sys
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import yaml
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed

from hf_skiprnn import (
    SkipRNNConfig,
    SkipRNNForFrameClassification,
    SkipRNNForSequenceClassification,
    __version__,
)
from hf_skiprnn.evaluation.metrics import operation_counts
from hf_skiprnn.hub.card import data_fingerprint
from hf_skiprnn.tasks import TASKS, Task
from hf_skiprnn.training.callbacks import BudgetArguments, BudgetController, StoppingArguments, StopWhenSettled
from hf_skiprnn.training.checkpoints import last_complete_checkpoint
from hf_skiprnn.training.provenance import commit, cpu_name
from hf_skiprnn.training.trainer import SkipRNNTrainer

RECIPES = Path(__file__).parent / "recipes"
RUN_FILE = "run.json"  # what a run in output_dir is made of; a resumed run must be made of the same
STEERING_STEPS = 25
UNSTEERED = ("budget_loss", "budget_target", "budget_weight")  # of a recipe, where --target_update_rate steers instead
# Of SkipRNNConfig: what a checkpoint's parameters have the shape of.
SHAPE = (
    "cell_type",
    "gru_reset",
    "input_size",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "learn_initial_state",
)
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


@dataclasses.dataclass
class StartArguments:
    """Where weights start."""

    model_name_or_path: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Fine-tune this checkpoint (a folder or Hub id): its shape, weights and processor, the recipe's "
            "other settings, and a new classifier where the number of labels differs."
        },
    )


class Settings(NamedTuple):
    """A run."""

    start: StartArguments
    task: Task
    config: SkipRNNConfig
    args: TrainingArguments
    chosen: dict[str, Any]  # TrainingArguments set by the recipe or on the command line
    budget: BudgetArguments
    stopping: StoppingArguments


def parse(argv: list[str]) -> Settings:
    """The recipe's settings with the command line's over them. Exits with a message at anything unknown."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", choices=sorted(TASKS), help="task; short for --config recipes/TASK-skip-lstm.yaml")
    first.add_argument(
        "--config",
        type=Path,
        help="recipe: its name, or a YAML file, or FILE.yaml:ROW of a file with several (scripts/paper)",
    )
    named, rest = first.parse_known_args(argv)
    if named == Namespace(task=None, config=None) and any(o.partition("=")[0] == "--dataset_name" for o in rest):
        named.task = "own_data"
    if (named.task is None) == (named.config is None):
        first.error(f"give either --task ({', '.join(sorted(TASKS))}) or --config RECIPE.yaml")
    path = named.config or RECIPES / f"{named.task}-skip-lstm.yaml"
    recipe = read_recipe(path)
    task_class = TASKS[recipe.pop("task")]
    if any(option.partition("=")[0] == "--target_update_rate" for option in rest):  # lambda * N, with a lambda to find
        recipe = {name: value for name, value in recipe.items() if name not in UNSTEERED}
    if any(option.partition("=")[0] == "--model_name_or_path" for option in rest):
        recipe = {name: value for name, value in recipe.items() if name not in SHAPE}
    dataclasses_: list[Any] = [StartArguments, task_class, model_arguments()]
    dataclasses_ += [BudgetArguments, StoppingArguments, TrainingArguments]
    parser = HfArgumentParser(dataclasses_, allow_abbrev=False, parents=[first], description=__doc__)
    # Collators pick their columns. Pinned memory serves an accelerator only.
    parser.set_defaults(
        output_dir=str(Path("runs", path.name.replace(".yaml", "").replace(":", "-"))),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    names = [field.name for dataclass in dataclasses_ for field in dataclasses.fields(dataclass) if field.init]
    options = [*as_options(recipe, names, path), *rest]
    start, task, model, budget, stopping, args, _, unknown = parser.parse_args_into_dataclasses(
        options, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}. --task {task_class.name} --help lists every option")
    fields = {name: value for name, value in dataclasses.asdict(model).items() if value is not None}
    given = {option[2:].split("=")[0].replace("-", "_").removeprefix("no_") for option in options if option[:2] == "--"}
    chosen = {name: value for name, value in args.to_dict().items() if name in given}
    if budget.target_update_rate is not None:
        args.load_best_model_at_end = False  # the best one may be from before the rate was reached
        if not 1 <= args.logging_steps <= STEERING_STEPS:  # lambda changes at every log
            args.logging_steps = STEERING_STEPS
    return Settings(start, task, config_of(start, task, fields), args, chosen, budget, stopping)


def config_of(start: StartArguments, task: Task, fields: dict[str, Any]) -> SkipRNNConfig:
    """The config that the task asks for, with the chosen fields; of a checkpoint's shape, if one is fine-tuned."""
    if start.model_name_or_path is None:
        return SkipRNNConfig(**(task.model_defaults() | fields))
    task.use_processor(start.model_name_or_path)
    asked = task.model_defaults() | fields
    config = SkipRNNConfig.from_pretrained(start.model_name_or_path, **asked)
    held = SkipRNNConfig.from_pretrained(start.model_name_or_path)
    if others := [f"{name} {getattr(held, name)!r}" for name in SHAPE if getattr(held, name) != getattr(config, name)]:
        raise SystemExit(
            f"{start.model_name_or_path} does not fit this task or these options: it has {', '.join(others)}; wanted "
            f"{', '.join(repr(getattr(config, other.split()[0])) for other in others)}."
        )
    return config


def model_of(start: StartArguments, task: Task, config: SkipRNNConfig) -> PreTrainedModel:
    """A new model, or the checkpoint's; its classifier is new where its labels are not as many as the task's."""
    kind = SkipRNNForFrameClassification if task.per_frame else SkipRNNForSequenceClassification
    if start.model_name_or_path is not None:
        return kind.from_pretrained(
            start.model_name_or_path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    model = kind(config)
    task.initialise(model)
    return model


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Settings of every row of a file of tables, `base` (a recipe) among them: "table2-skip-lstm-1e-4" -> {...}.

    What a table's `all` holds, every row of it has.
    """
    tables = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        f"{table}-{name}": {"base": rows["base"].format(cell="gru" if "gru" in name else "lstm")}
        | rows.get("all", {})
        | settings
        for table, rows in tables.items()
        for name, settings in rows.items()
        if name not in ("base", "all")
    }


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's settings, `task` among them; `path` is a recipe's name, a file, or FILE.yaml:ROW."""
    if (named := RECIPES / f"{path}.yaml").is_file():
        path = named
    file, colon, name = str(path).rpartition(":")
    if colon and Path(file).is_file():
        rows = rows_of(Path(file))
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            raise SystemExit(f"{file} has no row {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        row = rows[name]
        return read_recipe(RECIPES / f"{row.pop('base')}.yaml") | row
    if not path.is_file():
        raise SystemExit(
            f"There is no recipe {path}. There are: {', '.join(p.name for p in sorted(RECIPES.glob('*')))}"
        )
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or recipe.get("task") not in TASKS:
        raise SystemExit(
            f"{path} must hold settings, and among them `task: NAME` with one of {', '.join(sorted(TASKS))}."
        )
    return recipe


def model_arguments() -> type[Any]:
    """A dataclass of SkipRNNConfig's fields, None where nothing is chosen, for the command line."""
    fields = []
    own = {field.name for field in dataclasses.fields(SkipRNNConfig)} & set(SkipRNNConfig.__annotations__)
    for name, annotation in SkipRNNConfig.__annotations__.items():
        if name not in own:
            continue
        kind = float if float in get_args(annotation) else annotation
        fields.append((name, kind | None, dataclasses.field(default=None, metadata={"help": f"SkipRNNConfig.{name}"})))
    return dataclasses.make_dataclass("ModelArguments", fields)


def as_options(recipe: dict[str, Any], names: list[str], path: Path) -> list[str]:
    """A recipe as command line options: so its values are read as theirs are, 1e-3 (a string in YAML) included."""
    options: list[str] = []
    for key, value in recipe.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise SystemExit(f"{path}: unknown setting {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        if isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        elif value is not None:
            options.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def describe(settings: Settings) -> dict[str, Any]:
    """What a run is made of."""
    start, task, config, args, _, budget, _ = settings
    training = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps")
    return {
        "task": task.name,
        "start": dataclasses.asdict(start),
        "task_options": dataclasses.asdict(task),
        "model": {
            name: getattr(config, name) for name in (field.name for field in dataclasses.fields(model_arguments()))
        },
        "training": {name: getattr(args, name) for name in training},
        "budget": dataclasses.asdict(budget),
    }


def check_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to go on with checkpoints of another run."""
    path = folder / RUN_FILE
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changes = [
        f"{name} was {before.get(group, {}).get(name)!r} and is now {value!r}"
        for group in ("start", "task_options", "model", "training", "budget")
        for name, value in run[group].items()
        if before.get(group, {}).get(name) != value
    ]
    if before.get("task") != run["task"]:
        changes.insert(0, f"the task was {before.get('task')} and is now {run['task']}")
    if changes:
        raise SystemExit(
            f"{folder} holds another run: {'; '.join(changes)}. Choose another --output_dir, or delete that folder."
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def plain_names(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without Trainer's prefix, and without what says nothing of the model."""
    return {
        name.split("_", 1)[1]: value for name, value in metrics.items() if "_" in name and "_per_second" not in name
    }


def results_of(
    settings: Settings, trainer: SkipRNNTrainer, train: dict[str, Any], test: dict[str, Any]
) -> dict[str, Any]:
    """What results.json says."""
    _, _, config, args, chosen, _, _ = settings
    validation = plain_names(trainer.evaluate(metric_key_prefix="validation"))
    return {
        **describe(settings),
        "training": chosen | {"seed": args.seed},
        "metrics": {"validation": validation, "test": test},
        "multiply_accumulates": operation_counts(config, test),
        "train": train,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else cpu_name(),
        "processes": args.world_size,
        "versions": {name: version(name) for name in PACKAGES}
        | {"hf_skiprnn": __version__, "python": platform.python_version()},
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate, save; returns what results.json holds."""
    settings = parse(sys.argv[1:] if argv is None else argv)
    start, task, config, args, _, budget, stopping = settings
    folder, run, code = Path(str(args.output_dir)), describe(settings), commit()
    check_run(folder, run)
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(folder)
    set_seed(args.seed)
    splits = task.load(args.seed if args.data_seed is None else args.data_seed)
    model = model_of(start, task, config)
    callbacks = [*budget.callbacks(), *stopping.callbacks()]
    trainer = SkipRNNTrainer(
        model,
        args,
        data_collator=task.collate,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=task.processor(),
        compute_metrics=task.compute_metrics,
        compute_loss_func=task.loss(),
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        write_json(folder / RUN_FILE, run)
    if checkpoint:
        print(f"Going on from {checkpoint}.", flush=True)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    train = {"steps": outcome.global_step, "seconds": outcome.metrics["train_runtime"], "resumed_from": checkpoint}
    test = plain_names(trainer.evaluate(splits.test, metric_key_prefix="test"))
    results = results_of(settings, trainer, train, test) | {"commit": code}
    for callback in callbacks:
        if isinstance(callback, BudgetController):
            results["steering"] = callback.outcome
        if isinstance(callback, StopWhenSettled):
            results["stopping"] = dataclasses.asdict(stopping) | callback.outcome
    trainer.save_model()
    if trainer.is_world_process_zero():
        results["data"] = data_fingerprint(splits.test, "test")
        write_json(folder / "results.json", results)
    return results


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
