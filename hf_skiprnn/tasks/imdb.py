"""IMDB: is a film review positive? (Maas et al. 2011; Campos et al. 2018, section 4.4, Table 5).

Source: 25000 reviews for training, 25000 for test; `stanfordnlp/imdb` on the Hub (no licence stated), or a local folder
in the same layout. As in the paper, 15 % of the training reviews are held out for validation (here by seed and
stratified), and a review is cropped to its first 200 or 400 words. A word's vector (in the paper 300 numbers) starts
as in a word2vec file, if one is given and holds the word, else it is drawn from U(-0.25, 0.25).

The tokenizer knows the most frequent lower-case words and punctuation marks of the training split, and is saved with
every checkpoint. Padding is neither read nor counted. In the paper it is both: `hf-skiprnn evaluate --count_padding`
counts updates in that way too, to compare with Table 5.

    {"text": "Zero Day leads you to think, even re-think why two boys/young men would do ...", "label": 1}
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel

from hf_skiprnn.evaluation.metrics import accuracy
from hf_skiprnn.tasks.readers.words import (
    PAD_ID,
    pad_tokens,
    real_gates,
    start_from_vectors,
    tokenize,
    train_tokenizer,
    words_of,
)

from .base import Batch, PreparedRows, Ready, Row, Splits, Task, label_names, load_splits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class IMDB(Task):
    """The task to tell whether a film review is positive."""

    name = "imdb"
    labels = ("neg", "pos")
    dataset_name: str = field(
        default="stanfordnlp/imdb",
        metadata={"help": "Hub id, or local folder in the same layout: columns text, label; splits train, test."},
    )
    length: int = field(default=200, metadata={"help": "Words of a review that are kept, from its start."})
    vocabulary: int = field(default=20_000, metadata={"help": "Words that the tokenizer knows."})
    vectors: str | None = field(
        default=None, metadata={"help": "word2vec file (.bin, or text) to start the embeddings from."}
    )
    validation_share: float = field(default=0.15, metadata={"help": "Share of the training reviews held out."})
    train_rows: int | None = field(default=None, metadata={"help": "Train on so many reviews only, drawn by seed."})
    split_seed: int = field(default=0, metadata={"help": "Decides which training reviews are held out."})

    def __post_init__(self) -> None:
        if self.length < 1 or self.vocabulary < 3:
            raise ValueError(
                f"length must be at least 1 and vocabulary at least 3; got {self.length} and {self.vocabulary}."
            )

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` is not used, because the trainer shuffles the rows."""
        return self._splits

    @cached_property
    def _splits(self) -> Splits:
        data = load_splits(self.dataset_name, "text", "label").cast_column("label", ClassLabel(names=list(self.labels)))
        held_out = data["train"].train_test_split(
            self.validation_share, seed=self.split_seed, stratify_by_column="label"
        )
        train = held_out["train"]  # already shuffled
        if self.train_rows is not None:
            train = train.select(range(min(self.train_rows, len(train))))
        return Splits(train, held_out["test"], data["test"])

    @cached_property
    def _tokenizer(self) -> Any:
        return train_tokenizer(self._splits.train["text"], self.vocabulary, self.length)

    def processor(self) -> Any:
        """Return the tokenizer."""
        return self._tokenizer

    def use_processor(self, checkpoint: str) -> None:
        """Use the checkpoint's tokenizer, but crop texts to this task's `length`."""
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint, model_max_length=self.length)

    def initialise(self, model: PreTrainedModel) -> None:
        """Copy word vectors into the embeddings."""
        if self.vectors is not None:
            start_from_vectors(model, self._tokenizer, self.vectors)

    def prepared(self, rows: Dataset) -> PreparedRows:
        """Return the rows with token ids."""
        return PreparedRows(rows, "text", self._ids)

    def _ids(self, rows: list[Row]) -> list[np.ndarray]:
        return tokenize(self._tokenizer, [row["text"] for row in rows])

    def collate(self, rows: list[Row]) -> Batch:
        """Return input_ids [B, T], attention_mask [B, T] and labels [B]."""
        is_ready = isinstance(rows[0]["text"], Ready)
        ids = [row["text"].value for row in rows] if is_ready else self._ids(rows)
        batch = pad_tokens(ids, self._tokenizer.pad_token_id)
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    def model_defaults(self) -> dict[str, Any]:
        return {
            "input_size": 300,
            "vocab_size": self.vocabulary,
            "pad_token_id": PAD_ID,
            "problem_type": "single_label_classification",
            **label_names(self.labels),
        }

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": accuracy(prediction.predictions, prediction.label_ids)}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import words_read

        return words_read(*self._reading(batch, gates, logits))

    def page(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> str:
        from hf_skiprnn.evaluation.figures import words_read_page

        return words_read_page(*self._reading(batch, gates, logits))

    def _reading(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> tuple[Any, ...]:
        """Return words, gates, predicted and true labels of each row."""
        return (
            words_of(self._tokenizer, batch),
            real_gates(gates, batch["attention_mask"]),
            [self.labels[i] for i in logits.argmax(axis=1)],
            [self.labels[i] for i in batch["labels"].tolist()],
        )
