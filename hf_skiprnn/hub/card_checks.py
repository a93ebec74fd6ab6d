"""Check a model card without a network. Values that only the Hub knows, such as licences, are checked by the Hub."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LIBRARY = "transformers"
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A path on a local machine.
LOCAL_PATH = re.compile(r"(?<![\w./:-])(/(home|root|Users|tmp|var|mnt|media|srv|data|scratch)/|[A-Z]:\\)\S*")


def card_problems(text: str, folder: Path | None = None) -> list[str]:
    """Return the problems of a README.md, one sentence each. `folder`: where its pictures are."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if found is None:
        return ["README.md must begin with metadata: a line ---, YAML, and another line ---."]
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"The metadata is no plain YAML: {str(error).splitlines()[0]}"]
    if not isinstance(metadata, dict):
        return [f"The metadata must be names with values; got {type(metadata).__name__}."]
    problems = [*_fields(metadata), *_model_index(metadata.get("model-index"))]
    problems += [f"README.md names a path of a machine: {path[0]}" for path in LOCAL_PATH.finditer(text)]
    if folder is not None:
        pictures = re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", text)
        absent = [name for name in pictures if "://" not in name and not (folder / name).is_file()]
        problems += [f"README.md shows {name}, which is not in the folder." for name in absent]
    return problems


def _fields(metadata: dict[str, Any]) -> Iterator[str]:
    if metadata.get("library_name") != LIBRARY:
        got = repr(metadata.get("library_name"))
        yield f"library_name must be {LIBRARY!r}, or the Hub does not know how to load it; got {got}."
    for name in ("license", "pipeline_tag"):
        if not isinstance(metadata.get(name), str | None):
            yield f"{name} must be a word; got {metadata[name]!r}."
    tags = metadata.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        yield f"tags must be a list of words; got {tags!r}."
    elif "custom_code" not in tags:
        yield "tags must hold custom_code, so that the Hub's snippet sets trust_remote_code for the model's own code."
    datasets = metadata.get("datasets", [])
    for name in datasets if isinstance(datasets, list) else [datasets]:
        if not isinstance(name, str) or not REPO_ID.fullmatch(name):
            yield f"datasets must be ids of data sets on the Hub; got {name!r}."


def _model_index(index: Any) -> Iterator[str]:
    if index is None:
        yield "model-index is missing: without it the results are not shown beside the card."
        return
    if not isinstance(index, list) or not all(isinstance(entry, dict) and entry.get("name") for entry in index):
        yield "model-index must be a list of models, each with a name."
        return
    for entry in index:
        results = entry.get("results")
        if not isinstance(results, list) or not results:
            yield f"model-index: {entry['name']} needs results."
            continue
        for number, result in enumerate(results):
            yield from (f"model-index, result {number}: {problem}" for problem in _result(result))


def _result(result: Any) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f"must be names with values; got {result!r}."
        return
    for group, names in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(group)
        for name in names:
            if not isinstance(part, dict) or not isinstance(part.get(name), str):
                yield f"{group}.{name} is missing."
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield "metrics are missing."
        return
    for metric in metrics:
        value = metric.get("value") if isinstance(metric, dict) else None
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            yield f"a metric needs a type; got {metric!r}."
        elif isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
            yield f"{metric['type']} needs a value; got {value!r}."
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{metric['type']} is {value}, which the Hub does not accept as a number."
