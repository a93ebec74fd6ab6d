"""Spoken digits: the digit said in half a second of sound. Not in the paper.

Source: Free Spoken Digit Dataset (Jackson et al.; licence CC BY-SA 4.0): 6 speakers, 50 takes of each digit, 8 kHz.
Takes 0-4 of every speaker and digit are the test split (300 recordings), so its speakers also occur in training. With
`held_out_speaker` the test split is all 500 recordings of this speaker, and the other splits hold only other speakers.
The data come from the Hub (the id that the mteb benchmark's task FSDD names), or a local folder in the same layout. 300
training recordings are held out for validation, by seed and stratified.

Steps are log-mel frames (25 ms every 10 ms, 32 bands: about 40 steps) or the samples themselves (about 3400 steps of
one value). Each channel is standardised by its mean and standard deviation over the training split; the checkpoint's
feature extractor stores these.

    {"audio": {"bytes": b"RIFF...", "path": None}, "label": 7, "speaker": "theo"}
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Array2D, Audio, ClassLabel, Dataset, DatasetDict, Features, concatenate_datasets
from transformers import EvalPrediction

from hf_skiprnn.evaluation.metrics import accuracy
from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor
from hf_skiprnn.tasks.readers.sounds import read_sound

from .base import Batch, PreparedRows, Ready, Row, Splits, Task, label_names, load_splits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLING_RATE = 8000
MEL_BANDS = 32
HELD_OUT_ROWS = 300
VERSION = 1  # of the cached rows of fsdd and keyword: raise it with every change of the code that makes them
STEPS = "steps"  # column of the extracted steps, not yet standardised


@dataclass
class SpokenTask(Task):
    """The base class of the tasks `fsdd` and `keyword`: one class for each sound, from FSDD's recordings."""

    labels: ClassVar[tuple[str, ...]]
    dataset_name: str = field(
        default="mteb/free-spoken-digit-dataset",
        metadata={"help": "Hub id, or local folder in the same layout: columns audio, label; splits train, test."},
    )
    features: Literal["log_mel", "values"] = field(
        default="log_mel", metadata={"help": "What a step is: a frame of 32 mel bands every 10 ms, or one sample."}
    )

    @abstractmethod
    def splits(self) -> Splits:
        """Return rows of `steps` [T, 32 or 1], not yet standardised, and `label`."""

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` is not used, because the trainer shuffles the rows."""
        return self._splits

    @cached_property
    def _splits(self) -> Splits:
        return self.splits()

    def recordings(self) -> DatasetDict:
        """Return the recordings: splits train and test, with columns audio and label.

        Raises:
            ValueError: the data set has another layout.
        """
        return load_splits(self.dataset_name, "audio", "label")

    @cached_property
    def extractor(self) -> SkipRNNFeatureExtractor:
        """The feature extractor from sounds to steps; it does not standardise, which needs all training steps."""
        channels = MEL_BANDS if self.features == "log_mel" else 1
        return SkipRNNFeatureExtractor(channels, SAMPLING_RATE, self.features)

    @cached_property
    def _standardised(self) -> SkipRNNFeatureExtractor:
        """The feature extractor that standardises extracted steps and pads them to a batch."""
        unfitted = SkipRNNFeatureExtractor(self.extractor.feature_size, normalize_sequences=False)
        return unfitted.fit(row[STEPS] for row in self._splits.train)

    def processor(self) -> SkipRNNFeatureExtractor:
        """Return the feature extractor that turns sounds into a batch: it extracts, standardises and pads."""
        steps, known = self.extractor, self._standardised
        return SkipRNNFeatureExtractor(steps.feature_size, SAMPLING_RATE, self.features, mean=known.mean, std=known.std)

    def use_processor(self, checkpoint: str) -> None:
        """Standardise with the mean and standard deviation of a checkpoint's feature extractor."""
        processor = SkipRNNFeatureExtractor.from_pretrained(checkpoint)
        self._standardised = SkipRNNFeatureExtractor(processor.feature_size, mean=processor.mean, std=processor.std)

    def prepared(self, rows: Dataset) -> PreparedRows:
        """Return the rows with standardised steps."""
        return PreparedRows(rows, STEPS, self._steps)

    def _steps(self, rows: list[Row]) -> list[np.ndarray]:
        return [self._standardised.extract(row[STEPS]) for row in rows]

    def collate(self, rows: list[Row]) -> Batch:
        """Return input_values [B, T, 32 or 1] float32, attention_mask [B, T] and labels [B]."""
        is_ready = isinstance(rows[0][STEPS], Ready)
        batch = self._standardised.join([row[STEPS].value for row in rows] if is_ready else self._steps(rows))
        return {**batch, "labels": torch.tensor([int(row["label"]) for row in rows])}

    def model_defaults(self) -> dict[str, Any]:
        channels = self.extractor.feature_size
        return {"input_size": channels, "problem_type": "single_label_classification", **label_names(self.labels)}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": accuracy(prediction.predictions, prediction.label_ids)}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import channels_read

        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return channels_read(
            [x[:n].numpy() for x, n in zip(batch["input_values"], lengths, strict=True)],
            [g[:n] for g, n in zip(gates, lengths, strict=True)],
            [self.labels[i] for i in logits.argmax(axis=1)],
            [self.labels[i] for i in batch["labels"].tolist()],
        )


@dataclass
class FSDD(SpokenTask):
    """The task to classify spoken digits."""

    name = "fsdd"
    labels = tuple("0123456789")
    split_seed: int = field(default=0, metadata={"help": "Decides which training recordings are held out."})
    held_out_speaker: str | None = field(
        default=None, metadata={"help": "Test on all of this speaker's recordings, and train on the other speakers'."}
    )

    def splits(self) -> Splits:
        data = self.recordings()
        if self.held_out_speaker is not None:
            data = hold_out(data, self.held_out_speaker, self.dataset_name)
        data = data.select_columns(["audio", "label"]).cast_column("audio", Audio(decode=False))
        data = data.cast_column("label", ClassLabel(names=list(self.labels)))
        train = data["train"].train_test_split(HELD_OUT_ROWS, seed=self.split_seed, stratify_by_column="label")
        return Splits(*(partial(self._extract, rows) for rows in (train["train"], train["test"], data["test"])))

    def _extract(self, data: Dataset) -> Dataset:
        """Extract the steps of all sounds once; `datasets` caches them."""
        kind = Array2D((None, self.extractor.feature_size), "float32")
        features = Features({"label": data.features["label"], STEPS: kind})
        data = data.map(
            extract_steps,
            fn_kwargs={"extractor": self.extractor, "version": VERSION},
            with_indices=True,
            remove_columns="audio",
            features=features,
            desc="Extracting steps",
        )
        return data.with_format("numpy")


def hold_out(data: DatasetDict, speaker: str, name: str) -> DatasetDict:
    """Split by speaker: `test` holds all recordings of `speaker`, `train` the training recordings of the others.

    name: name of the data set, for errors.

    Raises:
        ValueError: there is no such speaker, or no column of speakers.
    """
    if "speaker" not in data["train"].column_names:
        raise ValueError(
            f"{name} must have a column speaker to hold one out; got {', '.join(data['train'].column_names)}."
        )
    speakers = {split: np.array(data[split]["speaker"]) for split in ("train", "test")}
    if speaker not in (known := set(speakers["train"]) | set(speakers["test"])):
        raise ValueError(f"held_out_speaker must be one of {', '.join(sorted(known))}; got {speaker!r}.")
    others = data["train"].select(np.flatnonzero(speakers["train"] != speaker))
    theirs = [data[split].select(np.flatnonzero(speakers[split] == speaker)) for split in ("train", "test")]
    return DatasetDict(train=others, test=concatenate_datasets(theirs))


def extract_steps(row: Row, index: int, extractor: SkipRNNFeatureExtractor, version: int) -> Row:
    """Return the steps of a row's sound.

    Args:
        row: holds the sound.
        index: number of the row, for errors.
        extractor: makes the steps.
        version: not used here; `datasets` keeps the rows of each version apart.
    """
    name = f"row {index}, column 'audio'"
    samples, _ = read_sound(row["audio"], name, SAMPLING_RATE)
    return {STEPS: extractor.extract(samples, name)}
