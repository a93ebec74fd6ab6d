"""Adding: the sum of the two marked values (Hochreiter and Schmidhuber 1997; Campos et al. 2018, Table 1).

Source: random numbers from a seed, so no data set and no licence. A sequence has 50 steps. Each step holds a value from
U(-0.5, 0.5) and a marker. The marker is 1 at one step of the first 10 % and at one step of the second half, else 0.
After the last step the model predicts the sum of the two marked values. The task counts as solved if the mean squared
error is at most a hundredth of the output's variance, which is 1/6.

The loss is the mean squared error, as in the paper. The authors' code uses half of it, so there the same lambda has
twice the weight.

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


OUTPUT_VARIANCE = 1 / 6  # variance of the sum of two values, each with variance 1/12


@dataclass
class Adding(GeneratedTask):
    """The task to add the two marked values in a sequence of `length` values."""

    name = "adding"
    length: int = field(default=50, metadata={"help": "Steps of a sequence; at least 10."})

    def __post_init__(self) -> None:
        if self.length < 10:
            raise ValueError(f"length must be at least 10, so that the first 10 % hold a step; got {self.length}.")

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
