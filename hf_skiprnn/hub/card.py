"""A checkpoint's README.md, rendered from what its folder holds; nothing is typed.

Sources: results.json (scripts/train.py), config.json, the processor's file, pictures named steps-read-*.png
(scripts/evaluate.py), the task's page, the paper's tables, and speed/*.csv beside the folder (scripts/benchmark.py).
A fact that is absent leaves its section out.
"""

import csv
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData

from hf_skiprnn.evaluation.paper import PublishedRow, published_rows
from hf_skiprnn.tasks import TASKS

RESULTS = "results.json"
VIDEO_TASKS = ("ucf101", "charades")
# The one number that says how good a model is, by preference.
MAIN_METRICS = ("map_100", "accuracy", "mse")
TIMES = {"runtime", "samples_per_second", "steps_per_second"}  # of this evaluation, with whatever else was running
# Of the author's machine, terminal and account.
UNTOLD = ("output_dir", "run_name", "resume_from_checkpoint", "hub_model_id", "disable_tqdm")


def render_card(folder: str | Path, location: str | None = None) -> str:
    """The card of a checkpoint folder; `location`: what its example loads, default the folder's name.

    Raises:
        FileNotFoundError: no results.json or config.json, which are what a card tells.
        KeyError: results.json lacks a fact that every card tells.
    """
    folder = Path(folder)
    facts = card_facts(folder, location or folder.resolve().name)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string(files("hf_skiprnn.hub").joinpath("model_card_template.md").read_text("utf-8"))
    return template.render(facts)


def write_card(folder: str | Path, location: str | None = None) -> Path:
    """Write the card to README.md in the folder; arguments and errors as render_card's."""
    path = Path(folder, "README.md")
    path.write_text(render_card(folder, location), encoding="utf-8")
    return path


def card_facts(folder: Path, location: str) -> dict[str, Any]:
    """What the template tells, from the files in the folder."""
    results, config = public(_json(folder / RESULTS)), _json(folder / "config.json")
    kind, code_travels = input_kind(folder, config), any(folder.glob("*.py"))
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights:  # too large for where the card stands; the command makes them
        location = results["training"]["output_dir"]
    test = results["metrics"]["test"]
    metric = next((name for name in MAIN_METRICS if name in test), None)
    settings = {name: value for name, value in results["training"].items() if name not in (*UNTOLD, "seed")}
    return {
        "metadata": _metadata(folder.resolve().name, kind, config, results, metric),
        "name": folder.resolve().name,
        "kind": f"{'Skip ' if config['gate'] == 'learned' else ''}{config['cell_type'].upper()}",
        "config": config,
        "code_travels": code_travels,
        "has_weights": has_weights,
        "snippet": snippet(kind, config, _json(folder / "preprocessor_config.json", {}), location, code_travels),
        "page": task_page(results["task"]),
        "data": results.get("data"),
        "options": {name: value for name, value in results["task_options"].items() if value is not None},
        "published": published_rows(results["task"], config["cell_type"], results["task_options"]),
        "metric": metric,
        "test": test,
        "metrics": results["metrics"],
        "metric_names": sorted({name for split in results["metrics"].values() for name in split} - TIMES),
        "operations": results["multiply_accumulates"],
        "figures": sorted(path.name for path in folder.glob("steps-read-*.png")),
        "speed": speed_rows(folder.parent / "speed", config, folder.resolve().name),
        "settings": {
            name: value
            for name, value in {**results["model"], **results.get("budget", {}), **settings}.items()
            if value is not None
        },
        "start": results.get("start", {}).get("model_name_or_path"),
        "command": results["command"],
        "commit": results.get("commit"),
        "number": number,
        "percent": percent,
        "value_of": published_value,
        **{name: results[name] for name in ("train", "training", "device", "processes", "versions", "finished")},
    }


def input_kind(folder: Path, config: Mapping[str, Any]) -> str:
    """What the checkpoint reads: "text", "image", "audio", "frames" (labels at every step) or "series"."""
    processor = _json(folder / "preprocessor_config.json", {})
    if "AutoModelForTokenClassification" in config.get("auto_map", {}):
        return "frames"
    if config["vocab_size"] is not None:
        return "text"
    if "image_processor_type" in processor:
        return "image"
    return "audio" if processor.get("sampling_rate") else "series"


def snippet(
    kind: str, config: Mapping[str, Any], processor: Mapping[str, Any], location: str, code_travels: bool
) -> str:
    """A few lines that load the checkpoint and run it on an input of the right shape.

    code_travels: the model's code stands in the folder; without, the lines import this package.
    """
    lines = _snippet_with_code(kind, config, processor, location)
    if code_travels:
        return lines
    pipeline_class = f"hf_skiprnn.SkipRNN{'Sequence' if kind == 'series' else kind.title()}ClassificationPipeline"
    trusted = "" if kind == "frames" else f", pipeline_class={pipeline_class}"
    return lines.replace("\n\n", "\n\nimport hf_skiprnn\n\n", 1).replace(", trust_remote_code=True", trusted)


