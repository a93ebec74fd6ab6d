"""Render the model card (README.md) of a checkpoint from the files in its folder; no number is typed by hand.

Sources: results.json (from hf-skiprnn train), config.json, the processor's file, pictures named steps-read-*.png and
operating-points-*.png (from hf-skiprnn train and evaluate), the docstring of the task's module, the paper's tables,
and, in this repository, speed/*.csv and *-pareto/results.json beside the folder. A section whose facts are missing is
left out. Everything from the files is escaped, because names of classes and options may come from an untrusted source.
"""

import csv
import hashlib
import html
import inspect
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from hf_skiprnn.evaluation.paper import PublishedRow, published_rows
from hf_skiprnn.evaluation.snippets import HUB_TAGS, class_names, input_kind, snippet
from hf_skiprnn.tasks import TASKS
from hf_skiprnn.training.card import license_fields

from .private import public

RESULTS = "results.json"
HUB_ID = r"\w[\w.-]*/[\w.-]+"
VIDEO_TASKS = ("ucf101", "charades")
# The main metric of a task is the first of these that it has.
MAIN_METRICS = ("map_100", "accuracy", "f1", "mse")
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "portable code"}  # widest first; as users say it
TIMES = {"runtime", "samples_per_second", "steps_per_second"}  # not shown: the machine may have been busy


def render_card(
    folder: str | Path, location: str | None = None, license_id: str | None = None, code_travels: bool | None = None
) -> str:
    """Return the card of a checkpoint folder.

    Args:
        folder: holds results.json and config.json.
        location: Hub id or folder that the example code loads; default: the folder's name.
        license_id: licence of the weights, as the Hub names it; default: that of an existing card in the folder.
        code_travels: the model's code is, or will be, in the folder; default: whether it is.

    Raises:
        FileNotFoundError: there is no results.json or config.json.
        KeyError: results.json lacks a fact that every card needs.
    """
    folder = Path(folder)
    travels = any(folder.glob("*.py")) if code_travels is None else code_travels
    licence = license_fields(folder / "README.md", license_id)
    facts = card_facts(folder, location or folder.resolve().name, licence, travels)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, finalize=as_text)
    template = environment.from_string(files("hf_skiprnn.hub").joinpath("model_card_template.md").read_text("utf-8"))
    return re.sub(r"\n{3,}", "\n\n", template.render(facts).strip()) + "\n"


def write_card(folder: str | Path, location: str | None = None, license_id: str | None = None) -> Path:
    """Write the card to README.md in the folder; arguments and errors as render_card's."""
    path = Path(folder, "README.md")
    path.write_text(render_card(folder, location, license_id), encoding="utf-8")
    return path


def as_text(value: Any) -> str:
    """Escape a value so that Markdown and HTML show it literally, on one line; Markup stays as it is."""
    if isinstance(value, Markup):
        return str(value)
    line = re.sub(r"\s+", " ", html.escape(str(value), quote=False))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def card_facts(folder: Path, location: str, licence: Mapping[str, Any], code_travels: bool) -> dict[str, Any]:
    """Return the values of the template's variables, from the files in the folder."""
    results, config = public(_json(folder / RESULTS)), _json(folder / "config.json")
    processor = _json(folder / "preprocessor_config.json", {})
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights:  # too large for this repository; the training command in the card makes them
        location = results["training"]["output_dir"]
    test, task = results["metrics"]["test"], results["task"]
    metric = next((name for name in MAIN_METRICS if name in test), None)
    about, page = task_page(task)
    lines = snippet(config, processor, location, task, code_travels)
    return {
        "metadata": Markup(metadata(folder.resolve().name, config, processor, results, licence, code_travels)),
        "name": folder.resolve().name,
        "kind": kind_of(config),
        "input": input_kind(config, processor),
        "config": config,
        "code_travels": code_travels,
        "has_weights": has_weights,
        "snippet": Markup(lines),
        "extra": Markup("train,audio" if "soundfile" in lines else "train"),
        "about": Markup(about),
        "page": Markup(page),
        "classes": class_names(config.get("id2label")),
        "data": results.get("data"),
        "options": shown_options(results["task_options"]),
        "published": nearest_rows(published_rows(task, config["cell_type"], results["task_options"]), test["updates"]),
        "rivals": gates_rivals(folder.parent / "gates" / RESULTS, results, metric)
        or rivals(folder.parent / f"{task}-pareto" / RESULTS, metric),
        "metric": metric,
        "test": test,
        "operations": results["multiply_accumulates"],
        "figures": sorted(path.name for path in folder.glob("steps-read-*.png")),
        "curves": sorted(path.name for path in folder.glob("operating-points-*.png")),
        "speed": speed_rows(folder.parent / "speed", folder.resolve().name),
        "points": results.get("operating_points", []),
        "start": results.get("start", {}).get("model_name_or_path"),
        "start_made": results.get("start", {}).get("made_by"),
        "budget": results.get("budget", {}),
        "steered": steered(results.get("budget", {}), config),
        "commit": results.get("commit") if re.fullmatch(r"[0-9a-f]{7,40}", str(results.get("commit"))) else None,
        "lost": results.get("commit") == "commit lost",
        "command": Markup(shown_command(results)),  # stands in a code block, where nothing is markup
        "license": licence.get("license_name", licence.get("license")),
        "number": number,
        "percent": percent,
        "value_of": published_value,
        **{name: results[name] for name in ("train", "training", "device", "versions")},
    }


