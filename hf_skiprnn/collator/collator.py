"""SkipRNNDataCollator: chooses columns, pads sequences and masks the padding."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor

from .cells import KEEP_COLUMNS, Cells, Row, axes, cells_of, ids_of, is_sound, present, same_shape, samples
from .targets import Targets

logger = logging.get_logger(__name__)

PREPARED = ("input_ids", "input_values", "pixel_values")
LABELS = ("labels", "label")


class SkipRNNDataCollator:
    """Turns rows into a batch: pads sequences, masks the padding, and numbers the names of classes.

    For Trainer, SkipRNNTrainer (both with remove_unused_columns=False) and DataLoader. A row is a dictionary. Columns
    that are not chosen are ignored.

    Args:
        model: the classifier that the batches are for. Its config tells the names of classes (id2label), whether
            labels are numbers (problem_type="regression" or num_labels=1), and whether it takes token ids (vocab_size).
        processor: a tokenizer for text, a SkipRNNImageProcessor for images, or a SkipRNNFeatureExtractor for sounds and
            series. None: token ids and series are only padded.
        input_column: column of the sequences. None: the only column that can be the input. A column named input_ids,
            input_values or pixel_values holds what a processor returned, as from `datasets.map`; it is only padded,
            with its attention_mask if there is one.
        label_column: column of the labels. None: "labels" or "label"; without either, batches have no labels.
        max_length: keep only so many steps of a sequence, from its start. None: all.

    Raises:
        TypeError: the processor is of another kind.
        ValueError: the processor does not fit the model's config; or max_length is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        input_column: str | None = None,
        label_column: str | None = None,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {max_length}.")
        _check_processor(processor, model.config)
        # The model itself is not kept, because workers of a DataLoader get copies of the collator.
        self._config = cast(Any, model).config
        self._targets = Targets(
            self._config, any(getattr(part, "per_frame", False) is True for part in model.modules())
        )
        self._plain = SkipRNNFeatureExtractor(self._config.input_size)
        self.processor, self.max_length = processor, max_length
        self.input_column, self.label_column = input_column, label_column

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the model's inputs and labels for a batch of rows.

        Returns:
            input_ids [B, T] int64, input_values [B, T, input_size] float32, or pixel_values [B, C, H, W] float32;
            attention_mask [B, T] int64, except for images; and labels: classes [B] int64, several classes
            [B, num_labels] float32 of 0 and 1, numbers [B] or [B, num_labels] float32, or, for a
            SkipRNNForFrameClassification, one of the first two at every step, with -100 at padding.

        Raises:
            ValueError: a column is missing or ambiguous; or a cell has another shape or type than the first ones, is
                empty, or holds an unknown class. The message names row and column.
        """
        column = self._choose_input(rows[0])
        name = self._input_name(column)
        if name == "pixel_values":
            cells = cells_of(rows, column)
            pixels = same_shape([self._image(*cell, column) for cell in cells], [name for _, name in cells])
            if self.max_length is not None and self.max_length < pixels[0, 0].numel():
                raise ValueError(
                    f"max_length={self.max_length} would cut images of {pixels[0, 0].numel()} pixels, which are read "
                    "whole. Make them smaller, or leave max_length out."
                )
            batch, mask = {name: pixels}, torch.ones(len(rows), pixels[0, 0].numel(), dtype=torch.long)
        else:
            steps = [x[: self.max_length] for x in self._sequences(name, column, rows)]
            padding = (self._config.pad_token_id or 0) if name == "input_ids" else 0
            mask = self._mask(rows, column, [len(x) for x in steps])
            batch = {name: pad_sequence(steps, batch_first=True, padding_value=padding), "attention_mask": mask}
        if (label := self._choose_label(rows[0])) is not None:
            batch["labels"] = self._targets.encode(cells_of(rows, label), mask, self.max_length)
        return batch

    def _choose_input(self, row: Row) -> str:
        """Return the name of the input column, which the first row decides."""
        if self.input_column is not None:
            return self.input_column
        for name in PREPARED:
            if name in row:
                return name
        labels = LABELS if self.label_column is None else (self.label_column,)
        fitting = [name for name, cell in row.items() if name not in labels and self._fits(cell)]
        if len(fitting) == 1:
            return fitting[0]
        text = f"Rows have columns {', '.join(row)}; {', '.join(fitting) or 'none'} can be the input. "
        if fitting:
            raise ValueError(f"{text}Choose one with input_column=.")
        raise ValueError(
            f"{text}Text needs a tokenizer as processor, images a SkipRNNImageProcessor, sounds a "
            f"SkipRNNFeatureExtractor. {KEEP_COLUMNS}"
        )

    def _fits(self, cell: Any) -> bool:
        """Whether a cell can be a sequence, by its type and the processor."""
        if isinstance(self.processor, PreTrainedTokenizerBase):
            return isinstance(cell, str)
        if isinstance(self.processor, BaseImageProcessor):
            return hasattr(cell, "getbands") or axes(cell) > 1  # of PIL, or an array
        return is_sound(cell) or axes(cell) > 0

    def _input_name(self, column: str) -> str:
        """Return the name of the model's argument for the input column."""
        if column in PREPARED:
            return column
        if isinstance(self.processor, BaseImageProcessor):
            return "pixel_values"
        return "input_values" if self._config.vocab_size is None else "input_ids"

    def _choose_label(self, row: Row) -> str | None:
        """Return the name of the label column; None if there is none."""
        if self.label_column is not None:
            return self.label_column
        for name in LABELS:
            if name in row:
                return name
        logger.warning_once(
            f"Rows have no column label or labels, so batches have no labels. Columns: {', '.join(row)}. If one holds "
            "the labels, name it with label_column=."
        )
        return None

    def _sequences(self, name: str, column: str, rows: Sequence[Row]) -> list[Tensor]:
        """Return the token ids [T] int64 or steps [T, input_size] float32 of each row."""
        cells = cells_of(rows, column)
        if name == "input_values":
            return [torch.from_numpy(self._steps(*cell, column)) for cell in cells]
        if column not in PREPARED and isinstance(self.processor, PreTrainedTokenizerBase):
            return self._tokenized(cells)
        return [ids_of(*cell) for cell in cells]

    def _tokenized(self, cells: Cells) -> list[Tensor]:
        for cell, name in cells:
            if not isinstance(cell, str):
                raise ValueError(f"{name} must hold text; got {type(cell).__name__}.")
        longest = self.max_length or self.processor.model_max_length
        options = {"truncation": True, "max_length": longest} if longest < LARGE_INTEGER else {}
        ids = self.processor([text for text, _ in cells], **options)["input_ids"]
        return [torch.from_numpy(np.array(row, np.int64)) for row in ids]

    def _steps(self, cell: Any, name: str, column: str) -> np.ndarray:
        """Return the steps [T, input_size] float32 of a series or sound."""
        if column in PREPARED:
            return self._plain.extract(present(cell, name), name)
        extractor = self._plain if self.processor is None else self.processor
        if is_sound(cell):
            cell = samples(cell, name, extractor.sampling_rate)
        return extractor.extract(present(cell, name), name)

    def _image(self, cell: Any, name: str, column: str) -> Tensor:
        """Return an image as [C, H, W] float32."""
        image = present(cell, name)
        if column in PREPARED:
            return torch.as_tensor(np.asarray(image), dtype=torch.float32)
        try:
            pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is no image for the processor: {error}") from error
        return pixels

    def _mask(self, rows: Sequence[Row], column: str, lengths: list[int]) -> Tensor:
        """Return the mask [B, T] int64: of prepared rows their own, padded with 0, or 1 at every step of a row."""
        if column not in PREPARED or not any("attention_mask" in row for row in rows):
            return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        masks = [ids_of(*cell)[: self.max_length] for cell in cells_of(rows, "attention_mask")]
        for number, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
            if len(mask) != length:
                raise ValueError(
                    f"Row {number} of the batch has {length} steps in {column!r}, but {len(mask)} in 'attention_mask'."
                )
        return pad_sequence(masks, batch_first=True)


def _check_processor(processor: Any, config: Any) -> None:
    """Raise TypeError or ValueError if a model with this config cannot read what the processor returns."""
    if isinstance(processor, PreTrainedTokenizerBase):
        if (config.vocab_size or 0) < len(processor):
            raise ValueError(
                f"The tokenizer has {len(processor)} tokens, but the model has vocab_size={config.vocab_size}. Make "
                "the model with vocab_size=len(tokenizer)."
            )
    elif isinstance(processor, BaseImageProcessor) or hasattr(processor, "extract"):
        width = getattr(processor, "feature_size", None) or getattr(processor, "num_channels", None)
        if config.vocab_size is not None or width != config.input_size:
            raise ValueError(
                f"{type(processor).__name__} gives {width} numbers a step, but the model has input_size="
                f"{config.input_size} and vocab_size={config.vocab_size}. Make the model with input_size={width}."
            )
    elif processor is not None:
        raise TypeError(
            "processor must be a tokenizer, a SkipRNNImageProcessor or a SkipRNNFeatureExtractor; got "
            f"{type(processor).__name__}."
        )
