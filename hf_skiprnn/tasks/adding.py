"""Adding: the sum of the two marked values (Hochreiter and Schmidhuber 1997; Campos et al. 2018, Table 1).

Source: drawn here by seed; no data set, no licence. Length 50; each step holds a value ~ U(-0.5, 0.5) and a marker,
which is 1 at one step of the first 10 % and at one step of the last half, else 0. The model predicts the sum of the two
marked values after the last step. The task counts as solved when the mean squared error is at least 100 times below the
output's variance of 1/6.

The loss is the mean squared error, as in the paper. The authors' code takes half of it, so the same lambda weighs twice
as much there.

    {"input_values": [[0.14, 0.0], [-0.23, 0.0], [-0.46, 1.0], [-0.48, 0.0], ...], "labels": -0.88}
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import EvalPrediction

from hf_skiprnn.evaluation.metrics import mean_squared_error

from .base import Batch, GeneratedTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OUTPUT_VARIANCE = 1 / 6  # of the sum of two values, each of variance 1/12


@dataclass
class Adding(GeneratedTask):
    """The sum of two marked values among `length`."""

    name = "adding"
    length: int = field(default=50, metadata={"help": "Steps of a sequence; at least 10."})

    def __post_init__(self) -> None:
        if self.length < 10:
            raise ValueError(f"length must be at least 10, for the first 10 % to hold a step; got {self.length}.")

    def draw(self, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
        values = rng.uniform(-0.5, 0.5, (rows, self.length)).astype(np.float32)
        marked = np.stack(
            [rng.integers(0, self.length // 10, rows), rng.integers((self.length + 1) // 2, self.length, rows)], axis=1
        )
        markers = np.zeros_like(values)
        np.put_along_axis(markers, marked, 1.0, axis=1)
        sums = np.take_along_axis(values, marked, axis=1).sum(axis=1)
        return {"input_values": np.stack([values, markers], axis=2), "labels": sums}

    def model_defaults(self) -> dict[str, Any]:
        return {"input_size": 2, "num_labels": 1, "problem_type": "regression"}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        mse = mean_squared_error(prediction.predictions, prediction.label_ids)
        return {"mse": mse, "solved": float(mse <= OUTPUT_VARIANCE / 100)}

    def figure(self, batch: Batch, gates: np.ndarray, logits: np.ndarray) -> "Figure":
        from hf_skiprnn.evaluation.figures import marked_values_read

        return marked_values_read(batch["input_values"].numpy(), gates, logits[:, 0], batch["labels"].numpy())
