"""What the Hub would refuse of a model card, or show wrongly, found before anything is sent."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# The Hub's own lists: hf.co/docs/hub/repositories-licenses and hf.co/tasks.
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0
    ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905 - a hundred quotes hide the words
)
PIPELINE_TAGS = frozenset(
    """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction
    image-segmentation image-text-to-text image-to-3d image-to-image image-to-text image-to-video keypoint-detection
    mask-generation object-detection other question-answering reinforcement-learning robotics sentence-similarity
    summarization table-question-answering tabular-classification tabular-regression text-classification text-generation
    text-ranking text-to-3d text-to-audio text-to-image text-to-speech text-to-video time-series-forecasting
    token-classification translation unconditional-image-generation video-classification video-text-to-text
    video-to-video visual-document-retrieval visual-question-answering voice-activity-detection zero-shot-classification
    zero-shot-image-classification zero-shot-object-detection
    """.split()  # noqa: SIM905 - a hundred quotes hide the words
)
LIBRARY = "transformers"
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A path of somebody's machine.
LOCAL_PATH = re.compile(r"(?<![\w./:-])(/(home|root|Users|tmp|var|mnt|media|srv|data|scratch)/|[A-Z]:\\)\S*")


def card_problems(text: str, folder: Path | None = None) -> list[str]:
    """Sentences about what is wrong with a README.md; empty if nothing is. `folder`: where its pictures stand."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if found is None:
        return ["README.md must begin with metadata: a line ---, YAML, and a line --- again."]
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
    for name, known in (("license", LICENSES), ("pipeline_tag", PIPELINE_TAGS), ("library_name", {LIBRARY})):
        value = metadata.get(name)
        if value is None:
            yield f"{name} is missing: without it the Hub does not know what this model is or how to run it."
        elif not isinstance(value, str) or value not in known:
            some = ", ".join(sorted(known)[:4])
            yield f"{name} is {value!r}, which the Hub does not know; one of {some}{', ...' if len(known) > 4 else ''}."
    tags = metadata.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        yield f"tags must be a list of words; got {tags!r}."
    elif "custom_code" not in tags:
        yield "tags must hold custom_code: the model's code travels with it, and the Hub's snippet then says so."
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
            yield f"{metric['type']} is {value}, which is no number to the Hub."
