"""Evaluate a checkpoint: `hf-skiprnn evaluate`."""

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    TrainingArguments,
)

from hf_skiprnn.evaluation.files import write_json
from hf_skiprnn.evaluation.metrics import operation_counts
from hf_skiprnn.tasks import TASKS, Task
from hf_skiprnn.tasks.base import Row
from hf_skiprnn.training.calibration import calibrate, set_update_rate
from hf_skiprnn.training.trainer import SkipRNNTrainer

from .classes import match_task
from .option_parser import OptionParser, wrong_input_exits
from .runs import RESULTS, RUN_FILE, run_of

DESCRIPTION = """Evaluate a checkpoint: metrics, updates, operation counts, and a picture of which steps it reads.

    hf-skiprnn evaluate runs/digits-skip-lstm
    hf-skiprnn evaluate CHECKPOINT --task mnist --dataset_name HUB_ID_OR_FOLDER --split validation

The task and its options come from run.json, which training wrote into the checkpoint's folder (for checkpoint-N, into
the folder above it), or from the results.json of a published folder. Options on the command line override them.
Writes evaluation-SPLIT.json and steps-read-SPLIT.png into the checkpoint's folder, or into --output_dir.
"""
# Names of metrics that Trainer and SkipRNNTrainer add to the task's own start with one of these.
CALIBRATION_ROWS = 1024  # validation rows: the standard error of the share is then below a hundredth
OF_THE_TRAINER = ("loss", "budget_loss", "update", "runtime", "samples_per", "steps_per", "model_preparation", "epoch")


def parse(argv: list[str]) -> tuple[Namespace, Task]:
    """Return the options of the evaluation and the task, with its own options."""
    first = ArgumentParser(prog="hf-skiprnn evaluate", add_help=False, allow_abbrev=False)
    first.add_argument("checkpoint", nargs="?", help="folder, or Hub id of a repository")
    first.add_argument("--task", choices=sorted(TASKS), help="what the checkpoint was trained on")
    given, _ = first.parse_known_args(argv)
    known, known_options = run_of(given.checkpoint)
    name = given.task or known
    if not {"-h", "--help"} & set(argv) and (given.checkpoint is None or name is None):
        missing = f"no {RUN_FILE} or {RESULTS} at the checkpoint: give --task too"
        if given.checkpoint and not Path(given.checkpoint).is_dir():
            missing = (
                f"there is no folder {given.checkpoint} (the checkpoint stands before the options); if it is an id of "
                "the Hub, give --task too"
            )
        first.error("give a checkpoint" if given.checkpoint is None else missing)
    groups: dict[str, Any] = {f"task {name}": TASKS[name]} if name else {}
    parser = OptionParser(
        groups, usage="hf-skiprnn evaluate CHECKPOINT [options]", parents=[first], description=DESCRIPTION
    )
    add_options(parser)
    if known == name:
        parser.set_defaults(**known_options)
    task, options = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return options, task


def add_options(parser: ArgumentParser) -> None:
    """Add the options that do not depend on the task."""
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="rows to evaluate on")
    parser.add_argument("--batch_size", type=int, default=256, help="rows at a time")
    parser.add_argument(
        "--count_padding", action="store_true", help="also count the updates in padding, as the paper's Table 5 does"
    )
    parser.add_argument("--figure_rows", type=int, default=12, help="rows in the picture; 0: no picture")
    parser.add_argument(
        "--gate_shifts",
        type=float,
        nargs="+",
        default=None,
        help="evaluate the checkpoint once for each of these numbers, added to the gate's bias (0: as trained)",
    )
    parser.add_argument(
        "--update_rates",
        type=float,
        nargs="+",
        default=None,
        help="evaluate the checkpoint once for each of these shares of steps read; a checkpoint without calibration is "
        "first calibrated on the task's validation rows",
    )
    parser.add_argument(
        "--pull",
        action="store_true",
        help="ucf101: classify the test clips from the files, decoding and encoding only frames that are read, and "
        "compare with encoding every frame",
    )
    parser.add_argument("--output_dir", type=Path, default=None, help="where to write; default: the checkpoint folder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code of a checkpoint from the Hub")