def _snippet_with_code(kind: str, config: Mapping[str, Any], processor: Mapping[str, Any], location: str) -> str:
    load = 'classifier = pipeline("{}", model="' + location + '", trust_remote_code=True)'
    show = "print(classifier({}, return_updates=True))"
    if kind == "text":
        return "\n".join(
            (
                "from transformers import pipeline\n",
                load.format("text-classification"),
                show.format('"A quiet film that stays with you."'),
            )
        )
    if kind == "frames":
        return "\n".join(
            (
                "import torch",
                "from transformers import AutoModelForTokenClassification\n",
                f'model = AutoModelForTokenClassification.from_pretrained("{location}", trust_remote_code=True)',
                f"steps = torch.randn(1, 50, {config['input_size']})  # your features, [batch, time, size]",
                "out = model(steps, output_update_gates=True)",
                "print(out.logits.shape, out.num_updates)",
            )
        )
    size = processor.get("size") or {"height": 28, "width": 28}
    channels = f", {processor['num_channels']}" if processor.get("num_channels", 1) > 1 else ""
    task, name, example = {
        "image": (
            "image-classification",
            "picture",
            f"np.zeros(({size['height']}, {size['width']}{channels}), np.uint8)  # yours: a file, PIL image or array",
        ),
        "audio": (
            "audio-classification",
            "sound",
            f"np.zeros({processor.get('sampling_rate')}, np.float32)  # yours: samples at this many per second",
        ),
        "series": (
            "sequence-classification",
            "series",
            f"np.zeros((50, {config['input_size']}), np.float32)  # yours: [time, size]",
        ),
    }[kind]
    lines = ("import numpy as np", "from transformers import pipeline\n", load.format(task), f"{name} = {example}")
    return "\n".join((*lines, show.format(name)))


def task_page(task: str) -> str:
    """The task's own page, without its example row."""
    page = inspect.getdoc(inspect.getmodule(TASKS[task])) or ""
    return page.split("\n\n    {")[0]


def measurements(folder: Path) -> list[dict[str, Any]]:
    """The rows of every CSV file of scripts/benchmark.py under `folder`."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def speed_rows(folder: Path, config: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """What was measured of the checkpoint `name` itself and, with constant gates, of layers of its sizes.

    `torch_version` names PyTorch's.
    """
    layers = {
        "level": "layer",
        "cell": config["cell_type"],
        "inputs": str(config["input_size"]),
        "units": str(config["hidden_size"]),
        "layers": str(config["num_hidden_layers"]),
        "name": "ours",
        "spread": "constant",
        "sequence": "False",
    }
    itself = {"level": "model", "name": "ours", "spread": name}
    rows = measurements(folder)
    ours = [r for wanted in (itself, layers) for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    numbers = ("rate", "p50_ms", "native_over_this")
    return [
        row | {name: float(row[name]) for name in numbers} | {"torch_version": f"PyTorch {row['torch']}"}
        for row in ours
    ]


def data_fingerprint(rows: Dataset, split: str) -> dict[str, Any]:
    """`split`, `rows` and `sha256` of a split's content, column by column in order; paths of files do not count."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for name in sorted(batch.column_names):
            digest.update(repr([_without_path(value) for value in batch[name].to_pylist()]).encode())
    return {"split": split, "rows": len(rows), "sha256": digest.hexdigest()}


def _without_path(value: Any) -> Any:
    return {name: part for name, part in value.items() if name != "path"} if isinstance(value, dict) else value


def number(value: Any) -> str:
    """Four digits of a float; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def published_value(row: PublishedRow) -> str:
    """The metric's cell of a row of the paper."""
    if row.value is None:
        return "solved" if row.solved else "not solved"
    return number(row.value) + (f" ± {number(row.value_std)}" if row.value_std is not None else "")


def _metadata(name: str, kind: str, config: Mapping[str, Any], results: Mapping[str, Any], metric: str | None) -> str:
    """The YAML block."""
    task, test = results["task"], results["metrics"]["test"]
    # "other": the Hub has no category for series of numbers.
    tag = {"text": "text-classification", "image": "image-classification", "audio": "audio-classification"}.get(
        kind, "video-classification" if task in VIDEO_TASKS else "other"
    )
    dataset = getattr(TASKS[task], "dataset_name", None)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", chosen := str(results["task_options"].get("dataset_name"))):
        dataset = chosen  # else a local folder, which stands for the default
    told = {metric: metric} if metric else {}
    told |= {"updates": "steps read per sequence", "update_rate": "share of steps read"}
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
        license="apache-2.0",
        pipeline_tag=tag,
        tags=["skip-rnn", "recurrent", config["cell_type"], "custom_code"],
        datasets=[dataset] if dataset else None,
        language="en" if kind == "text" else None,
        model_name=name,
        eval_results=evaluations,
    )
    return data.to_yaml().strip()


def public(value: Any) -> Any:
    """The same without the folders of the author's machine: of an absolute path its last part."""
    if isinstance(value, dict):
        return {name: public(part) for name, part in value.items()}
    if isinstance(value, str):
        words = [_last_part(word) for word in value.split(" ")]
        return " ".join(words)
    return value


def _last_part(word: str) -> str:
    head, sign, tail = word.rpartition("=")
    return f"{head}{sign}{Path(tail).name}" if Path(tail).is_absolute() else word


def _json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    return json.loads(path.read_text(encoding="utf-8"))
