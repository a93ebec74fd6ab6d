"""The settings of a training: those of a recipe, overridden by the command line."""

import dataclasses
import itertools
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from hf_skiprnn import SkipRNNConfig
from hf_skiprnn.tasks import TASKS, Task
from hf_skiprnn.training.callbacks import BudgetArguments, StoppingArguments
from hf_skiprnn_cli import did_you_mean

from .option_parser import OptionParser, model_arguments
from .recipe_files import RECIPES, as_options, read_recipe

DESCRIPTION = """Train a Skip RNN on a task.

    hf-skiprnn train --task digits
    hf-skiprnn train --config adding-skip-lstm-paper --seed 1 --output_dir runs/adding-1
    hf-skiprnn train --dataset_name HUB_ID_OR_FOLDER --label_column NAME
    hf-skiprnn train --task mnist --model_name_or_path model_cards/skip-lstm-mnist --shift 1    # fine-tune

`--task NAME` is short for `--config NAME-skip-lstm`; with neither, `--dataset_name` trains on your own data. A recipe
sets options of the task, the model and the training; options on the command line override it.

After an interruption, the same command resumes from the last complete checkpoint in `output_dir`. At the end that
folder holds the model, its processor, results.json and a picture of the steps read.
"""
STEERING_STEPS = 25  # largest logging_steps with --steered_update_rate, which changes lambda at every log
LENGTH = ("num_train_epochs", "max_steps")  # options that say how long to train
DIAL_LENGTH = 2  # a --dial trains for so many times as long as our recipes say, as it learns many shares
# Settings of a recipe that --target_update_rate and --steered_update_rate replace.
STEERED = ("budget_loss", "budget_target", "budget_weight", "budget_warmup_steps", "update_bias")
# Options that replace a recipe's --target_update_rate; so do a --gate that is not learned, and a --dial without it.
OWN_BUDGET = ("budget_weight", "budget_loss", "budget_target", "budget_warmup_steps", "steered_update_rate")
# Fields of SkipRNNConfig that decide the shapes of a checkpoint's parameters.
SHAPE = (
    *("cell_type", "gru_reset", "input_size", "hidden_size", "num_hidden_layers", "vocab_size"),
    "learn_initial_state",
)


OPERATING_POINT = (
    *("gate_shift", "gate_noise", "gate_calibration", "gate_gradient"),
    *("budget_loss", "budget_weight", "budget_target", "budget_slope"),
)


@dataclasses.dataclass
class StartArguments:
    """The option that chooses the initial weights."""

    model_name_or_path: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Fine-tune this checkpoint (a folder or Hub id). Its shape, weights and processor are kept; other "
            "settings come from the recipe. The classifier is new if the classes differ."
        },
    )


class Settings(NamedTuple):
    """All settings of a run."""

    start: StartArguments
    task: Task
    config: SkipRNNConfig
    args: TrainingArguments
    chosen: dict[str, Any]  # TrainingArguments set by the recipe or on the command line
    budget: BudgetArguments
    stopping: StoppingArguments


