"""What a column of anybody's data can be to a Skip RNN: text, pictures, sounds or series of numbers.

Every kind is fitted on training cells, turns cells into a batch, and has the processor that repeats this at inference.
A cell comes with its name ("train row 17, column 'wave'"), which every error gives.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Array2D, Audio, Image, LargeList, List, Value
from transformers import AutoTokenizer

from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor
from hf_skiprnn.model.image_processing_skip_rnn import SkipRNNImageProcessor
from hf_skiprnn.tasks.base import Batch
from hf_skiprnn.tasks.readers.sounds import read_sound
from hf_skiprnn.tasks.readers.words import real_gates, tokenize, train_tokenizer, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cells = Iterable[tuple[Any, str]]  # (content, name)
LONGEST = 10**9  # words of a text that is not cropped
MEL_BANDS = 32
FRAME, HOP = 0.025, 0.010  # s


class Input(ABC):
    """A kind of input column. max_length: crop to so many steps; None: read all."""

    processor: Any

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length

    @abstractmethod
    def fit(self, cells: Cells) -> None:
        """Make the processor from training cells."""

    @abstractmethod
    def load(self, checkpoint: str) -> None:
        """Take a checkpoint's processor."""

    @abstractmethod
    def batch(self, cells: Cells) -> Batch:
        """The model's inputs."""

    @abstractmethod
    def model_defaults(self) -> dict[str, Any]:
        """What it asks of SkipRNNConfig."""

    @abstractmethod
    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        """Which steps were read."""

    def page(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> str | None:
        """The same as an HTML page; None where a picture is better."""
        return None


class TextInput(Input):
    """Words of a text, by a word-level tokenizer made from the training texts."""

    def __init__(self, max_length: int | None, vocabulary: int) -> None:
        super().__init__(max_length)
        self.vocabulary = vocabulary

    def fit(self, cells: Cells) -> None:
        texts = (_of_type(cell, name, str, "text") for cell, name in cells)
        self.processor = train_tokenizer(texts, self.vocabulary, self.max_length or LONGEST)

    def load(self, checkpoint: str) -> None:
        self.processor = AutoTokenizer.from_pretrained(checkpoint, model_max_length=self.max_length or LONGEST)

    def batch(self, cells: Cells) -> Batch:
        return tokenize(self.processor, [_of_type(cell, name, str, "text") for cell, name in cells])

    def model_defaults(self) -> dict[str, Any]:
        pad = self.processor.pad_token_id
        return {"input_size": 300, "vocab_size": len(self.processor), "pad_token_id": pad}

    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        from hf_skiprnn.evaluation.figures import words_read

        return words_read(
            words_of(self.processor, batch), real_gates(gates, batch["attention_mask"]), predicted, labels
        )

    def page(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> str:
        from hf_skiprnn.evaluation.figures import words_read_page

        words = words_of(self.processor, batch)
        return words_read_page(words, real_gates(gates, batch["attention_mask"]), predicted, labels)


class ImageInput(Input):
    """Pixels of pictures of one size, in row order; gray or in colour as the first one is."""

    def fit(self, cells: Cells) -> None:
        cell, name = next(iter(cells))
        first = _present(cell, name)
        width, height = first.size
        channels = 1 if first.mode in ("1", "L", "LA") else 3
        self.processor = SkipRNNImageProcessor(channels, {"height": height, "width": width})

    def load(self, checkpoint: str) -> None:
        self.processor = SkipRNNImageProcessor.from_pretrained(checkpoint)

    def batch(self, cells: Cells) -> Batch:
        pixels = []
        for cell, name in cells:
            try:
                pixels.append(self.processor(_present(cell, name), return_tensors="pt")["pixel_values"])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return {"pixel_values": torch.cat(pixels)}

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": self.processor.num_channels}

    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        from hf_skiprnn.evaluation.figures import pixels_read

        return pixels_read(batch["pixel_values"].mean(dim=1).numpy(), gates, predicted, labels)


class SeriesInput(Input):
    """Numbers of one or several channels at every step, each channel standardised over the training rows."""

    def fit(self, cells: Cells) -> None:
        (cell, name), cells = _peek(cells)
        first = np.asarray(_present(cell, name), dtype=object)
        channels = len(first[0]) if len(first) and isinstance(first[0], (list, tuple, np.ndarray)) else 1
        plain = SkipRNNFeatureExtractor(channels)
        self.processor = SkipRNNFeatureExtractor(channels).fit(
            plain.extract(_present(c, n), n)[: self.max_length] for c, n in cells
        )

    def load(self, checkpoint: str) -> None:
        self.processor = SkipRNNFeatureExtractor.from_pretrained(checkpoint)

    def batch(self, cells: Cells) -> Batch:
        steps = [self.steps(cell, name)[: self.max_length] for cell, name in cells]
        from transformers import BatchFeature

        return dict(self.processor.pad(BatchFeature({"input_values": steps}), return_tensors="pt"))

    def steps(self, cell: Any, name: str) -> np.ndarray:
        """A cell's steps [T, C], standardised."""
        return self.processor.extract(_present(cell, name), name)

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": self.processor.feature_size}

    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        from hf_skiprnn.evaluation.figures import channels_read

        mask = batch["attention_mask"].numpy() != 0
        rows = [x[m] for x, m in zip(batch["input_values"].numpy(), mask, strict=True)]
        return channels_read(rows, real_gates(gates, batch["attention_mask"]), predicted, labels)


class SoundInput(SeriesInput):
    """Log-mel frames or samples of sounds, at the sampling rate of the first one; others are resampled."""

    def __init__(self, max_length: int | None, features: str, sampling_rate: int | None) -> None:
        super().__init__(max_length)
        self.features, self.sampling_rate = features, sampling_rate

    def fit(self, cells: Cells) -> None:
        (cell, name), cells = _peek(cells)
        rate = self.sampling_rate or read_sound(cell, name)[1]
        channels = MEL_BANDS if self.features == "log_mel" else 1
        frame, hop = round(FRAME * rate), round(HOP * rate)
        self.processor = SkipRNNFeatureExtractor(channels, rate, self.features, frame_length=frame, hop_length=hop)
        self.processor.fit(read_sound(c, n, rate)[0] for c, n in cells)

    def steps(self, cell: Any, name: str) -> np.ndarray:
        return self.processor.extract(read_sound(cell, name, self.processor.sampling_rate)[0], name)


def input_of(feature: Any, max_length: int | None, vocabulary: int, sound_features: str) -> Input | None:
    """The kind of a column by its `datasets` feature; None for one that no sequence can be read from."""
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return TextInput(max_length, vocabulary)
    if isinstance(feature, Image):
        return ImageInput(max_length)
    if isinstance(feature, Audio):
        return SoundInput(max_length, sound_features, feature.sampling_rate)
    if isinstance(feature, Array2D) or _is_numbers(feature):
        return SeriesInput(max_length)
    return None


def _is_numbers(feature: Any) -> bool:
    """[T] or [T][C] of numbers."""
    if not isinstance(feature, (List, LargeList)):
        return False
    inner = feature.feature
    inner = inner.feature if isinstance(inner, (List, LargeList)) else inner
    return isinstance(inner, Value) and inner.dtype.startswith(("int", "uint", "float", "bool"))


def _peek(cells: Cells) -> tuple[tuple[Any, str], Cells]:
    """The first cell, and all of them."""
    rest = iter(cells)
    first = next(rest)
    return first, chain([first], rest)


def _present(cell: Any, name: str) -> Any:
    if cell is None:
        raise ValueError(f"{name} is empty (None). Fill it, or leave such rows out.")
    return cell


def _of_type(cell: Any, name: str, kind: type, what: str) -> Any:
    if not isinstance(_present(cell, name), kind):
        raise ValueError(f"{name} must hold {what}; got {type(cell).__name__}.")
    return cell
