"""Own data: any data set of texts, pictures, sounds or series of numbers, from the Hub or a local folder.

Source and licence: those of your data. Options that are not set are inferred from the columns, and one line of the log
tells what was inferred. If the kind of the input is ambiguous, an error asks for `--input_kind`.

- input: text (words), picture (pixels in row order), audio (log-mel frames, or samples), or lists of numbers ([T] or
  [T][C], any lengths), standardised per channel over the training rows; or each row is normalised by itself, if one
  scale would turn a quarter of them into zeros (`--normalize_sequences`). The processor that does this is saved;
- several input columns, `--input_column a b c`: if they hold numbers, a row is a sequence and the columns its steps; if
  they hold lists, the columns are channels; with `--sequence_id id`, a row is one step and the columns are channels;
- label: integers, strings or class labels (one class), lists of them (several classes, or a class at every step),
  floats (regression);
- splits: if validation or test is missing, or its labels are hidden (-1), rows of train are held out for it, by seed
  and stratified. With --streaming true, the content of a row decides whether it is held out, and `eval_rows` random
  rows of validation and of test are stored. This reads each such split once, or train once for each missing split.

    python scripts/train.py --dataset_name my_folder --label_column activity

    {"acceleration": [[0.1, 9.8, 0.3], [0.2, 9.7, 0.1], ...], "activity": "walking"}
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import logging

from hf_skiprnn.tasks.base import Batch, PreparedRows, Ready, Row, Splits, Task
from hf_skiprnn.tasks.readers.words import start_from_vectors

from .columns import ROW, shortened
from .inputs import Input, Kind, TextInput
from .table import SPLIT, Table
from .targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

CHECKED_ROWS = 128  # in one batch
BUFFER = 1000  # size of the shuffle buffer of a stream, in rows


@dataclass
class OwnData(Task):
    """The task to predict a label of each sequence, or of every step, in your own data."""

    name = "own_data"
    dataset_name: str = field(default="", metadata={"help": "Hub id, or local folder."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    input_column: list[str] | None = field(
        default=None,
        metadata={"help": "Column of the sequence, or several columns of numbers; default: the only fitting column."},
    )
    input_kind: Kind = field(
        default="auto",
        metadata={
            "help": "Kind of the input column, if it is ambiguous: words; series ([T] or [T][channels], also lists "
            "written as text); channels_first (series [channels][T]); tokens (ids that are embedded)."
        },
    )
    sequence_id: str | None = field(
        default=None,
        metadata={"help": "Column with the sequence of a row, for tables in which each row is one step."},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Label column; default: a column named label, labels, target, class or y."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream the data instead of storing it. Needs --max_steps."}
    )
    vectors: str | None = field(
        default=None, metadata={"help": "Texts: word2vec file (.bin, or text) to start the embeddings from."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Keep only so many steps of a sequence, from its start."}
    )
    sound_features: Literal["log_mel", "values"] = field(
        default="log_mel",
        metadata={"help": "What a step of a sound is: a frame of 32 mel bands every 10 ms, or one sample."},
    )
    normalize_sequences: bool | None = field(
        default=None,
        metadata={
            "help": "Series and sounds, true or false: subtract a row's own mean, and divide by its own standard "
            "deviation. Default: only if one scale for all rows would turn a quarter of them into zeros."
        },
    )
    balance_classes: bool = field(default=False, metadata={"help": "Let all classes count alike in the loss."})
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of train to hold out for a missing validation or test split."}
    )
    eval_rows: int = field(default=1000, metadata={"help": "With streaming: rows of validation, and of test, at most."})
    split_seed: int = field(default=0, metadata={"help": "Decides which rows are held out."})

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise ValueError("Name the data: --dataset_name HUB_ID_OR_FOLDER.")
        if not 0 < self.held_out_share < 0.5:
            raise ValueError(f"held_out_share must be above 0 and below 0.5; got {self.held_out_share}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {self.max_length}.")
        if isinstance(self.input_column, str):
            self.input_column = [self.input_column]
        if self.sequence_id is not None and (self.streaming or not self.input_column):
            raise ValueError(
                "sequence_id needs input_column (the columns of numbers), and the whole data: no streaming."
            )

    @property
    def per_frame(self) -> bool:
        return self._table.target.per_step

    @cached_property
    def _table(self) -> Table:
        return Table(self)

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` shuffles a stream; other rows are shuffled by the trainer."""
        train, validation, test = self._table.splits
        return Splits(train.shuffle(seed, buffer_size=BUFFER) if self.streaming else train, validation, test)

    @cached_property
    def _input(self) -> Input:
        """The Input of the input column, fitted to training rows."""
        kind, name = self._table.kind, self._table.input_column
        kind.fit(self._cells(self._sample(kind.fit_rows), name))
        return kind

    def _sample(self, count: int | None) -> Iterable[Row]:
        """Return `count` training rows from the whole split: the first ones may all be of one class.

        None: all rows of train, also those that are held out of it.
        """
        if count is None:
            return self._table.data["train"]
        train = self._table.splits.train
        if self.streaming:
            return islice(train.shuffle(self.split_seed, buffer_size=BUFFER), count)
        if len(train) <= count:
            return train
        return train.select(np.linspace(0, len(train) - 1, count).astype(np.int64))

    @cached_property
    def _labels(self) -> Target:
        """The Target of the label column, fitted to the whole training split; a stream is read once for this."""
        data, column = self._table.data["train"].select_columns(self._table.label_column), self._table.label_column
        self._table.target.fit(data[column][:] if not self.streaming else (row[column] for row in data))
        self._tell()
        return self._table.target

    def _tell(self) -> None:
        """Log the kind of each column, in one line."""
        table = self._table
        (row,) = table.first(1, table.input_column, table.label_column)
        cell, label = row[table.input_column], row[table.label_column]
        shape = f" [{len(cell)}]" if isinstance(cell, list) else ""
        if shape and isinstance(cell[0], list):
            shape += f"[{len(cell[0])}]"
        left = set(table.columns) - {*table.chosen, table.label_column, self.sequence_id}
        logger.warning(
            "%s: %s; %s; not used: %s.",
            self.dataset_name,
            f"input {table.input_column} = {table.kind.name}{shape}, such as {shortened(cell)}",
            f"label {table.label_column} = {table.target.kind}, such as {shortened(label)}",
            ", ".join(sorted(left)) or "nothing",
        )

    def prepared(self, rows: Any) -> Any:
        """Return stored rows with inputs that are ready for a batch; the rows of a stream stay as they are."""
        if self.streaming:
            return rows
        return PreparedRows(rows, self._table.input_column, self._ready)

    def _ready(self, rows: list[Row]) -> list[np.ndarray]:
        return self._input.prepare(self._cells(rows, self._table.input_column))

    def _cells(self, rows: Iterable[Row], column: str) -> Iterator[tuple[Any, str]]:
        """Yield (content, name for errors) of a column."""
        return ((row[column], f"{row[SPLIT]} row {row[ROW]}, column {column!r}") for row in rows)

    def processor(self) -> Any:
        """Return the tokenizer, image processor or feature extractor; None if the input holds token ids."""
        return self._input.processor

    def use_processor(self, checkpoint: str) -> None:
        """Use the checkpoint's tokenizer, image processor or feature extractor."""
        self._table.kind.load(checkpoint)
        self._input = self._table.kind

    def collate(self, rows: list[Row]) -> Batch:
        """Return the model's inputs and labels: [B], [B, C], or [B, T] for a class at every step."""
        column = self._table.input_column
        is_ready = isinstance(rows[0][column], Ready)
        inputs = self._input.join([row[column].value for row in rows] if is_ready else self._ready(rows))
        cells = self._cells(rows, self._table.label_column)
        if self._table.target.per_step:
            labels = self._labels.encode_steps(cells, inputs["attention_mask"], self.max_length)
        else:
            labels = self._labels.encode(cells)
        return {**inputs, "labels": labels}

    def initialise(self, model: PreTrainedModel) -> None:
        """Copy word vectors into the embeddings.

        Raises:
            ValueError: the input is not text, or the file does not fit; see set_vectors.
        """
        if self.vectors is None:
            return
        if not isinstance(self._input, TextInput):
            kind = f"column {self._table.input_column} holds {self._input.name}"
            raise ValueError(f"vectors are for texts; {kind}. Leave --vectors out, or choose a column of texts.")
        start_from_vectors(model, self._input.processor, self.vectors)

    def check(self, rows: Dataset) -> None:
        """Make a batch of every row of validation or test, as an evaluation will.

        Raises:
            ValueError: a row cannot be evaluated, for example because its label is not one of the training rows'.
        """
        for _ in DataLoader(rows, CHECKED_ROWS, collate_fn=self.collate):
            pass

    def model_defaults(self) -> dict[str, Any]:
        return self._input.model_defaults() | self._labels.model_defaults()

    def loss(self) -> Callable[..., Tensor] | None:
        """With balance_classes, return the cross-entropy in which all classes count equally; otherwise None."""
        if not self.balance_classes:
            return None
        if self._labels.is_number or self._labels.is_list:
            raise ValueError(
                f"balance_classes needs one class per row; column {self._labels.column!r} holds {self._labels.kind}."
            )
        weights = self._labels.class_weights()

        def balanced(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            total = F.cross_entropy(outputs["logits"].float(), labels, weights.to(labels.device), reduction="sum")
            return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

        return balanced

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self._labels.metrics(prediction)

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        shown = self._labels.shown(logits), self._labels.truth(batch["labels"].numpy())
        return self._input.figure(batch, gates, *shown)

    def page(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> str | None:
        shown = self._labels.shown(logits), self._labels.truth(batch["labels"].numpy())
        return self._input.page(batch, gates, *shown)
