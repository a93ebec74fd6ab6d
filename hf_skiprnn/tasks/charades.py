"""Charades: which of 157 actions happen in each frame (Sigurdsson et al. 2016; Campos et al. 2018, Table 3).

Source: Allen Institute for AI. The licence forbids commercial use and redistribution, so this package contains none of
the data; column names, file names and frame numbers follow the data set's README. `dataset_name` is a folder with
Charades_v1_train.csv and Charades_v1_test.csv. `feature_folder` holds the organisers' fc7 features: one text file of
4096 numbers per frame, `<id>/<id>-<frame, 6 digits>.txt`, for every fourth frame of 24 per second (1, 5, 9, ...). A
frame has every action whose interval contains its time. 10 % of the training videos are held out for validation, by
seed. Features are parsed once and cached.

The loss is the binary cross-entropy summed over the classes. A mean over the 157 classes would be too small for the
lambdas of Table 3: reading all frames instead of none lowers it by less than the 42 updates of that table cost with
lambda = 1e-3.

Metric: mAP of the organisers' localisation task. Take N equally spaced frames of each video: floor(k T / N), k < N, of
its T frames. For each class, compute the average precision of the scores at these frames of all videos. mAP is the mean
over the classes that occur there. N is 25 in the organisers' script (Charades_v1_localize.m) and 100 in the paper. The
script uses the actions at k / N of the video's length; here they are the actions of the frame before, at most 1/6 s
earlier.

    {"id": "46GP8", "steps": [[0.0, 1.3, ...], ...], "actions": [[0, 0, 1, ...], ...]}
"""

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Value
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, EvalPrediction, PreTrainedModel
from transformers.utils import logging

from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor
from hf_skiprnn.model.losses_skip_rnn import IGNORED
from hf_skiprnn.tasks.readers.arrow_cache import cached_rows

from .base import Batch, Row, Splits, Task, label_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

CLASSES = 157
VIDEO_RATE = 24.0  # frames per second, to which the frame numbers in the names of feature files refer
POINTS = (25, 100)  # numbers N of equally spaced frames in the localisation metric
ACTION = re.compile(r"c(\d{3}) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)")


class Video(NamedTuple):
    """A row of the CSV file: the video's id, and the class, start and end (in seconds) of each action."""

    name: str
    actions: tuple[tuple[int, float, float], ...]


