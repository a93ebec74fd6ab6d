"""UCF-101: which of 101 actions does a clip show? (Soomro et al. 2012; Campos et al. 2018, appendix, Table 6).

Source: UCF CRCV, 13320 clips (no licence stated; from YouTube, for research). `dataset_name` is a folder in its own
layout: `UCF-101/<Class>/v_<Class>_g<group>_c<clip>.avi`, `ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt`.
Listed clips without a file are left out, with a warning. The first 10 s are decoded at 25 frames per second. A step is
the pooled output of an image model for a frame: 250 steps of 2048 numbers with microsoft/resnet-50. They are computed
once and cached. Whole groups of the training list (clips of one scene) are held out for validation, by seed.

    {"clip": "Archery/v_Archery_g01_c01.avi", "steps": [[0.41, 0.02, ...], ...], "label": 2}
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Value
from transformers import BatchFeature, EvalPrediction
from transformers.utils import logging

from hf_skiprnn.evaluation.metrics import accuracy
from hf_skiprnn.model.feature_extraction_skip_rnn import SkipRNNFeatureExtractor
from hf_skiprnn.tasks.readers.arrow_cache import cached_rows
from hf_skiprnn.tasks.readers.video import FrameFeatures, decode_frames

from .base import Batch, Row, Splits, Task, label_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

CLASSES = 101
WIDTHS = {"microsoft/resnet-50": 2048, "random": 256}  # widths that are known without loading the model


@dataclass
class UCF101(Task):
    """The task to classify the action in a clip from the features of its frames."""

    name = "ucf101"
    dataset_name: str = field(default="", metadata={"help": "Folder with UCF-101/ and ucfTrainTestlist/."})
    feature_model: str = field(
        default="microsoft/resnet-50",
        metadata={"help": 'Image model, Hub id or local folder; "random": random weights, for a dry run.'},
    )
    list_number: int = field(default=1, metadata={"help": "Which of the three official splits."})
    frame_rate: float = field(default=25.0, metadata={"help": "Frames per second."})
    frames: int = field(default=250, metadata={"help": "Frames of a clip at most, from its start."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of the training groups held out."})
    split_seed: int = field(default=0, metadata={"help": "Decides which groups are held out."})
    cache_folder: str | None = field(
        default=None, metadata={"help": "Folder of the cached features; default: datasets' cache."}
    )

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frame_rate <= 0:
            raise ValueError(f"frames and frame_rate must be above 0; got {self.frames} and {self.frame_rate}.")

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of classInd.txt."""
        lines = self._list("classInd.txt")
        return tuple(line.split()[1] for line in lines)

    def _list(self, name: str) -> list[str]:
        path = Path(self.dataset_name, "ucfTrainTestlist", name)
        if not self.dataset_name or not path.is_file():
            raise ValueError(
                f"There is no {path}. --dataset_name must be a folder in UCF-101's layout: "
                "UCF-101/<Class>/<clip>.avi and ucfTrainTestlist/*.txt."
            )
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def load(self, seed: int) -> Splits:
        """Return the splits. `seed` is not used, because the trainer shuffles the rows."""
        return self._splits

    @cached_property
    def _splits(self) -> Splits:
        train, test = self._clips("train"), self._clips("test")
        held = self._held_out_groups(train)
        parts = (
            [clip for clip in train if _group(clip) not in held],
            [clip for clip in train if _group(clip) in held],
            test,
        )
        rows = self._features(train + test)
        place = {clip: i for i, clip in enumerate(train + test)}
        return Splits(*(rows.select([place[clip] for clip in part]) for part in parts))

    def _clips(self, which: str) -> list[str]:
        """Return the clips of a list that have a file."""
        listed = [line.split()[0] for line in self._list(f"{which}list0{self.list_number}.txt")]
        found = [clip for clip in listed if Path(self.dataset_name, "UCF-101", clip).is_file()]
        if len(found) < len(listed):
            logger.warning("%s holds %d of %d clips of the %s list.", self.dataset_name, len(found), len(listed), which)
        if not found:
            raise ValueError(f"{self.dataset_name}/UCF-101 holds no clip of the {which} list.")
        return found

    def files(self, which: str) -> list[Path]:
        """Return the video files of the list "train" or "test"."""
        return [Path(self.dataset_name, "UCF-101", clip) for clip in self._clips(which)]

    def _held_out_groups(self, clips: list[str]) -> set[str]:
        groups = sorted({_group(clip) for clip in clips})
        if len(groups) < 2:
            raise ValueError(f"Validation needs at least two groups of training clips; there is only {groups}.")
        order = np.random.default_rng(self.split_seed).permutation(len(groups))
        return {groups[i] for i in order[: max(round(self.validation_share * len(groups)), 1)]}

    def _features(self, clips: list[str]) -> Dataset:
        """Return the steps of every clip, from the cache or from the image model."""
        model = FrameFeatures(self.feature_model)
        root = Path(self.dataset_name, "UCF-101")

        def row(clip: str) -> Row:
            steps = model(decode_frames(root / clip, self.frame_rate, self.frames))
            return {"clip": clip, "steps": steps, "label": self.labels.index(clip.partition("/")[0])}

        width = model(iter([np.zeros((64, 64, 3), np.uint8)])).shape[1]
        kinds = {"clip": Value("string"), "steps": Array2D((None, width), "float32")}
        facts = {
            "clips": [(clip, (root / clip).stat().st_size) for clip in clips],
            "model": model.fingerprint(),
            "processor": None if model.processor is None else model.processor.to_dict(),
            "frames": [self.frame_rate, self.frames],
        }
        features = Features({**kinds, "label": ClassLabel(names=list(self.labels))})
        return cached_rows(self.name, clips, row, features, facts, self.cache_folder).with_format("numpy")

    def collate(self, rows: list[Row]) -> Batch:
        """Return input_values [B, T, features] float32, attention_mask [B, T] and labels [B]."""
        steps = [np.asarray(row["steps"], np.float32) for row in rows]
        batch = SkipRNNFeatureExtractor(steps[0].shape[1]).pad(
            BatchFeature({"input_values": steps}), return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([int(row["label"]) for row in rows])}

    def model_defaults(self) -> dict[str, Any]:
        width = WIDTHS.get(self.feature_model) or self._splits.train[0]["steps"].shape[1]
        names = label_names(self.labels) if self.dataset_name else {"num_labels": CLASSES}
        return {"input_size": width, "problem_type": "single_label_classification", **names}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": accuracy(prediction.predictions, prediction.label_ids)}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import channels_read

        mask = batch["attention_mask"].numpy() != 0
        return channels_read(
            [x[m] for x, m in zip(batch["input_values"].numpy(), mask, strict=True)],
            [g[m] for g, m in zip(gates, mask, strict=True)],
            [self.labels[i] for i in logits.argmax(axis=1)],
            [self.labels[i] for i in batch["labels"].tolist()],
        )


def _group(clip: str) -> str:
    """Return the group (scene) of a clip: "g08" for v_Archery_g08_c02.avi."""
    found = re.search(r"_(g\d+)_c\d+\.\w+$", clip)
    if found is None:
        raise ValueError(f"A clip is named v_<Class>_g<group>_c<clip>.avi; got {clip}.")
    return found[1]
