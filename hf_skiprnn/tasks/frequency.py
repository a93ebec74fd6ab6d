"""Frequency discrimination: is a sine's period between 5 and 6 ms (Neil et al. 2016; Campos et al. 2018, Table 4).

Source: random numbers from a seed, so no data set and no licence. A sequence is 100 ms of a sine of amplitude 1,
sampled every 1 ms (100 steps) or 0.5 ms (200 steps). The phase is uniform over the whole period. Label 0: the period is
from U(5, 6) ms. Label 1: the period is uniform on (1, 5) and (6, 100) ms. Rows alternate between the labels, so that a
batch of even size holds equally many of both. The task counts as solved at an accuracy above 99 %.

The authors' code differs from the paper in two points, and this task follows the paper: the code draws the periods of
label 1 from (0, 5) and (6, 100) ms, and it draws a phase in milliseconds but adds it as if it were radians.

    {"input_values": [[-0.87], [0.06], [0.92], [0.75], ...], "labels": 0}
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import EvalPrediction

from hf_skiprnn.evaluation.metrics import accuracy

from .base import Batch, GeneratedTask, label_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DURATION = 100.0  # ms
TARGET = (5.0, 6.0)  # ms
DISTRACTORS = (1.0, 100.0)  # ms, the range of other periods; the target interval is left out


@dataclass
class Frequency(GeneratedTask):
    """The task to tell whether the period of a sine is in (5, 6) ms."""

    name = "frequency"
    labels = ("period in (5, 6) ms", "another period")
    sampling_period: float = field(
        default=1.0, metadata={"help": "Milliseconds between two steps: 1 or 0.5 in the paper."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.sampling_period <= TARGET[0] / 2:
            raise ValueError(
                f"sampling_period must be above 0 and at most {TARGET[0] / 2} ms, half the shortest target period; "
                f"got {self.sampling_period}."
            )

    def draw(self, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
        labels = np.arange(rows) % 2
        periods = np.where(labels == 0, rng.uniform(*TARGET, rows), _distractor_periods(rng, rows))
        phases = rng.uniform(0, 2 * np.pi, rows)
        times = np.arange(round(DURATION / self.sampling_period)) * self.sampling_period
        waves = np.sin(2 * np.pi * times / periods[:, None] + phases[:, None])
        return {"input_values": waves[:, :, None].astype(np.float32), "labels": labels}

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": 1, "problem_type": "single_label_classification", **label_names(self.labels)}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        share = accuracy(prediction.predictions, prediction.label_ids)
        return {"accuracy": share, "solved": float(share > 0.99)}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import waves_read

        return waves_read(
            batch["input_values"][:, :, 0].numpy(),
            gates,
            self.sampling_period,
            [self.labels[i] for i in logits.argmax(axis=1)],
            [self.labels[i] for i in batch["labels"].tolist()],
        )


def _distractor_periods(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Draw from (1, 5) and (6, 100) ms: draw from (1, 99), then add 1 to everything above 5."""
    width = TARGET[1] - TARGET[0]
    periods = rng.uniform(DISTRACTORS[0], DISTRACTORS[1] - width, rows)
    return np.where(periods >= TARGET[0], periods + width, periods)
