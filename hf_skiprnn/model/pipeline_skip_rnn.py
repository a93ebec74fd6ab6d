"""Pipelines for texts, sounds, images and series of numbers; their results can include the number of steps read.

Where this package is not installed, `pipeline(task, model=folder, trust_remote_code=True)` finds them by the
checkpoint's config. After `import hf_skiprnn` they are registered: `pipeline(task, model=folder)` needs neither consent
nor code in the folder, and `pipeline(task, model=model, ...)` around a model object finds them too.
"""

# The methods of transformers' pipelines have different signatures, and the mixin below must work with all of them.
# mypy: disable-error-code="assignment, misc, override, safe-super"

from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    AudioClassificationPipeline,
    AutoModelForSequenceClassification,
    FeatureExtractionPipeline,
    ImageClassificationPipeline,
    Pipeline,
    TextClassificationPipeline,
)
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils.generic import ModelOutput

from .feature_extraction_skip_rnn import SkipRNNFeatureExtractor, is_one_sequence
from .inputs_skip_rnn import real_lengths

BATCH_SIZE = 64  # rows of a list that run together if the user names no batch_size


class ResultsWithUpdates(Pipeline):
    """The base class of the four pipelines: it splits the outputs of a batch into rows, and accepts empty texts.

    With `return_updates=True`, at construction or in a call, every result also holds `updates`, the number of steps
    read, and `steps`, the number of real steps.

    A list or dataset runs in batches of `batch_size` rows. The default is 64 for texts, series, and images of one size:
    padding is masked and takes no time, only memory. Where rows of very different length fill the memory, choose a
    smaller number. The default is 1, as in transformers, for generators, sounds, and images of any size.
    """

    _load_video_processor = False  # None would try to load one from every file of settings
    _runs_in_batches = False  # whether lists run in batches if the user names no batch_size

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.model.config
        if getattr(self.model, "per_frame", False):
            raise ValueError(
                f"A pipeline gives one answer for a sequence; {type(self.model).__name__} has one for each step. Call "
                "the model itself: model(...).logits [B, T, num_labels]."
            )
        for entry in (getattr(config, "custom_pipelines", None) or {}).values():
            # pipeline() replaced the class names in the config by classes, which cannot be saved as JSON.
            entry["pt"] = [getattr(auto, "__name__", auto) for auto in entry.get("pt", ())]

    def _sanitize_parameters(
        self,
        return_updates: bool | None = None,
        gate_shift: float | None = None,
        update_rate: float | None = None,
        **kwargs: Any,
    ) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        point = {"gate_shift": gate_shift, "update_rate": update_rate}
        forward |= {name: value for name, value in point.items() if value is not None}
        if return_updates is not None:
            postprocess["return_updates"] = return_updates
        return preprocess, forward, postprocess

    def preprocess(self, *args: Any, **params: Any) -> Any:
        """Return transformers' model inputs. An empty text becomes one masked step: a row without real steps."""
        inputs: Any = super().preprocess(*args, **params)
        if "input_ids" in inputs and inputs["input_ids"].shape[1] == 0:
            empty = inputs["input_ids"].new_zeros((1, 1), dtype=torch.long)
            inputs.update({"input_ids": empty, "attention_mask": empty})
        return inputs

    def __call__(self, inputs: Any = None, **kwargs: Any) -> Any:
        """Run transformers' pipeline on one input, a list or a dataset."""
        is_many = isinstance(inputs, (list, torch.utils.data.Dataset)) and isinstance(inputs, Sized)
        workers = kwargs.get("num_workers") or self._num_workers  # transformers then collates, and needs a pad token
        if is_many and self._runs_in_batches and self._batch_size is None and not workers:
            kwargs = {"batch_size": BATCH_SIZE} | kwargs
        return super().__call__(inputs, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """Return an iterator over the results, as in transformers, but prepare the rows of a batch together."""
        if num_workers or batch_size == 1:
            options = preprocess_params, forward_params, postprocess_params
            return super().get_iterator(inputs, num_workers, batch_size, *options)
        # A subclass that prepares a row in its own way does so in a batch too.
        is_own = "preprocess" in vars(self) or type(self).preprocess is not ResultsWithUpdates.preprocess

        def batch(rows: list[Any]) -> Any:
            found = None if is_own else self.preprocess_rows(rows, **preprocess_params)
            return found or joined([self.preprocess(row, **preprocess_params) for row in rows])

        kind = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        loader = DataLoader(kind(inputs, _unchanged, {}), batch_size, collate_fn=batch)
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return Results(outputs, self.postprocess, postprocess_params, inputs)

    def preprocess_rows(self, rows: list[Any], **params: Any) -> dict[str, Tensor] | None:
        """Return the model inputs of a batch of rows; None: prepare each row by itself."""
        return None

    def _forward(self, input_tensors: Any, **params: Any) -> ModelOutput:
        """Return only outputs with one row for each input, because transformers splits every output into rows."""
        out: Any = super()._forward({**input_tensors, **params})
        return ModelOutput(logits=out.logits, num_updates=out.num_updates, num_steps=real_lengths(input_tensors))

    def postprocess(self, model_outputs: ModelOutput, return_updates: bool = False, **params: Any) -> Any:
        """Return transformers' result; with return_updates, add `updates` and `steps`."""
        results: Any = super().postprocess(model_outputs, **params)
        if return_updates:
            used = {"updates": int(model_outputs["num_updates"][0]), "steps": int(model_outputs["num_steps"][0])}
            for result in [results] if isinstance(results, dict) else results:
                result.update(used)
        return results


def _unchanged(row: Any) -> Any:
    return row


class Results(PipelineIterator):
    """transformers' iterator over results, with as many as there are inputs; its own length is that of the batches."""

    def __init__(self, outputs: Any, postprocess: Any, params: dict[str, Any], inputs: Any) -> None:
        super().__init__(outputs, postprocess, params)
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)