def evaluate(model: PreTrainedModel, task: Task, rows: Dataset, batch_size: int, folder: Path) -> dict[str, float]:
    """Return the metrics over all rows. `folder`: the trainer's output_dir."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=batch_size,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )
    trainer = SkipRNNTrainer(
        model,
        args,
        data_collator=task.collate,
        compute_metrics=task.compute_metrics,
        compute_loss_func=task.loss(),
    )
    metrics = trainer.evaluate(rows, metric_key_prefix="")
    return {name.removeprefix("_"): value for name, value in metrics.items()}


def updates_with_padding(
    model: PreTrainedModel, task: Task, rows: Dataset, batch_size: int, length: int
) -> dict[str, float]:
    """Count the updates when rows are padded to `length` tokens and the model reads the padding like words."""
    updates = []
    for start in range(0, len(rows), batch_size):
        batch = task.collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        ids = batch["input_ids"].to(model.device)
        padding = ids.new_full((len(ids), length - ids.shape[1]), model.config.pad_token_id)
        ids = torch.cat([ids, padding], dim=1)
        with torch.no_grad():
            updates.append(model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).num_updates.cpu())
    counts = torch.cat(updates).double()
    return {"updates_with_padding": counts.mean().item(), "updates_with_padding_std": counts.std(correction=0).item()}


def operating_points(
    model: PreTrainedModel, task: Task, rows: Dataset, kept: list[Row], options: Namespace, folder: Path
) -> list[dict[str, float]]:
    """Return the metrics at every gate shift and update rate, and print them; the model stays as it was.

    A model without a calibration is calibrated with the rows `kept`.
    """
    points, shifted = [], cast(Any, model)
    config = shifted.config
    before = config.gate_shift, config.gate_calibration
    asked: list[tuple[float, dict[str, float]]] = [(shift, {}) for shift in options.gate_shifts or ()]
    if kept:
        size = options.batch_size
        calibrate(shifted, [task.collate(kept[start : start + size]) for start in range(0, len(kept), size)])
    for rate in options.update_rates or ():
        if (found := set_update_rate(shifted, rate)) != rate:
            print(f"update rate {rate:.1%} was not measured; the nearest one is {found:.1%}.")
        asked.append((config.gate_shift, {"update_rate_asked": rate}))
    for shift, named in sorted(asked, key=lambda pair: pair[0]):
        shifted.set_gate_shift(shift)
        points.append({"gate_shift": shift} | named | evaluate(model, task, rows, options.batch_size, folder))
    config.gate_shift, config.gate_calibration = before
    metric = "accuracy" if "accuracy" in points[0] else "task_loss"
    for point in points:
        read = f"updates {point['updates']:.2f} ({point['update_rate']:.1%})"
        print(f"gate shift {point['gate_shift']:+.3g}: {metric} {point[metric]:.4g}, {read}")
    return points


def pull(model: PreTrainedModel, task: Task, folder: Path) -> dict[str, Any]:
    """Classify the test clips, decoding and encoding only the frames that are read; return the counts and seconds."""
    from hf_skiprnn.inference.videos import classify_pulled
    from hf_skiprnn.tasks.readers.video import FrameFeatures
    from hf_skiprnn.tasks.ucf101 import UCF101

    if not isinstance(task, UCF101):
        raise SystemExit(f"--pull reads video files, so it is for task ucf101; got {task.name}.")
    clips = task.files("test")
    labels = [task.labels.index(clip.parent.name) for clip in clips]
    features = FrameFeatures(task.feature_model)
    saving = classify_pulled(model.eval(), clips, labels, features, task.frames, task.frame_rate)
    result = {"task": task.name, "task_options": dataclasses.asdict(task), "split": "test", **saving._asdict()}
    write_json(folder / "evaluation-pull.json", result)
    print(
        f"{saving.clips} clips of {saving.frames} frames: {saving.frames_encoded} encoded, {saving.frames_decoded} "
        f"decoded, {saving.seconds_pulled:.1f} s; every frame encoded: {saving.seconds_everything:.1f} s\n"
        f"correct clips: {saving.right_pulled}; with every frame encoded: {saving.right_everything}; "
        f"clips whose gates differ: {saving.clips_with_other_gates}"
    )
    return result


def spread_rows(rows: Dataset, number: int) -> Dataset:
    """Return at most `number` rows from all over a split, which may be sorted by label."""
    shown = min(number, len(rows))
    return rows.select([i * len(rows) // shown for i in range(shown)])


def draw_rows(model: PreTrainedModel, task: Task, rows: Dataset, path: Path, number: int = 12) -> None:
    """Draw the steps read in `number` rows, evenly spaced over the split, because it may be sorted by label."""
    draw(model, task, spread_rows(rows, number), path)


def draw(model: PreTrainedModel, task: Task, rows: Dataset, path: Path) -> None:
    """Draw the steps read in these rows to `path`; for texts, also write an HTML page beside it."""
    batch = task.collate([rows[i] for i in range(len(rows))])
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        out = model.eval()(**inputs, output_update_gates=True)
    shown = (batch, out.update_gates.cpu().numpy() > 0, out.logits.float().cpu().numpy())
    task.figure(*shown).savefig(path)
    if page := task.page(*shown):
        path.with_suffix(".html").write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluate, draw and save; returns the content of the JSON file."""
    with wrong_input_exits():
        options, task = parse(sys.argv[1:] if argv is None else argv)
        folder = options.output_dir or Path(options.checkpoint if Path(options.checkpoint).is_dir() else "evaluation")
        folder.mkdir(parents=True, exist_ok=True)
        kind: Any = AutoModelForTokenClassification if task.per_frame else AutoModelForSequenceClassification
        model = kind.from_pretrained(options.checkpoint, trust_remote_code=options.trust_remote_code)
        if (options.gate_shifts or options.update_rates) and model.config.gate != "learned":
            raise ValueError(
                f"--gate_shifts and --update_rates move a learned gate; {options.checkpoint} has "
                f"gate={model.config.gate!r}."
            )
        if options.pull:
            return pull(model, task, folder)
        task.use_processor(options.checkpoint)
        splits = task.load(seed=0)
        rows = getattr(splits, options.split)
        kept: list[Row] = []  # rows for a calibration, which a checkpoint may lack
        if options.update_rates and model.config.gate_calibration is None:
            kept = list(spread_rows(splits.validation, CALIBRATION_ROWS))
        match_task(model, task, options.checkpoint)
    metrics = evaluate(model, task, rows, options.batch_size, folder)
    if options.count_padding:
        metrics |= updates_with_padding(model, task, rows, options.batch_size, padded_length(model, task))
    result: dict[str, Any] = {
        "task": task.name,
        "task_options": dataclasses.asdict(task),
        "split": options.split,
        "rows": len(rows),
        "metrics": metrics,
        "multiply_accumulates": operation_counts(model.config, metrics),
    }
    if options.gate_shifts or options.update_rates:
        result["operating_points"] = operating_points(model, task, rows, kept, options, folder)
    write_json(folder / f"evaluation-{options.split}.json", result)
    print(report(result))
    if "operating_points" in result:
        from hf_skiprnn.evaluation.figures import draw_operating_points

        draw_operating_points(result["operating_points"], folder / f"operating-points-{options.split}.png")
    if options.figure_rows:
        path = folder / f"steps-read-{options.split}.png"
        draw_rows(model, task, rows, path, options.figure_rows)
        print(f"picture: {path}")
    return result


def padded_length(model: PreTrainedModel, task: Task) -> int:
    """Return the length to which the task crops texts; exit with a message if the task has no such length."""
    length = getattr(task, "length", None)
    if length is None or model.config.vocab_size is None:
        raise SystemExit(f"--count_padding needs a task that crops texts to one length, such as imdb; got {task.name}.")
    return length


def report(result: dict[str, Any]) -> str:
    """Return the result in a few lines."""
    metrics, counts = result["metrics"], result["multiply_accumulates"]
    shown = {name: value for name, value in metrics.items() if not name.startswith(OF_THE_TRAINER)}
    lines = [f"{result['task']}, {result['rows']} rows ({result['split']})"]
    lines += [f"{name}: {value:.6g}" for name, value in shown.items()]
    lines.append(
        f"updates: {metrics['updates']:.2f} +- {metrics['updates_std']:.2f} per row, "
        f"{metrics['update_rate']:.1%} of the steps\n"
        f"multiply-accumulates: {counts['read']:.3g} per row; {counts['every_step']:.3g} if every step were read"
    )
    if "updates_with_padding" in metrics:
        lines.append(f"updates with padding read: {metrics['updates_with_padding']:.2f}")
    return "\n".join(lines)
