"""What a saved config says of the code beside it, so that Auto classes and pipeline() find all of it.

transformers writes down only the class that is saved. A classifier serves three Auto classes and four pipelines, also
where this package is not installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # transformers copies the files that relative imports name, wherever they stand: so the pipelines travel, and are
    # loaded only when they are used.
    from .pipeline_skip_rnn import SkipRNNTextClassificationPipeline  # noqa: F401

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


def name_code(config: Any, model_class: str) -> None:
    """Set auto_map and custom_pipelines of a SkipRNNConfig to what a checkpoint of `model_class` can be loaded as.

    Everything is named relative to the checkpoint, never in another repository. A class that is not of this package is
    left alone.
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