def parse(argv: list[str]) -> Settings:
    """Return the recipe's settings, overridden by the command line.

    Raises:
        SystemExit: an option is unknown, out of its range or contradicts another; the message says what to do.
    """
    first = first_parser()
    path, rest = recipe_of(first, argv)
    recipe = fitted(read_recipe(path), rest)
    task_class = TASKS[recipe.pop("task")]
    groups: dict[str, Any] = {
        f"task {task_class.name}": task_class,
        "model": model_arguments(),
        "budget": BudgetArguments,
        "start and end": StartArguments,
        "when to stop": StoppingArguments,
        "training (transformers.TrainingArguments)": TrainingArguments,
    }
    parser = OptionParser(groups, usage="hf-skiprnn train [options]", parents=[first], description=DESCRIPTION)
    parser.set_defaults(
        output_dir=str(Path("runs", path.name.replace(".yaml", "").replace(":", "-"))),
        remove_unused_columns=False,  # collators pick their columns
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    names = [field.name for part in groups.values() for field in dataclasses.fields(part) if field.init]
    options = [*as_options(recipe, names, path), *rest]
    try:
        task, model, budget, start, stopping, args, _, unknown = parser.parse_args_into_dataclasses(
            options, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # a dataclass refuses a value
        parser.error(str(error))
    if unknown:
        near = did_you_mean(unknown[0].partition("=")[0].lstrip("-"), names)
        parser.error(f"unknown: {' '.join(unknown)}.{near} --task {task_class.name} --help lists every option")
    # A recipe of the user's own says how long.
    is_ours = path.resolve().parent == RECIPES.resolve() or (RECIPES / f"{path}.yaml").is_file()
    if given(rest, "dial") and is_ours and not any(given(rest, name) for name in LENGTH):
        args.num_train_epochs *= DIAL_LENGTH
        args.max_steps *= DIAL_LENGTH if args.max_steps > 0 else 1
    if any(value is not None for value in (budget.target_update_rate, budget.dial, budget.steered_update_rate)):
        if budget.steered_update_rate is None and (own := [name for name in OWN_BUDGET if given(rest, name)]):
            name = "dial" if budget.dial else "target_update_rate"
            parser.error(f"--{own[0]} and --{name} both set the budget: give one of them.")
        if args.load_best_model_at_end and given(rest, "load_best_model_at_end"):
            parser.error("--load_best_model_at_end: the best checkpoint may read another share of steps. Leave it out.")
        prepare_steering(args, at_logs=budget.steered_update_rate is not None)
    fields = {name: value for name, value in dataclasses.asdict(model).items() if value is not None}
    return Settings(start, task, config_of(start, task, fields), args, chosen_of(args, options), budget, stopping)


def first_parser() -> ArgumentParser:
    """Return the parser of --task and --config, which decide what other options exist."""
    first = ArgumentParser(prog="hf-skiprnn train", add_help=False, allow_abbrev=False)
    first.add_argument("--task", choices=sorted(TASKS), help="task; short for --config TASK-skip-lstm")
    first.add_argument(
        "--config", type=Path, help="recipe: its name, a YAML file, or FILE.yaml:ROW of a file with several"
    )
    return first


def recipe_of(first: ArgumentParser, argv: list[str]) -> tuple[Path, list[str]]:
    """Return (path of the chosen recipe, the other options)."""
    named, rest = first.parse_known_args(argv)
    if named == Namespace(task=None, config=None) and given(rest, "dataset_name"):
        named.task = "own_data"
    if (named.task is None) == (named.config is None):
        first.error(
            f"give either --task ({', '.join(sorted(TASKS))}) or --config RECIPE; "
            "for your own data, --dataset_name DATA"
        )
    return named.config or RECIPES / f"{named.task}-skip-lstm.yaml", rest


def given(options: list[str], name: str) -> bool:
    """Return whether the option --NAME is among `options`."""
    return any(option.partition("=")[0] in (f"--{name}", f"--{name.replace('_', '-')}") for option in options)


def fitted(recipe: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """Return the recipe without the settings that an option replaces."""
    left_out: set[str] = set()
    if any(given(options, name) for name in ("target_update_rate", "dial", "steered_update_rate")):  # they find lambda
        left_out |= set(STEERED)
    is_learned = ("--gate", "learned") in itertools.pairwise(options) or "--gate=learned" in options
    if any(given(options, name) for name in OWN_BUDGET) or (given(options, "gate") and not is_learned):
        left_out.add("target_update_rate")
    if given(options, "dial") and not in_dial(recipe.get("target_update_rate"), options):
        left_out.add("target_update_rate")
    if given(options, "model_name_or_path"):  # the shape is the checkpoint's
        left_out |= set(SHAPE)
    if given(options, "num_train_epochs"):  # max_steps would win
        left_out.add("max_steps")
    return {name: value for name, value in recipe.items() if name not in left_out}


def in_dial(target: float | None, options: list[str]) -> bool:
    """Return whether a recipe's target lies in the range that --dial gives; True where the range is not two numbers."""
    try:
        low, high = map(float, options[options.index("--dial") + 1 :][:2])
    except ValueError:  # the parser tells it
        return True
    return target is not None and low <= target <= high


def chosen_of(args: TrainingArguments, options: list[str]) -> dict[str, Any]:
    """Return the training arguments that the recipe or the command line sets."""
    names = {option[2:].split("=")[0].replace("-", "_").removeprefix("no_") for option in options if option[:2] == "--"}
    return {name: value for name, value in args.to_dict().items() if name in names}


def prepare_steering(args: TrainingArguments, at_logs: bool) -> None:
    """Keep the last checkpoint, as the best may have another update rate; log often if logs change lambda."""
    args.load_best_model_at_end = False
    if at_logs and not 1 <= args.logging_steps <= STEERING_STEPS:
        args.logging_steps = STEERING_STEPS


def config_of(start: StartArguments, task: Task, fields: dict[str, Any]) -> SkipRNNConfig:
    """Return the task's config with the chosen fields; a checkpoint that is fine-tuned keeps its shape."""
    if start.model_name_or_path is None:
        return SkipRNNConfig(**(task.model_defaults() | fields))
    task.use_processor(start.model_name_or_path)
    fresh = SkipRNNConfig()  # the operating point and the budget are this training's, not the checkpoint's
    point = {name: getattr(fresh, name) for name in OPERATING_POINT}
    defaults = task.model_defaults()
    if "vocab_size" in defaults:  # the size of embeddings is the model's own, not the data's
        defaults.pop("input_size")
    config = SkipRNNConfig.from_pretrained(start.model_name_or_path, **(point | defaults | fields))
    held = SkipRNNConfig.from_pretrained(start.model_name_or_path)
    if others := [name for name in SHAPE if getattr(held, name) != getattr(config, name)]:
        raise SystemExit(
            f"{start.model_name_or_path} does not fit this task or these options: it has "
            f"{', '.join(f'{name} {getattr(held, name)!r}' for name in others)}; wanted "
            f"{', '.join(repr(getattr(config, name)) for name in others)}."
        )
    return config
