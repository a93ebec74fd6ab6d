"""The workloads that the benchmarks time: shape, cell, mode, share of updates, and random data."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_skiprnn import SkipGRU, SkipLSTM

Run = Callable[[], object]
NATIVE: dict[str, tuple[Any, Any]] = {"lstm": (nn.LSTM, SkipLSTM), "gru": (nn.GRU, SkipGRU)}


class Shape(NamedTuple):
    """The sizes of a workload: batch B, steps T, inputs I, units H; and what the layer returns."""

    batch: int
    steps: int
    inputs: int
    units: int
    layers: int = 1
    sequence: bool = False  # return every step's output, not only the last state
    input_gradients: bool = False  # a training step also computes the gradient of the inputs

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read "B,T,I,H" or "B,T,I,H,layers"."""
        batch, steps, inputs, units, layers = (int(size) for size in f"{text},1".split(",")[:5])
        return cls(batch, steps, inputs, units, layers)

    def columns(self) -> dict[str, object]:
        """Return the columns of a CSV row that hold this shape."""
        return {name: value for name, value in self._asdict().items() if name != "input_gradients"}


@dataclass
class Workload:
    """One workload to measure, with its data."""

    shape: Shape
    cell: str
    mode: str  # "inference" | "training"
    rate: float  # share of the steps that are updates
    spread: str = "constant"  # "constant": all rows have the same rate; "lognormal": the rates of rows differ
    threads: int = 1
    level: str = "layer"  # "layer", or "model" for a whole trained model
    model: nn.Module | None = None  # the trained model
    batch: dict[str, Tensor] = field(default_factory=dict)  # the trained model's inputs
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    native: nn.Module = field(init=False)
    x: Tensor = field(init=False)  # [B, T, I]
    gates: Tensor | None = field(init=False, default=None)  # [B, T] bool: forced gates if the rates of rows differ

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape = self.shape
        self.native = NATIVE[self.cell][0](shape.inputs, shape.units, shape.layers, batch_first=True)
        self.native.to(self.device, self.dtype)
        self.x = torch.randn(shape.batch, shape.steps, shape.inputs).to(self.device, self.dtype)
        if self.spread == "lognormal":
            self.gates = lognormal_gates(shape.batch, shape.steps, self.rate).to(self.device)

    @property
    def interval(self) -> int:
        """The number of steps from one update to the next."""
        return round(1 / self.rate)

    def updates(self) -> int:
        """Return the number of updates of all rows together."""
        if self.gates is not None:
            return int(self.gates.sum())
        if self.model is not None:
            return round(self.rate * self.shape.batch * self.shape.steps)
        return self.shape.batch * math.ceil(self.shape.steps / self.interval)

    def run(self, forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> Run:
        """Return a function that runs inference, or a training step: forward, and backward from the output's sum."""
        if self.mode == "inference":

            def infer() -> None:
                with torch.inference_mode():
                    forward(self.x)

            return infer

        def train() -> None:
            x = self.x.detach().requires_grad_(self.shape.input_gradients)
            for parameter in parameters:
                parameter.grad = None
            forward(x).sum().backward()

        return train


def lognormal_gates(batch: int, steps: int, rate: float) -> Tensor:
    """Draw gates [B, T] bool for rows with log-normal update rates around `rate` (sigma 0.5, at most 1)."""
    rates = (rate * torch.exp(0.5 * torch.randn(batch) - 0.125)).clamp(max=1.0)
    gates = torch.rand(batch, steps) < rates.unsqueeze(1)
    gates[:, 0] = True
    return gates


def bias_of_interval(interval: int) -> float:
    """Return b_p of a gate with W_p = 0 that updates every `interval` steps: sigmoid(b_p) = 0.5 / interval.

    The value is slightly larger, so that rounding does not delay an update by a step.
    """
    increment = 0.5 / interval * (1 + 1e-4)
    return math.log(increment / (1 - increment))


def of_one_length(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch without padding, whose labels have one for each row; see `of_checkpoint`."""
    if (mask := batch.get("attention_mask")) is None:
        return batch
    lengths = mask.sum(1)
    steps = int(lengths.median())
    rows = (lengths >= steps).nonzero().flatten()
    rows = rows[torch.arange(len(mask)) % len(rows)]
    inputs = {name: part[rows, :steps].contiguous() for name, part in batch.items() if name.startswith("input")}
    return {**inputs, "labels": batch["labels"][rows]}


def of_checkpoint(folder: str, mode: str) -> Workload:
    """Load a trained model and 256 test rows of its task. The peers get random inputs of the same shape.

    If rows differ in length, those of at least the median length are cropped to it, and repeated up to 256. A peer
    would compute padding, and our engine would not: the times would compare lengths.
    """
    from transformers import AutoModelForSequenceClassification

    from hf_skiprnn.commands import evaluate

    _, task = evaluate.parse([folder])
    task.use_processor(folder)
    rows = task.load(seed=0).test
    batch = of_one_length(task.collate([rows[i] for i in range(min(256, len(rows)))]))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        gates = model(**batch, output_update_gates=True).update_gates
    config = model.config
    batch_size, steps = gates.shape
    shape = Shape(batch_size, steps, config.input_size, config.hidden_size, config.num_hidden_layers)
    rate = round(float(gates.mean()), 3)
    name = Path(folder).resolve().name
    return Workload(shape, config.cell_type, mode, rate, name, level="model", model=model, batch=dict(batch))