def joined(rows: list[Any]) -> dict[str, Tensor]:
    """Return a batch of model inputs [1, T, ...], padded on the right and masked; images must have one size."""
    for row in rows:
        for name in ("input_ids", "input_values"):
            if name in row and "attention_mask" not in row:
                row["attention_mask"] = torch.ones(row[name].shape[:2], dtype=torch.long)
    return {name: pad_sequence([row[name][0] for row in rows], batch_first=True) for name in rows[0]}


class SkipRNNTextClassificationPipeline(ResultsWithUpdates, TextClassificationPipeline):
    """transformers' "text-classification" pipeline for Skip RNNs; see ResultsWithUpdates."""

    _runs_in_batches = True

    def preprocess_rows(self, rows: list[Any], **params: Any) -> dict[str, Tensor] | None:
        """Return input_ids and attention_mask [B, T]; pairs of texts are prepared one by one."""
        if "text_pair" in params or not all(isinstance(row, str) for row in rows):
            return None
        tokenizer: Any = self.tokenizer
        columns = dict(tokenizer(rows, **params))
        columns.setdefault("attention_mask", [[1] * len(ids) for ids in columns["input_ids"]])
        # An empty text becomes one masked step.
        parts = {
            name: [torch.from_numpy(np.array(x or [0], np.int64)) for x in lists] for name, lists in columns.items()
        }
        return {name: pad_sequence(tensors, batch_first=True) for name, tensors in parts.items()}


class SkipRNNAudioClassificationPipeline(ResultsWithUpdates, AudioClassificationPipeline):
    """transformers' "audio-classification" pipeline for Skip RNNs; see ResultsWithUpdates.

    A sound may also be a list of samples in [-1, 1], as in JSON: [T] or [T][1].
    """

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Classify one sound or a list of sounds."""
        return super().__call__(np.asarray(inputs) if is_one_sequence(inputs, 1) else inputs, **kwargs)

    def preprocess(self, inputs: Any, **params: Any) -> Any:
        """Return transformers' model inputs."""
        samples = np.asarray(inputs) if isinstance(inputs, (list, tuple)) else inputs
        is_column = isinstance(samples, np.ndarray) and samples.ndim == 2 and samples.shape[1] == 1
        return super().preprocess(samples[:, 0] if is_column else samples, **params)


class SkipRNNImageClassificationPipeline(ResultsWithUpdates, ImageClassificationPipeline):
    """transformers' "image-classification" pipeline for Skip RNNs; see ResultsWithUpdates."""

    @property
    def _runs_in_batches(self) -> bool:
        processor: Any = self.image_processor
        size = getattr(processor, "size", None)  # in transformers' processors it need not be every image's size
        return isinstance(size, dict) and set(size) == {"height", "width"} and not hasattr(processor, "do_resize")

    def preprocess_rows(self, rows: list[Any], timeout: float | None = None, **params: Any) -> dict[str, Tensor] | None:
        """Return pixel_values [B, C, H, W]; arrays that are batches of one are prepared one by one."""
        images = [row if isinstance(row, (np.ndarray, Tensor)) else load_image(row, timeout=timeout) for row in rows]
        if any(getattr(image, "ndim", 0) > 3 for image in images):
            return None
        processor: Any = self.image_processor
        return processor(images=images, return_tensors="pt", **params).to(self.dtype)