def kind_of(config: Mapping[str, Any]) -> str:
    """Return what a model is, with its article."""
    cell = config["cell_type"].upper()
    return f"A Skip {cell}" if config["gate"] == "learned" else f"{'An' if cell == 'LSTM' else 'A'} {cell}"


def shown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task's options to show: those that are set and are not folders of this machine."""
    local = not re.fullmatch(HUB_ID, str(options.get("dataset_name")))
    return {n: value for n, value in options.items() if value is not None and not (local and n == "dataset_name")}


def steered(budget: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """Return the share to which BudgetController steered; None if it was not used."""
    share = budget.get("steered_update_rate")  # version 0.1.0 named it target_update_rate
    return share or (budget.get("target_update_rate") if config["budget_loss"] == "cost" else None)


def shown_command(results: dict[str, Any]) -> str:
    """Return the training's command on one line, without a data folder of this machine if the task has a default.

    `command_today` in results.json stands for `command`, whose options or recipe have changed since. It has the same
    settings, but keeps the last model where `command` kept the best one.
    """
    command = " ".join(results.get("command_today", results["command"]).split())
    data = str(results["task_options"].get("dataset_name"))
    if re.fullmatch(HUB_ID, data) or not getattr(TASKS[results["task"]], "dataset_name", None):
        return command
    return re.sub(r""" --dataset_name[= ]('[^']*'|"[^"]*"|\S+)""", "", command)


def task_page(task: str) -> tuple[str, str]:
    """Return the first sentence and the second paragraph (source and licence of the data) of a task's docstring."""
    title, _, rest = (inspect.getdoc(inspect.getmodule(TASKS[task])) or "").partition("\n\n")
    return title.partition(": ")[2] or title, rest.split("\n\n")[0]


def nearest_rows(rows: list[PublishedRow], updates: float) -> list[PublishedRow]:
    """Return the paper's models that read most, and the two that read about as many steps as `updates`, in order."""
    most = max((row.updates for row in rows), default=0.0)
    nearest = sorted(rows, key=lambda row: (abs(row.updates - updates), row.updates == most))[:2]
    return [row for row in rows if row.updates == most or row in nearest]


def gates_rivals(path: Path, results: Mapping[str, Any], metric: str | None) -> list[dict[str, Any]]:
    """Return the mean results of strided and plain LSTMs of `make gates`, which has trained them by the task's recipe.

    Beside a dial stand all strides, beside another model the one that reads the nearest share. None are returned for a
    GRU, if sequences have another length, or if the file holds other things. Other options of a task are not compared.
    """
    test = results["metrics"]["test"]
    length = test["updates"] / test["update_rate"] if test["update_rate"] else math.inf
    try:
        rows = [
            row
            for row in _json(path, [])
            if (row["task"], row["metric"], "lstm") == (results["task"], metric, results["model"]["cell_type"])
            and math.isclose(row["updates"] / row["read"], length, rel_tol=0.01)
        ]
    except (TypeError, ValueError, KeyError, ZeroDivisionError):  # a folder of that name which is not ours
        return []
    found = []
    shares = sorted({row["share"] for row in rows if row["kind"] == "strided"})
    if not results.get("budget", {}).get("dial"):
        shares = [min(shares, key=lambda share: abs(share - test["update_rate"]), default=1.0)]
    for kind, share in dict.fromkeys((row["kind"], row["share"]) for row in rows):
        runs = [row for row in rows if (row["kind"], row["share"]) == (kind, share)]
        if kind == "plain" or (kind == "strided" and share in shares):
            name = "plain LSTM" if kind == "plain" else f"LSTM, one step in {round(1 / share)}"
            means = [fmean(run[field] for run in runs) for field in ("value", "updates", "read")]
            many = f"mean of {len(runs)} runs" if len(runs) > 1 else "one run"
            found.append(
                {"model": f"{name}, {many} of {runs[0]['steps']} steps"}
                | dict(zip(("value", "updates", "rate"), means, strict=True))
            )
    return found


def rivals(path: Path, metric: str | None) -> list[dict[str, Any]]:
    """Return the results of runs without a learned gate, from a file of runs on the same task."""
    runs = _json(path, {})
    names = {"always": "plain {cell}", "random": "{cell}, random skips", "strided": "{cell}, one step in {stride}"}
    found = []
    for run in runs.values():
        model, test = run["model"], run["metrics"]["test"]
        if model["gate"] in names and metric in test:
            name = names[model["gate"]].format(cell=model["cell_type"].upper(), stride=model["stride"])
            value = {"value": test[metric], "updates": test["updates"], "rate": test["update_rate"]}
            found.append({"model": name} | value)
    return found


def measurements(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of every CSV file of measured times under `folder`."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def speed_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the measured times of the checkpoint `name` on one thread, inference before training, widest set first.

    `where` names the processor and the instruction set, to which nn.LSTM and nn.GRU were limited too.
    """
    wanted = {"level": "model", "name": "ours", "spread": name, "threads": "1"}
    rows = [row for row in measurements(folder) if all(row.get(key) == value for key, value in wanted.items())]
    rows.sort(key=lambda row: (row["mode"], list(INSTRUCTION_SETS).index(row["instruction_set"])))
    return [
        row | {key: float(row[key]) for key in ("p50_ms", "native_over_this")} | {"where": place(row)} for row in rows
    ]


def place(row: Mapping[str, str]) -> str:
    """Return the processor and the instruction set of a measurement, in words."""
    return f"{row['device'].partition(' (')[0]} with {INSTRUCTION_SETS[row['instruction_set']]}"


def data_fingerprint(rows: Dataset, split: str) -> dict[str, Any]:
    """Return the name, number of rows and SHA-256 of a split; the hash covers its columns, but no paths of files."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for name in sorted(batch.column_names):
            digest.update(repr([_without_path(value) for value in batch[name].to_pylist()]).encode())
    return {"split": split, "rows": len(rows), "sha256": digest.hexdigest()}


def _without_path(value: Any) -> Any:
    return {name: part for name, part in value.items() if name != "path"} if isinstance(value, dict) else value


def number(value: Any) -> str:
    """Return four digits of a float; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def published_value(row: PublishedRow) -> str:
    """Return the metric of a row of the paper, as a table shows it."""
    if row.value is None:
        return "solved" if row.solved else "not solved"
    return number(row.value) + (f" ± {number(row.value_std)}" if row.value_std is not None else "")


def metadata(
    name: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    results: Mapping[str, Any],
    licence: Mapping[str, Any],
    code_travels: bool,
) -> str:
    """Return the YAML metadata that the Hub reads."""
    task, test, kind = results["task"], results["metrics"]["test"], input_kind(config, processor)
    tag = HUB_TAGS.get(kind, "video-classification" if task in VIDEO_TASKS else "other")
    dataset = hub_dataset(results)
    told = {metric: metric for metric in MAIN_METRICS} | {"update_rate": "share of steps read"}
    evaluations = [
        EvalResult(
            task_type=tag,
            dataset_type=dataset or task,
            dataset_name=task,
            dataset_split="test",
            metric_type=key,
            metric_name=label,
            metric_value=float(test[key]),
        )
        for key, label in told.items()
        if key in test
    ]
    data = ModelCardData(
        library_name="transformers",
        **licence,
        pipeline_tag=tag,
        tags=["skip-rnn", config["cell_type"], *(["custom_code"] if code_travels else [])],
        datasets=[dataset] if dataset else None,
        language="en" if task == "imdb" else None,
        model_name=name,
        eval_results=evaluations,
    )
    return data.to_yaml().strip()


def hub_dataset(results: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the data; for a local folder, the id that is the task's default."""
    chosen = str(results["task_options"].get("dataset_name"))
    if re.fullmatch(HUB_ID, chosen):
        return chosen
    return getattr(TASKS[results["task"]], "dataset_name", None) or None


def _json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    return json.loads(path.read_text(encoding="utf-8"))
