"""Time a step of a stream against nn.LSTMCell, and exported graphs in ONNX Runtime against an exported nn.LSTM.

    python scripts/benchmark.py streaming
    python scripts/benchmark.py streaming --isa avx2     # streams only: ONNX Runtime cannot be held to a set

Everything runs on one thread with one row. A stream's time is the mean over its steps, both read and skipped, including
the checks of its input; nn.LSTMCell runs in inference mode. ONNX Runtime runs a whole sequence. Update rates are
constant: W_p is 0 and b_p sets the interval, which takes the same time as a trained gate. Compared runs alternate. Each
measurement is a row of model_cards/speed/streaming.csv; a run replaces the rows that it measures. Nothing is measured
if the tests of streams and graphs fail, or if the machine is busy.
"""

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification

from .peers import RESTRICTED
from .rows import SPEED, cpu_provenance, percentiles, write
from .timing import check_equality, interleaved, times_faster, wait_until_idle
from .workload import Run, bias_of_interval

KEY = ("name", "inputs", "units", "steps", "rate", "unit", "instruction_set")
INTERVALS = (1, 2, 4, 10, 20)  # steps from one update to the next
SHAPES = ((1, 110, 784), (300, 128, 400), (64, 512, 400))  # inputs, units, steps
STEPS = 200  # steps of a stream in one timed run


class Timed(NamedTuple):
    """A run to be timed, and the columns of its row."""

    name: str
    inputs: int
    units: int
    steps: int
    rate: float
    run: Run
    unit: str = "us/step"

    @property
    def divisor(self) -> int:
        """The number of timed units in a run: steps, or 1 for a whole sequence."""
        return self.steps if self.unit == "us/step" else 1


def model_with_interval(cell_type: Any, inputs: int, units: int, interval: int) -> SkipRNNForSequenceClassification:
    """Make a model with random weights that updates every `interval` steps."""
    config = SkipRNNConfig(cell_type=cell_type, input_size=inputs, hidden_size=units)
    model = SkipRNNForSequenceClassification(config).eval()
    with torch.no_grad():
        model.base_model.update_gate.weight.zero_()
        model.base_model.update_gate.bias.fill_(bias_of_interval(interval))
    return model


def stepped_cell(inputs: int, units: int, x: Tensor) -> Run:
    """Return a run of nn.LSTMCell over the steps x [T, I], one call a step."""
    cell, rows = nn.LSTMCell(inputs, units), [step.unsqueeze(0) for step in x]

    @torch.inference_mode()
    def run() -> Tensor:
        h = c = torch.zeros(1, units)
        for row in rows:
            h, c = cell(row, (h, c))
        return h

    return run


def pushed(model: SkipRNNForSequenceClassification, x: Tensor) -> Run:
    """Return a run of a stream over the steps x [T, I]."""
    stream, rows = model.stream(), list(x)

    def run() -> None:
        for row in rows:
            stream.push(row)

    return run


def streams(inputs: int, units: int) -> Iterator[Timed]:
    """Yield runs of nn.LSTMCell, of streams at every rate, and of a stream that only skips."""
    x = torch.randn(STEPS, inputs)
    yield Timed("nn.LSTMCell", inputs, units, STEPS, 1.0, stepped_cell(inputs, units, x))
    for cell_type in ("lstm", "gru"):
        for interval in INTERVALS:
            run = pushed(model_with_interval(cell_type, inputs, units, interval), x)
            yield Timed(f"stream {cell_type}", inputs, units, STEPS, 1 / interval, run)
    skips = model_with_interval("lstm", inputs, units, 1)
    skips.set_gate_shift(-60)  # after the first step it never updates
    yield Timed("stream, skipped step", inputs, units, STEPS, 0.0, pushed(skips, x))


class NativeClassifier(nn.Module):
    """A classifier of nn.LSTM and a linear layer on its last state."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.lstm, self.classifier = nn.LSTM(inputs, units, batch_first=True), nn.Linear(units, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, I] to logits [B, 2]."""
        return self.classifier(self.lstm(x)[1][0][-1])


def exported(inputs: int, units: int, steps: int, folder: Path) -> Iterator[Timed]:
    """Yield runs of graphs in ONNX Runtime on one thread: nn.LSTM, and the loop over updates at every rate."""
    from hf_skiprnn.inference.export import OPSET, UpdateLoop, save_onnx, session

    x, path, unit = torch.randn(1, steps, inputs), folder / "graph.onnx", "us/sequence"
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    native = NativeClassifier(inputs, units).eval()
    torch.onnx.export(native, (x,), path, input_names=["x"], dynamic_shapes=dynamic, opset_version=OPSET, verbose=False)
    run = partial(session(path).run, None, {"x": x.numpy()})
    yield Timed("onnxruntime nn.LSTM", inputs, units, steps, 1.0, run, unit)
    feed = {"input_values": x.numpy(), "attention_mask": torch.ones(1, steps, dtype=torch.long).numpy()}
    for interval in INTERVALS:
        save_onnx(UpdateLoop(model_with_interval("lstm", inputs, units, interval)), path)
        run = partial(session(path).run, None, feed)
        yield Timed("onnxruntime skip lstm", inputs, units, steps, 1 / interval, run, unit)


def measure(timed: Sequence[Timed], seconds: float) -> list[dict[str, object]]:
    """Return CSV rows: microseconds for one unit, and the speed-up over the first of `timed`."""
    times = list(interleaved({str(index): item.run for index, item in enumerate(timed)}, seconds).values())
    rows: list[dict[str, object]] = []
    for item, series in zip(timed, times, strict=True):
        about = {name: value for name, value in item._asdict().items() if name != "run"}
        rows.append(
            {**about, **percentiles([1e3 * ms / item.divisor for ms in series])}
            | {"times_faster": round(times_faster(times[0], series), 2)}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Measure, print and write; return the new rows."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each shape")
    parser.add_argument("--no_onnx", action="store_true", help="streams only")
    parser.add_argument("--output", type=Path, default=SPEED / "streaming.csv", help="CSV file")
    options = parser.parse_args(arguments)
    with_graphs = not (options.no_onnx or RESTRICTED)
    torch.set_num_threads(1)
    check_equality("tests/inference/test_streaming.py", *(["tests/inference/test_export.py"] if with_graphs else []))
    rows: list[dict[str, object]] = []
    for inputs, units, steps in SHAPES:
        wait_until_idle()
        rows += measure(list(streams(inputs, units)), options.seconds)
        if with_graphs:
            with tempfile.TemporaryDirectory() as folder:
                graphs = measure(list(exported(inputs, units, steps, Path(folder))), options.seconds)
            rows += [row | {"onnxruntime": version("onnxruntime")} for row in graphs]
    facts = cpu_provenance()
    rows = [facts | row for row in rows]
    for row in rows:
        print(*(row[name] for name in ("name", "inputs", "units", "rate", "p50", "unit", "times_faster")))
    write(options.output, rows, KEY)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