class SequenceClassificationPipeline(Pipeline):
    """Classifies series of numbers: arrays [T, input_size], or [T] if input_size is 1.

    A series may also be nested lists, as in JSON: [T] or [T][input_size]. The checkpoint's feature extractor prepares
    it; if there is none, the numbers are not changed. The result for one series is a list of {"label", "score"}, best
    first; for a regression the scores are the values, in order. The result for a list of series, which may have
    different lengths, is a list of such lists.

    Call arguments: top_k, the number of labels to return (default: all); sampling_rate, which must be the extractor's.

    Raises:
        ValueError: the model reads tokens; or a series has another width, is empty, or holds NaN or infinite values.
    """

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor: bool | None = None  # None: load it if the checkpoint has one
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

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Classify one series or a list of series."""
        takes_values = getattr(self.feature_extractor, "features", "values") == "values"
        width = self.model.config.input_size if takes_values else None
        return super().__call__(np.asarray(inputs) if is_one_sequence(inputs, width) else inputs, **kwargs)

    def preprocess(self, input_: Any, sampling_rate: int | None = None, **params: Any) -> Any:
        """Return input_values [1, T, input_size] and attention_mask [1, T] of one series."""
        extractor: Any = self.feature_extractor
        return extractor([input_], sampling_rate=sampling_rate, return_tensors="pt")

    def _forward(self, input_tensors: Any, **params: Any) -> Any:
        return self.model(**input_tensors)

    def postprocess(self, model_outputs: ModelOutput, top_k: int | None = None, **params: Any) -> Any:
        """Return labels and scores of logits [1, num_labels]."""
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
    """The "sequence-classification" pipeline; see SequenceClassificationPipeline and ResultsWithUpdates."""

    _runs_in_batches = True

    def preprocess_rows(self, rows: list[Any], **params: Any) -> dict[str, Tensor] | None:
        """Return input_values [B, T, input_size] and attention_mask [B, T]."""
        if is_one_sequence(rows, self.model.config.input_size):  # rows of one step
            return None
        extractor: Any = self.feature_extractor
        return extractor(rows, return_tensors="pt", return_attention_mask=True, **params)


class SkipRNNFeaturesPipeline(FeatureExtractionPipeline):
    """transformers' "feature-extraction" pipeline for SkipRNNModel: every step's last_hidden_state."""

    def _forward(self, input_tensors: Any, **params: Any) -> ModelOutput:
        return ModelOutput(last_hidden_state=super()._forward(input_tensors, **params).last_hidden_state)


PIPELINES: dict[str, tuple[type[Pipeline], type[Pipeline]]] = {  # task -> transformers' class and ours
    "text-classification": (TextClassificationPipeline, SkipRNNTextClassificationPipeline),
    "audio-classification": (AudioClassificationPipeline, SkipRNNAudioClassificationPipeline),
    "image-classification": (ImageClassificationPipeline, SkipRNNImageClassificationPipeline),
    "feature-extraction": (FeatureExtractionPipeline, SkipRNNFeaturesPipeline),
}


def register_pipelines() -> None:
    """Make pipeline(task, model=...) use our pipelines for Skip RNN objects, and transformers' for all other models.

    transformers' pipelines cannot split our outputs into rows, because the budget loss and the state have no such rows.
    """
    if "sequence-classification" not in PIPELINE_REGISTRY.get_supported_tasks():
        own = SkipRNNSequenceClassificationPipeline
        PIPELINE_REGISTRY.register_pipeline("sequence-classification", own, AutoModelForSequenceClassification)
    for task, (default, own) in PIPELINES.items():
        # `register_pipeline` would warn, and then pipelines of all models would be saved as custom pipelines.
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = _by_model(default, own)


def _by_model(default: type[Pipeline], own: type[Pipeline]) -> type[Pipeline]:
    """Return a class that constructs `own` for a Skip RNN, and `default` for any other model."""

    class ByModel(default):  # type: ignore[valid-type]  # a class that is only known at run time
        # None would look for a video processor beside our image processor, and ask for consent to run its code. No
        # pipeline of these tasks uses one.
        _load_video_processor = False

        def __new__(cls, *args: Any, **kwargs: Any) -> Pipeline:
            model = kwargs["model"] if "model" in kwargs else args[0]
            return (own if model.config.model_type == "skip_rnn" else default)(*args, **kwargs)

    return ByModel
