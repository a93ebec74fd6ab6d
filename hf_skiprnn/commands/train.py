"""Train a Skip RNN on a task: `hf-skiprnn train`. The options are described in train_options.py."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from hf_skiprnn import SkipRNNConfig, SkipRNNForFrameClassification, SkipRNNForSequenceClassification
from hf_skiprnn.evaluation.files import write_json
from hf_skiprnn.hub.card import data_fingerprint
from hf_skiprnn.tasks import OwnData, Splits, Task
from hf_skiprnn.training.calibration import calibrate, set_update_rate, share_read
from hf_skiprnn.training.callbacks import BudgetController, StopWhenSettled
from hf_skiprnn.training.checkpoints import last_complete_checkpoint, steps_of
from hf_skiprnn.training.provenance import commit
from hf_skiprnn.training.rate_controller import RateController
from hf_skiprnn.training.trainer import SkipRNNTrainer

from .classes import start_classifier
from .evaluate import CALIBRATION_ROWS, draw_rows, spread_rows
from .option_parser import wrong_input_exits
from .runs import RESULTS, RUN_FILE, check_run, describe, facts_before, plain_names, results_of
from .summary import LabelWatch, summary
from .train_options import DIAL_LENGTH, LENGTH, Settings, StartArguments, given, parse

logger = logging.get_logger(__name__)

DIAL_RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 0.85)  # shares at which a dial is evaluated after training
LEAST_STEPS, MOST_EPOCHS = 1000, 500  # of a training on own data whose length nobody chose


def model_of(start: StartArguments, task: Task, config: SkipRNNConfig) -> PreTrainedModel:
    """Return a new model, or the checkpoint's model with a classifier for the task's classes."""
    kind = SkipRNNForFrameClassification if task.per_frame else SkipRNNForSequenceClassification
    if (checkpoint := start.model_name_or_path) is None:
        model = kind(config)
        task.initialise(model)
        return model
    model = kind.from_pretrained(checkpoint, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    start_classifier(model, checkpoint, SkipRNNConfig.from_pretrained(checkpoint))
    return model


def trainer_of(settings: Settings, splits: Splits, watch: LabelWatch) -> SkipRNNTrainer:
    """Return the trainer of a run; it holds the model to train."""
    task, budget, stopping = settings.task, settings.budget, settings.stopping
    return SkipRNNTrainer(
        model_of(settings.start, task, settings.config),
        settings.args,
        data_collator=task.collate,
        train_dataset=task.prepared(splits.train),
        eval_dataset=splits.validation,
        processing_class=task.processor(),
        compute_metrics=watch,
        compute_loss_func=task.loss(),
        callbacks=[*budget.callbacks(), *stopping.callbacks()],
    )


def train_long_enough(settings: Settings, splits: Splits, options: list[str]) -> None:
    """Give small data sets more epochs than the recipe has, unless the user said how long to train.

    A gate needs steps to learn. A recipe of the user's own (--config) says it too.
    """
    args = settings.args
    if any(given(options, name) for name in (*LENGTH, "config")):
        return
    if not isinstance(splits.train, Sized):
        return
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = -(-len(splits.train) // rows_a_step)
    least = LEAST_STEPS * (DIAL_LENGTH if settings.budget.dial else 1)
    epochs = min(-(-least // steps), MOST_EPOCHS)
    if epochs > args.num_train_epochs:
        print(f"{len(splits.train)} training rows: {epochs} epochs, which are {epochs * steps} optimizer steps.")
        args.num_train_epochs = settings.chosen["num_train_epochs"] = float(epochs)


def callback_outcomes(settings: Settings, trainer: SkipRNNTrainer) -> dict[str, Any]:
    """Return the outcomes of the callbacks, for results.json."""
    found: dict[str, Any] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, BudgetController | RateController):
            found["steering"] = callback.outcome
        if isinstance(callback, StopWhenSettled):
            found["stopping"] = dataclasses.asdict(settings.stopping) | callback.outcome
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and save a model; return the content of results.json."""
    with wrong_input_exits():
        settings = parse(sys.argv[1:] if argv is None else argv)
        args, folder = settings.args, Path(str(settings.args.output_dir))
        run, code = describe(settings), commit()
        commits = check_run(folder, run)
        set_seed(args.seed)
        splits = settings.task.load(args.seed if args.data_seed is None else args.data_seed)
        _, validation, test_rows = splits  # made now, so that a bad row stops this command before the training
        if isinstance(settings.task, OwnData):
            settings.task.check(validation)
            settings.task.check(test_rows)
            train_long_enough(settings, splits, sys.argv[1:] if argv is None else argv)
        watch = LabelWatch(settings.task.compute_metrics)
        trainer = trainer_of(settings, splits, watch)
    if settings.budget.dial:
        length = f"{args.max_steps} optimizer steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        print(f"A model for every share from {settings.budget.dial[0]:.0%} to {settings.budget.dial[1]:.0%}: {length}.")
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(folder)
    if trainer.is_world_process_zero():
        write_json(folder / RUN_FILE, run | {"commits": list(dict.fromkeys([*commits, code]))})
    if checkpoint:
        print(f"Going on from {checkpoint}.", flush=True)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    train = {"steps": outcome.global_step, "seconds": outcome.metrics["train_runtime"], "resumed_from": checkpoint}
    was_trained = checkpoint is not None and outcome.global_step == steps_of(Path(checkpoint))  # before this command
    if was_trained and commits:
        code = commits[-1]
    commits = list(dict.fromkeys([*commits, code]))
    if len(commits) > 1:
        train["commits"] = commits  # the training went on at other commits
    calibrate_gate(trainer, validation)
    trainer.save_model()
    test = plain_names(trainer.evaluate(test_rows, metric_key_prefix="test"))
    guess = watch.guess()
    results = results_of(settings, trainer, train, test) | {"commit": code} | callback_outcomes(settings, trainer)
    if settings.budget.dial:
        results["operating_points"] = dial_points(trainer, test_rows, settings.budget.dial)
    if was_trained:
        results |= facts_before(folder)
    if trainer.is_world_process_zero():
        write_json(folder / RUN_FILE, run | {"commits": commits})
        results["data"] = data_fingerprint(test_rows, "test")
        write_json(folder / RESULTS, results)
        picture = picture_of(trainer, settings.task, splits, folder, results.get("operating_points", []))
        print(summary(results, guess, folder, picture), flush=True)
    return results


