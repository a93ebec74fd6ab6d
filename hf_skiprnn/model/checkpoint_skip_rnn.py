"""Checkpoints: refuse weights that do not fit their config, and name the code that travels beside a saved config.

transformers fills in what a file lacks with random numbers, and warns. That is right for a new head on a trained model,
and for a gate that is to be learned now. A file that lacks anything else is damaged or another model's: it is refused
before memory is taken for it.

transformers' own auto_map names only the class that is saved. A classifier serves three Auto classes and four
pipelines, and they must be found also where this package is not installed.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    # transformers copies every file that a relative import names, wherever the import stands: so the pipelines travel
    # with a checkpoint, and are loaded only when they are used.
    from .pipeline_skip_rnn import SkipRNNTextClassificationPipeline  # noqa: F401 - named for transformers' copying

NEW = re.compile(r"^(classifier|update_gate)\.")  # may be missing in a file: a head, and a gate that had no weights
HEAD = re.compile(r"^classifier\.")
CONFIG = "configuration_skip_rnn.SkipRNNConfig"
MODELING = "modeling_skip_rnn"
AUTO_CLASSES = {
    "SkipRNNModel": (),
    "SkipRNNForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ),
    "SkipRNNForFrameClassification": ("AutoModelForTokenClassification",),
}
PIPELINES = {
    "text-classification": ("SkipRNNTextClassificationPipeline", "AutoModelForSequenceClassification"),
    "audio-classification": ("SkipRNNAudioClassificationPipeline", "AutoModelForAudioClassification"),
    "image-classification": ("SkipRNNImageClassificationPipeline", "AutoModelForImageClassification"),
    "sequence-classification": ("SkipRNNSequenceClassificationPipeline", "AutoModelForSequenceClassification"),
}


class ShapeMismatchError(RuntimeError, ValueError):
    """A weight in a file has another shape than the config asks for: transformers raises RuntimeError for it."""


def refuse_foreign_weights(source: Any, loading_info: Any, ignore_mismatched_sizes: bool) -> None:
    """Refuse weights that do not fit the config.

    Args:
        source: where they came from, for the message.
        loading_info: transformers' `missing_keys` and `unexpected_keys` (names), `mismatched_keys` ((name, shape in the
            file, shape by the config) each).
        ignore_mismatched_sizes: as in from_pretrained.

    Raises:
        ValueError: a weight is missing; the message names it.
        ShapeMismatchError: a weight has another shape; the message names it and both shapes.
    """
    missing, unexpected = list(_bare(loading_info.missing_keys)), list(_bare(loading_info.unexpected_keys))
    strange = [name for name in unexpected if not HEAD.match(name)]
    # If the file has names that we do not know, its gate may be among them: then a missing gate is not a new one.
    lost = sorted(name for name in missing if not (HEAD if strange else NEW).match(name))
    if lost:
        instead = f" It holds {_some(strange)} instead." if strange else ""
        raise ValueError(
            f"The weights from {source} lack {_some(lost)}, which config.json asks for.{instead} They are damaged, or "
            "another model's: get the checkpoint again, or save it again with save_pretrained."
        )
    wrong = sorted(loading_info.mismatched_keys, key=lambda entry: (bool(HEAD.match(entry[0])), entry))
    if wrong and not ignore_mismatched_sizes:
        name, found, wanted = wrong[0]
        hint = "One of the two files is another model's: get both again."
        if all(HEAD.match(entry[0]) for entry in wrong):
            hint = "For a new head, pass ignore_mismatched_sizes=True."
        raise ShapeMismatchError(
            f"The weights from {source} do not fit config.json: {name} is {list(found)} there, and {list(wanted)} by "
            f"the config ({len(wrong)} such weights). {hint}"
        )


def refuse_broken_numbers(source: Any, model: nn.Module) -> None:
    """Raise ValueError if a weight is NaN or infinite, since all outputs would be NaN."""
    broken = [name for name, weight in model.named_parameters() if not weight.is_meta and not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"The weights from {source} hold NaN or infinite numbers in {_some(broken)}. The file is damaged, or "
            "training diverged: get the checkpoint again, or take an earlier one."
        )


def name_code(config: Any, model_class: str) -> None:
    """Set auto_map and custom_pipelines of a SkipRNNConfig for a checkpoint of `model_class`.

    They name files beside the checkpoint, never code in another repository. The config of a class that is not of this
    package stays as it is.
    """
    if model_class not in AUTO_CLASSES:
        return
    base = {"AutoConfig": CONFIG, "AutoModel": f"{MODELING}.SkipRNNModel"}
    config.auto_map = base | dict.fromkeys(AUTO_CLASSES[model_class], f"{MODELING}.{model_class}")
    tasks = PIPELINES if model_class == "SkipRNNForSequenceClassification" else {}
    config.custom_pipelines = {
        task: {"impl": f"pipeline_skip_rnn.{name}", "pt": [auto]}
        for task, (name, auto) in tasks.items()
        if (task == "text-classification") == (config.vocab_size is not None)
    }


def _bare(names: Iterable[str]) -> Iterator[str]:
    return (name.removeprefix("skip_rnn.") for name in names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
