"""Frequency discrimination: is a sine's period between 5 and 6 ms (Neil et al. 2016; Campos et al. 2018, Table 4).

Source: drawn here by seed; no data set, no licence. 100 ms of a sine of amplitude 1, sampled every 1 ms (100 steps) or
0.5 ms (200 steps), with a phase uniform over the whole period. Label 0: period ~ U(5, 6) ms. Label 1: uniform on
(1, 5) u (6, 100) ms. Rows alternate between the labels, so that every batch of even size is stratified. The task counts
as solved at an accuracy above 99 %.

Where the authors' code differs, this follows the paper: the code draws distractors from (0, 5) u (6, 100) ms, and a
phase in milliseconds that it adds as if it were radians.

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
DISTRACTORS = (1.0, 100.0)  # ms, without the target


@dataclass
class Frequency(GeneratedTask):
    """A sine whose period is in (5, 6) ms, or not."""

    name = "frequency"
    labels = ("period in (5, 6) ms", "another period")
    sampling_period: float = field(
        default=1.0, metadata={"help": "Milliseconds between two steps: the paper has 1 and 0.5."}
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
    """Draw from (1, 5) u (6, 100): on an interval without the target's width, then shift what lies beyond 5."""
    width = TARGET[1] - TARGET[0]
    periods = rng.uniform(DISTRACTORS[0], DISTRACTORS[1] - width, rows)
    return np.where(periods >= TARGET[0], periods + width, periods)