def calibrate_gate(trainer: SkipRNNTrainer, validation: Dataset) -> None:
    """Shift the gate after training so that the share of steps read in validation rows is the target."""
    controllers = [c for c in trainer.callback_handler.callbacks if isinstance(c, RateController)]
    if not controllers:
        return
    (controller,) = controllers
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    batches = list(trainer.get_eval_dataloader(spread_rows(validation, CALIBRATION_ROWS)))
    calibrate(model, batches, trainer.accelerator, controller.target)
    set_update_rate(model, controller.target)
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    model.eval()
    controller.judge(share_read(model, inputs, model.config.gate_shift, trainer.accelerator), model.config)
    if text := controller.warning():
        logger.warning(text)


def dial_points(trainer: SkipRNNTrainer, rows: Dataset, dial: list[float]) -> list[dict[str, float]]:
    """Return the metrics on `rows` at several shares of a dial; the model stays as it was."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    before, points = model.config.gate_shift, []
    for rate in (rate for rate in DIAL_RATES if dial[0] <= rate <= dial[1]):
        set_update_rate(model, rate)
        metrics = plain_names(trainer.evaluate(rows, metric_key_prefix="test"))
        points.append({"update_rate_asked": rate, "gate_shift": model.config.gate_shift} | metrics)
    model.set_gate_shift(before)
    return points


def picture_of(
    trainer: SkipRNNTrainer, task: Task, splits: Splits, folder: Path, points: list[dict[str, float]]
) -> str:
    """Draw the steps read in some test rows; return the picture's path, or a hint how to get the picture.

    points: a dial's operating points; their curve is drawn, too.
    """
    if trainer.args.world_size > 1:  # a forward pass of sharded weights needs every process; only one draws
        return "drawn by the next command"
    if importlib.util.find_spec("matplotlib") is None:
        return 'needs matplotlib: pip install "hf_skiprnn[figures]"'
    path = folder / "steps-read-test.png"
    draw_rows(trainer.accelerator.unwrap_model(trainer.model), task, splits.test, path)
    if points:
        from hf_skiprnn.evaluation.figures import draw_operating_points

        draw_operating_points(points, folder / "operating-points-test.png")
    return str(path)