@dataclass
class Charades(Task):
    """The task to name the actions in every frame."""

    name = "charades"
    labels = tuple(f"c{i:03}" for i in range(CLASSES))
    dataset_name: str = field(default="", metadata={"help": "Folder with Charades_v1_train.csv and _test.csv."})
    feature_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of the fc7 features; default: Charades_v1_features_rgb in dataset_name."},
    )
    feature_size: int = field(default=4096, metadata={"help": "Numbers in a feature file."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of the training videos held out."})
    split_seed: int = field(default=0, metadata={"help": "Decides which videos are held out."})
    cache_folder: str | None = field(
        default=None, metadata={"help": "Folder of the cached features; default: datasets' cache."}
    )

    @property
    def per_frame(self) -> bool:
        return True

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` is not used, because the trainer shuffles the rows."""
        return self._splits

    @cached_property
    def _splits(self) -> Splits:
        train, test = self._rows("train"), self._rows("test")
        held_out = train.train_test_split(self.validation_share, seed=self.split_seed)
        return Splits(held_out["train"], held_out["test"], test)

    def _rows(self, which: str) -> Dataset:
        """Return the rows of those listed videos that have features."""
        path = Path(self.dataset_name, f"Charades_v1_{which}.csv")
        if not self.dataset_name or not path.is_file():
            raise ValueError(f"There is no {path}. --dataset_name must be the folder of the annotations.")
        root = Path(self.feature_folder or Path(self.dataset_name, "Charades_v1_features_rgb"))
        listed = read_annotations(path)
        videos = [video for video in listed if (root / video.name).is_dir()]
        if len(videos) < len(listed):
            logger.warning("%s holds features of %d of %d videos of %s.", root, len(videos), len(listed), path.name)
        if not videos:
            raise ValueError(f"{root} holds no features of {path.name}: <id>/<id>-<frame>.txt. Set --feature_folder.")

        def row(video: Video) -> Row:
            steps, times = read_features(root / video.name, self.feature_size)
            return {"id": video.name, "steps": steps, "actions": actions_at(times, video.actions)}

        features = Features(
            {
                "id": Value("string"),
                "steps": Array2D((None, self.feature_size), "float32"),
                "actions": Array2D((None, CLASSES), "int8"),
            }
        )
        facts = {"videos": videos, "root": str(root.resolve()), "files": [files_in(root / v.name) for v in videos]}
        return cached_rows(f"{self.name}-{which}", videos, row, features, facts, self.cache_folder).with_format("numpy")

    def collate(self, rows: list[Row]) -> Batch:
        """Return input_values [B, T, I], attention_mask [B, T], and labels [B, T, 157] of 0 and 1, -100 at padding."""
        steps = [np.asarray(row["steps"], np.float32) for row in rows]
        batch = SkipRNNFeatureExtractor(self.feature_size).pad(
            BatchFeature({"input_values": steps}), return_tensors="pt"
        )
        labels = torch.full((*batch["attention_mask"].shape, CLASSES), float(IGNORED))
        for label, row in zip(labels, rows, strict=True):
            label[: len(row["actions"])] = torch.from_numpy(np.asarray(row["actions"], np.float32))
        return {**batch, "labels": labels}

    def model_defaults(self) -> dict[str, Any]:
        return {
            "input_size": self.feature_size,
            "problem_type": "multi_label_classification",
            **label_names(self.labels),
        }

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel) -> None:
        """Set the classifier's bias to the log-odds of each class in the training frames.

        With a bias of 0 every class would start at probability 1/2. While the model learned that all classes are rare,
        its states would saturate. Reading would then change nothing, and the update gate would close.
        """
        actions = self.load(0).train.select_columns("actions")
        frames = sum(len(row["actions"]) for row in actions)
        share = (sum(row["actions"].sum(axis=0, dtype=np.int64) for row in actions) + 1) / (frames + 2)
        cast(Any, model).classifier.bias.copy_(torch.from_numpy(np.log(share / (1 - share))))

    def loss(self) -> Callable[..., Tensor]:
        """Return the binary cross-entropy, summed over classes and averaged over real frames."""

        def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            real, logits = labels != IGNORED, outputs["logits"].float()
            total = F.binary_cross_entropy_with_logits(logits, labels.where(real, 0), reduction="none")[real].sum()
            return total * CLASSES / (real.sum() if num_items_in_batch is None else num_items_in_batch)

        return summed

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        scores, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        return {f"map_{points}": localisation_map(scores, labels, points) for points in POINTS}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import channels_read

        mask = batch["attention_mask"].numpy() != 0
        inputs = [x[m] for x, m in zip(batch["input_values"].numpy(), mask, strict=True)]
        read = [g[m] for g, m in zip(gates, mask, strict=True)]
        return channels_read(inputs, read, self._names(logits > 0, mask), self._names(batch["labels"] == 1, mask))

    def _names(self, active: Any, mask: np.ndarray) -> list[str]:
        """Return the names of the classes that occur in a real frame of each row; active: [B, T, 157] bool."""
        found = (np.asarray(active) & mask[:, :, None]).any(axis=1)
        return [", ".join(self.labels[c] for c in np.flatnonzero(row)) or "none" for row in found]


def read_annotations(path: Path) -> list[Video]:
    """Read the organisers' CSV file of videos; errors name the row."""
    videos = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if not row.get("id") or row.get("actions") is None:
                raise ValueError(f"{path.name} row {number} needs columns id and actions; got {sorted(map(str, row))}.")
            actions = []
            for part in filter(None, row["actions"].split(";")):
                found = ACTION.fullmatch(part.strip())
                if found is None or int(found[1]) >= CLASSES:
                    raise ValueError(
                        f"{path.name} row {number}, column 'actions' must hold `c092 11.90 21.20;...` with classes "
                        f"c000 to c{CLASSES - 1}; got {part!r}."
                    )
                actions.append((int(found[1]), float(found[2]), float(found[3])))
            videos.append(Video(row["id"], tuple(actions)))
    return videos


def files_in(folder: Path) -> list[tuple[str, int, int]]:
    """Return the name, size in bytes and time of change of each file of features in a folder."""
    files = sorted((path.name, path.stat()) for path in folder.glob("*.txt"))
    return [(name, found.st_size, found.st_mtime_ns) for name, found in files]


def read_features(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a video's features [T, size] float32 and their times [T] in seconds."""
    found = sorted((int(path.stem.rpartition("-")[2]), path) for path in folder.glob(f"{folder.name}-*.txt"))
    if not found:
        raise ValueError(f"{folder} holds no file {folder.name}-<frame>.txt.")
    steps = np.empty((len(found), size), np.float32)
    for step, (_, path) in zip(steps, found, strict=True):
        numbers = np.array(path.read_text(encoding="utf-8").split(), np.float32)
        if numbers.shape != (size,) or not np.isfinite(numbers).all():
            raise ValueError(f"{path} must hold {size} finite numbers (--feature_size); it holds {len(numbers)}.")
        step[:] = numbers
    return steps, np.array([(number - 1) / VIDEO_RATE for number, _ in found])


def actions_at(times: np.ndarray, actions: tuple[tuple[int, float, float], ...]) -> np.ndarray:
    """Return [T, 157] of 0 and 1: which actions happen at each time; both ends of an interval belong to it."""
    active = np.zeros((len(times), CLASSES), np.int8)
    for action, start, end in actions:
        active[(times >= start) & (times <= end), action] = 1
    return active


def localisation_map(scores: np.ndarray, labels: np.ndarray, points: int) -> float:
    """Compute the mean over classes of the average precision at `points` equally spaced frames of every video.

    Some frames of a video shorter than `points` count more than once. Classes that occur at none of these frames are
    left out.

    Args:
        scores: [N, T, C].
        labels: [N, T, C] of 0 and 1, and -100 after a video's end.
        points: number of frames taken from each video.

    Returns:
        NaN if no class occurs.

    Raises:
        ValueError: the shapes differ from these.
    """
    from sklearn.metrics import average_precision_score

    if scores.shape != labels.shape or scores.ndim != 3:
        raise ValueError(f"localisation_map needs scores and labels [N, T, C]; got {scores.shape}, {labels.shape}.")
    lengths = (labels != IGNORED).all(axis=2).sum(axis=1)
    frames = [np.arange(points) * length // points for length in lengths if length]
    videos = np.flatnonzero(lengths)
    chosen = np.concatenate([scores[v, f] for v, f in zip(videos, frames, strict=True)])
    truth = np.concatenate([labels[v, f] for v, f in zip(videos, frames, strict=True)]) == 1
    occurring = np.flatnonzero(truth.any(axis=0))
    if not len(occurring):
        return float("nan")
    return float(np.mean([average_precision_score(truth[:, c], chosen[:, c]) for c in occurring]))
