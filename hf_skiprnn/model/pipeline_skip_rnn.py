"""Pipelines whose results can carry the updates: for texts, sounds, pictures, and raw series of numbers.

`pipeline(task, model=..., trust_remote_code=True)` finds them by the checkpoint's own config, with or without this
package installed. Around a model object: `pipeline(task, model=model, pipeline_class=...)`.
"""

# transformers' pipelines narrow each other's signatures, and a mixin meets them all.
# mypy: disable-error-code="assignment, misc, override, safe-super"

from typing import Any

from torch import Tensor
from transformers import (
    AudioClassificationPipeline,
    ImageClassificationPipeline,
    Pipeline,
    TextClassificationPipeline,
)
from transformers.utils.generic import ModelOutput

from .feature_extraction_skip_rnn import SkipRNNFeatureExtractor


class ResultsWithUpdates(Pipeline):
    """What the four pipelines add to transformers' own.

    `return_updates=True`, at construction or in a call, adds to every result `updates`, how many steps were read, and
    `steps`, how many real ones there were.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.model.config
        if getattr(config, "custom_pipelines", None):
            # pipeline() leaves classes where their names were, and JSON has no classes.
            config.custom_pipelines = {
                task: info | {"pt": [getattr(auto, "__name__", auto) for auto in info["pt"]]}
                for task, info in config.custom_pipelines.items()
            }

    def _sanitize_parameters(self, return_updates: bool | None = None, **kwargs: Any) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if return_updates is not None:
            postprocess["return_updates"] = return_updates
        return preprocess, forward, postprocess

    def _forward(self, input_tensors: Any, **params: Any) -> ModelOutput:
        """Only what is per row: pipelines take batches apart along the first axis of every output."""
        out: Any = super()._forward(input_tensors, **params)
        return ModelOutput(logits=out.logits, num_updates=out.num_updates, num_steps=real_steps(input_tensors))

    def postprocess(self, model_outputs: ModelOutput, return_updates: bool = False, **params: Any) -> Any:
        """transformers' result, with the updates if they are asked for."""
        results: Any = super().postprocess(model_outputs, **params)
        if return_updates:
            used = {"updates": int(model_outputs["num_updates"][0]), "steps": int(model_outputs["num_steps"][0])}
            for result in [results] if isinstance(results, dict) else results:
                result.update(used)
        return results


def real_steps(inputs: dict[str, Any]) -> Tensor:
    """Real steps of each row of a batch of model inputs: -> [B] integer."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return (mask != 0).sum(dim=1)
    pixels = inputs.get("pixel_values")
    if pixels is not None:
        return pixels.new_full((pixels.shape[0],), pixels.shape[2] * pixels.shape[3]).long()
    values = inputs["input_values"] if "input_values" in inputs else inputs["input_ids"]
    return values.new_full((values.shape[0],), values.shape[1]).long()


class SkipRNNTextClassificationPipeline(ResultsWithUpdates, TextClassificationPipeline):
    """transformers' "text-classification"; see ResultsWithUpdates."""


class SkipRNNAudioClassificationPipeline(ResultsWithUpdates, AudioClassificationPipeline):
    """transformers' "audio-classification"; see ResultsWithUpdates."""


class SkipRNNImageClassificationPipeline(ResultsWithUpdates, ImageClassificationPipeline):
    """transformers' "image-classification"; see ResultsWithUpdates."""


class SequenceClassificationPipeline(Pipeline):
    """Classifies raw series: arrays [T, input_size] (or [T] where input_size is 1) to labels and scores.

    The checkpoint's feature extractor is used where it has one, else the numbers are taken as they are. One array gives
    a list of {"label", "score"}, best first (for a regression: the values, in order); a list of arrays gives a list of
    such lists. Arrays of one batch may have different lengths.

    Call arguments: top_k, how many labels (default: all); sampling_rate, checked against the extractor's.

    Raises:
        ValueError: the model reads tokens; an array of another width, empty, or with values that are not finite.
    """

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor: bool | None = None  # loaded if there is one
    _load_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.model.config
        if config.vocab_size is not None:
            raise ValueError(
                f'"sequence-classification" reads numbers, but this model reads tokens (vocab_size = '
                f'{config.vocab_size}). Use pipeline("text-classification").'
            )
        if self.feature_extractor is None:
            self.feature_extractor = SkipRNNFeatureExtractor(feature_size=config.input_size)

    def _sanitize_parameters(self, top_k: int | None = None, sampling_rate: int | None = None) -> Any:
        preprocess = {} if sampling_rate is None else {"sampling_rate": sampling_rate}
        return preprocess, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, input_: Any, sampling_rate: int | None = None, **params: Any) -> Any:
        """One array -> input_values [1, T, input_size] and attention_mask [1, T]."""
        extractor: Any = self.feature_extractor
        return extractor([input_], sampling_rate=sampling_rate, return_tensors="pt")

    def _forward(self, input_tensors: Any, **params: Any) -> Any:
        return self.model(**input_tensors)

    def postprocess(self, model_outputs: ModelOutput, top_k: int | None = None, **params: Any) -> Any:
        """Logits [1, num_labels] -> labels and scores."""
        config: Any = self.model.config
        logits = model_outputs["logits"][0].float()
        kind = config.problem_type or ("regression" if logits.numel() == 1 else "single_label_classification")
        if kind == "regression":
            scores, order = logits, range(logits.numel())
        else:
            scores = logits.softmax(-1) if kind == "single_label_classification" else logits.sigmoid()
            order = scores.argsort(descending=True).tolist()
        return [{"label": config.id2label[i], "score": scores[i].item()} for i in list(order)[:top_k]]


class SkipRNNSequenceClassificationPipeline(ResultsWithUpdates, SequenceClassificationPipeline):
    """The registered "sequence-classification"; see SequenceClassificationPipeline and ResultsWithUpdates."""
