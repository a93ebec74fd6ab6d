"""The kinds of input columns: text, pictures, sounds, series of numbers, token ids.

Each kind is fitted to training cells, turns cells into a batch, and has a processor that does the same at inference. A
cell comes with a name for errors, such as "train row 17, column 'wave'".
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from datasets import Array2D, Audio, Image
from transformers import AutoConfig, AutoTokenizer

from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor
from hf_skiprnn.model.image_processing_skip_rnn import SkipRNNImageProcessor, unit_range
from hf_skiprnn.tasks.base import Batch
from hf_skiprnn.tasks.readers.sounds import read_sound
from hf_skiprnn.tasks.readers.words import pad_tokens, real_gates, tokenize, train_tokenizer, words_of

from .columns import is_list, is_number, is_series, is_text, numbers_in, present

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cells = Iterable[tuple[Any, str]]  # (content, name)
Kind = Literal["auto", "words", "series", "channels_first", "tokens"]
VOCABULARY = 20_000  # size of the vocabulary of a tokenizer made from training texts
LONGEST = 10**9  # words; the tokenizer's maximum length if texts are not cropped
MEL_BANDS = 32
FRAME, HOP = 0.025, 0.010  # s


class Input(ABC):
    """A kind of input column.

    Args:
        max_length: keep only the first max_length steps of a sequence; None: keep all.
    """

    name: str  # description of the kind, for the log
    fit_rows: int | None = 10_000  # number of training rows to which the processor is fitted; None: all of train
    can_label_steps = False  # labels at every step are possible: a cell's length is known without the processor
    processor: Any

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length

    def length(self, cell: Any) -> int:
        """Return the number of steps of a cell."""
        return len(cell)

    @abstractmethod
    def fit(self, cells: Cells) -> None:
        """Fit the processor to training cells."""

    @abstractmethod
    def load(self, checkpoint: str) -> None:
        """Load the processor of a checkpoint (a folder or Hub id)."""

    @abstractmethod
    def prepare(self, cells: Cells) -> list[np.ndarray]:
        """Return an array for each cell: everything that can be done before rows are joined to a batch."""

    @abstractmethod
    def join(self, arrays: list[np.ndarray]) -> Batch:
        """Return the model's inputs of prepared cells."""

    @abstractmethod
    def model_defaults(self) -> dict[str, Any]:
        """Return the fields of SkipRNNConfig that the input decides."""

    @abstractmethod
    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        """Draw which steps were read; arguments as in evaluation/figures.py."""

    def page(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> str | None:
        """Return the figure as an HTML page; None for kinds that only have a picture."""
        return None


class TextInput(Input):
    """Texts, read word by word by a tokenizer made from the training texts."""

    name = "text, read word by word"

    def fit(self, cells: Cells) -> None:
        texts = (_of_type(cell, name, str, "text") for cell, name in cells)
        self.processor = train_tokenizer(texts, VOCABULARY, self.max_length or LONGEST)

    def load(self, checkpoint: str) -> None:
        self.processor = AutoTokenizer.from_pretrained(checkpoint, model_max_length=self.max_length or LONGEST)

    def prepare(self, cells: Cells) -> list[np.ndarray]:
        return tokenize(self.processor, [_of_type(cell, name, str, "text") for cell, name in cells])

    def join(self, arrays: list[np.ndarray]) -> Batch:
        return pad_tokens(arrays, self.processor.pad_token_id or 0)

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
    """Pictures of one size, read pixel by pixel, row by row; gray or in colour like the first picture."""

    name = "pictures, read pixel by pixel"

    def fit(self, cells: Cells) -> None:
        (cell, name), _ = _peek(cells)
        first = present(cell, name)
        width, height = first.size
        channels = 1 if first.mode in ("1", "L", "LA") else 3
        self.processor = SkipRNNImageProcessor(channels, {"height": height, "width": width})

    def load(self, checkpoint: str) -> None:
        self.processor = SkipRNNImageProcessor.from_pretrained(checkpoint)

    def prepare(self, cells: Cells) -> list[np.ndarray]:
        pixels = []
        for cell, name in cells:
            try:
                pixels.append(self.processor.pixels(present(cell, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return pixels

    def join(self, arrays: list[np.ndarray]) -> Batch:
        return {"pixel_values": torch.from_numpy(unit_range(np.stack(arrays)))}

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": self.processor.num_channels}

    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        from hf_skiprnn.evaluation.figures import pixels_read

        return pixels_read(batch["pixel_values"].mean(dim=1).numpy(), gates, predicted, labels)


class SeriesInput(Input):
    """Series of numbers with one or several channels, standardised over the training rows or each normalised by itself.

    Args:
        max_length: as in Input.
        channels_first: cells are [channels][T], not [T][channels].
        normalize: the extractor's normalize_sequences.
    """

    name = "series of numbers"
    can_label_steps = True

    def __init__(self, max_length: int | None, channels_first: bool = False, normalize: bool | None = None) -> None:
        super().__init__(max_length)
        self.channels_first, self.normalize = channels_first, normalize

    def length(self, cell: Any) -> int:
        return len(self._numbers(cell, "a cell"))

    def fit(self, cells: Cells) -> None:
        (cell, name), cells = _peek(cells)
        first = np.asarray(self._numbers(cell, name), dtype=object)
        channels = len(first[0]) if len(first) and isinstance(first[0], (list, tuple, np.ndarray)) else 1
        plain = SkipRNNFeatureExtractor(channels)
        self.processor = SkipRNNFeatureExtractor(channels, normalize_sequences=self.normalize).fit(
            plain.extract(self._numbers(c, n), n)[: self.max_length] for c, n in cells
        )

    def load(self, checkpoint: str) -> None:
        self.processor = SkipRNNFeatureExtractor.from_pretrained(checkpoint)
        trained = bool(self.processor.normalize_sequences)
        if self.normalize not in (None, trained):
            raise ValueError(
                f"{checkpoint} was trained with normalize_sequences={trained}; got {self.normalize}. Leave the option "
                "out, or train a new model."
            )

    def prepare(self, cells: Cells) -> list[np.ndarray]:
        return [self.steps(cell, name)[: self.max_length] for cell, name in cells]

    def join(self, arrays: list[np.ndarray]) -> Batch:
        return self.processor.join(arrays)

    def steps(self, cell: Any, name: str) -> np.ndarray:
        """Return a cell's steps [T, I], standardised or normalised."""
        return self.processor.extract(self._numbers(cell, name), name)

    def _numbers(self, cell: Any, name: str) -> Any:
        """Return the numbers [T] or [T][I] of a cell, which holds lists or, from a CSV file, a text."""
        try:
            numbers = numbers_in(cell) if isinstance(present(cell, name), str) else cell
            return list(zip(*numbers, strict=True)) if self.channels_first else numbers
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{name} must hold {'channels of one length' if self.channels_first else 'a list of numbers'}: {error}"
            ) from error

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": self.processor.feature_size}

    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        from hf_skiprnn.evaluation.figures import channels_read

        mask = batch["attention_mask"].numpy() != 0
        rows = [x[m] for x, m in zip(batch["input_values"].numpy(), mask, strict=True)]
        return channels_read(rows, real_gates(gates, batch["attention_mask"]), predicted, labels)


class TokenInput(Input):
    """Token ids, which the model embeds; the model refuses ids above the largest training id."""

    name = "token ids, which are embedded"
    fit_rows = None
    can_label_steps = True
    processor = None
    width = 0  # size of the vocabulary

    def fit(self, cells: Cells) -> None:
        self.width = 1 + max(max(present(cell, name)) for cell, name in cells)

    def load(self, checkpoint: str) -> None:
        self.width = AutoConfig.from_pretrained(checkpoint).vocab_size

    def prepare(self, cells: Cells) -> list[np.ndarray]:
        """Return the token ids of each row; raise ValueError if an id is above those of the training rows."""
        return [self._known(np.asarray(present(cell, name))[: self.max_length], name) for cell, name in cells]

    def _known(self, ids: np.ndarray, name: str) -> np.ndarray:
        if ids.size and ids.max() >= self.width:
            raise ValueError(f"{name} holds token id {ids.max()}; the training rows hold ids up to {self.width - 1}.")
        return ids

    def join(self, arrays: list[np.ndarray]) -> Batch:
        return pad_tokens(arrays, 0)

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": 300, "vocab_size": self.width}

    def figure(self, batch: Batch, gates: np.ndarray, predicted: Sequence[str], labels: Sequence[str]) -> "Figure":
        from hf_skiprnn.evaluation.figures import words_read

        mask = batch["attention_mask"] != 0
        words = [[str(i) for i in ids[real].tolist()] for ids, real in zip(batch["input_ids"], mask, strict=True)]
        return words_read(words, real_gates(gates, batch["attention_mask"]), predicted, labels)


class SoundInput(SeriesInput):
    """Sounds, as log-mel frames or samples; all are resampled to the sampling rate of the first sound."""

    name = "sounds"
    can_label_steps = False

    def __init__(
        self, max_length: int | None, features: str, sampling_rate: int | None, normalize: bool | None = None
    ) -> None:
        super().__init__(max_length, normalize=normalize)
        self.features, self.sampling_rate = features, sampling_rate

    def fit(self, cells: Cells) -> None:
        (cell, name), cells = _peek(cells)
        rate = self.sampling_rate or read_sound(cell, name)[1]
        channels = MEL_BANDS if self.features == "log_mel" else 1
        frame, hop = round(FRAME * rate), round(HOP * rate)
        self.processor = SkipRNNFeatureExtractor(
            channels, rate, self.features, frame, hop, normalize_sequences=self.normalize
        )
        self.processor.fit(read_sound(c, n, rate)[0] for c, n in cells)

    def steps(self, cell: Any, name: str) -> np.ndarray:
        return self.processor.extract(read_sound(cell, name, self.processor.sampling_rate)[0], name)


def input_of(
    feature: Any, kind: Kind, max_length: int | None, sound_features: str, normalize: bool | None
) -> Input | None:
    """Return the Input of a column.

    Args:
        feature: the column's `datasets` feature.
        kind: the kind that the user chose; "auto": decided by the feature.
        max_length: as in Input.
        sound_features: "log_mel" or "values"; only for sounds.
        normalize: whether each sequence of numbers or sound is normalised by itself; None: decided by the data.

    Returns:
        None if the column cannot be read as a sequence of that kind.
    """
    if isinstance(feature, Image) and kind == "auto":
        return ImageInput(max_length)
    if isinstance(feature, Audio) and kind == "auto":
        return SoundInput(max_length, sound_features, feature.sampling_rate, normalize)
    if is_text(feature) and kind in ("auto", "words"):
        return TextInput(max_length)
    is_numbers = isinstance(feature, Array2D) or is_series(feature)
    if is_numbers and kind == "tokens":
        flat = is_list(feature) and is_number(feature.feature) and feature.feature.dtype.startswith(("int", "uint"))
        return TokenInput(max_length) if flat else None
    if (is_numbers and kind in ("auto", "series", "channels_first")) or (is_text(feature) and kind == "series"):
        return SeriesInput(max_length, kind == "channels_first", normalize)
    return None


def _peek(cells: Cells) -> tuple[tuple[Any, str], Cells]:
    """Return the first cell, and an iterable of all cells."""
    rest = iter(cells)
    if (first := next(rest, None)) is None:
        raise ValueError("There is no training row.")
    return first, chain([first], rest)


def _of_type(cell: Any, name: str, kind: type, what: str) -> Any:
    if not isinstance(present(cell, name), kind):
        raise ValueError(f"{name} must hold {what}; got {type(cell).__name__}.")
    return cell
