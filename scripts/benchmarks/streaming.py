"""Time a step of a stream against nn.LSTMCell, and the exported graph in onnxruntime against an exported nn.LSTM.

    python scripts/benchmark.py --streaming
    python scripts/benchmark_streaming.py --seconds 2 --no_onnx

One thread. A stream's time is the mean over its steps, read and skipped, input check included; nn.LSTMCell is stepped
in inference mode, one row. In onnxruntime one row of a whole sequence. Update rates are constant: W_p is 0 and b_p sets
the interval, which costs the same. All that is compared runs in turn. Appends a CSV row a measurement to
model_cards/speed/streaming.csv, but only after the tests of equality have passed, and not where others kept the
machine busy meanwhile.
"""

import csv
import datetime
import math
import platform
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification, __version__

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "model_cards" / "speed" / "streaming.csv"
INTERVALS = (1, 2, 4, 10, 20)  # an update every so many steps
SHAPES = ((1, 110, 784), (300, 128, 400), (64, 512, 400))  # inputs, units, steps
BUSY = 0.15  # of all cores, taken by others: more than that spoils a measurement
STEPS = 200  # of a stream, between two looks at the clock


class Measured(NamedTuple):
    """What was timed."""

    name: str
    inputs: int
    units: int
    steps: int
    rate: float
    run: Callable[[], object]
    per: int  # steps of a run; 1: the whole sequence is one


def model_with_interval(cell_type: Any, inputs: int, units: int, interval: int) -> SkipRNNForSequenceClassification:
    """Random weights, and an update every `interval` steps."""
    config = SkipRNNConfig(cell_type=cell_type, input_size=inputs, hidden_size=units)
    model = SkipRNNForSequenceClassification(config).eval()
    share = 0.5 / interval * 1.001  # above the tie
    with torch.no_grad():
        model.base_model.update_gate.weight.zero_()
        model.base_model.update_gate.bias.fill_(math.log(share / (1 - share)))
    return model


def stepped_cell(inputs: int, units: int, x: torch.Tensor) -> Callable[[], object]:
    """nn.LSTMCell over the steps x [T, I], as one would call it."""
    cell, rows = nn.LSTMCell(inputs, units), [step.unsqueeze(0) for step in x]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        h = c = torch.zeros(1, units)
        for row in rows:
            h, c = cell(row, (h, c))
        return h

    return run


def pushed(model: SkipRNNForSequenceClassification, x: torch.Tensor) -> Callable[[], object]:
    """A stream over the steps x [T, I]."""
    stream, rows = model.stream(), list(x)

    def run() -> None:
        for row in rows:
            stream.push(row)

    return run


def streams(inputs: int, units: int) -> list[Measured]:
    """Streams at every rate, and nn.LSTMCell."""
    x = torch.randn(STEPS, inputs)
    runs = [Measured("nn.LSTMCell", inputs, units, STEPS, 1.0, stepped_cell(inputs, units, x), STEPS)]
    for cell_type in ("lstm", "gru"):
        for interval in INTERVALS:
            run = pushed(model_with_interval(cell_type, inputs, units, interval), x)
            runs.append(Measured(f"stream {cell_type}", inputs, units, STEPS, 1 / interval, run, STEPS))
    skips = model_with_interval("lstm", inputs, units, 1)
    skips.set_gate_shift(-60)  # never again after the first step
    runs.append(Measured("stream, skipped step", inputs, units, STEPS, 0.0, pushed(skips, x), STEPS))
    return runs


class NativeClassifier(nn.Module):
    """nn.LSTM and a linear layer on its last state."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.lstm, self.classifier = nn.LSTM(inputs, units, batch_first=True), nn.Linear(units, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, I] -> [B, 2]."""
        return self.classifier(self.lstm(x)[1][0][-1])


def exported(inputs: int, units: int, steps: int, folder: Path) -> list[Measured]:
    """Graphs in onnxruntime, one thread: the loop over updates at every rate, and nn.LSTM."""
    from hf_skiprnn.inference.export import OPSET, UpdateLoop, save_onnx, session

    x, path = torch.randn(1, steps, inputs), folder / "graph.onnx"
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    native = NativeClassifier(inputs, units).eval()
    torch.onnx.export(native, (x,), path, input_names=["x"], dynamic_shapes=dynamic, opset_version=OPSET, verbose=False)
    graphs = [("onnxruntime nn.LSTM", 1.0, session(path), {"x": x.numpy()})]
    feed = {"input_values": x.numpy(), "attention_mask": torch.ones(1, steps, dtype=torch.long).numpy()}
    for interval in INTERVALS:
        save_onnx(UpdateLoop(model_with_interval("lstm", inputs, units, interval)), path)
        graphs.append(("onnxruntime skip lstm", 1 / interval, session(path), feed))
    return [
        Measured(name, inputs, units, steps, rate, partial(runs.run, None, given), 1)
        for name, rate, runs, given in graphs
    ]


def measure(runs: list[Measured], seconds: float) -> list[dict[str, object]]:
    """CSV rows: microseconds of a step or of a whole sequence, and how many times faster than the first of `runs`."""
    times: list[list[float]] = [[] for _ in runs]
    for item in runs:
        item.run()
    psutil.cpu_percent()
    own, start = time.process_time(), time.perf_counter()
    while len(times[0]) < 9 or time.perf_counter() - start < seconds:
        for item, series in zip(runs, times, strict=True):
            before = time.perf_counter()
            item.run()
            series.append((time.perf_counter() - before) / item.per * 1e6)
    mine = (time.process_time() - own) / (time.perf_counter() - start) / (psutil.cpu_count() or 1)
    busy = max(psutil.cpu_percent() / 100 - mine, 0.0)
    reference = quantiles(times[0], n=10)[4]
    rows: list[dict[str, object]] = []
    for item, series in zip(runs, times, strict=True):
        cuts = quantiles(series, n=10)
        rows.append(
            about()
            | {key: value for key, value in item._asdict().items() if key not in ("run", "per")}
            | {"unit": "us/step" if item.per > 1 else "us/sequence"}
            | {f"p{cut * 10}": round(cuts[cut - 1], 3) for cut in (2, 5, 8)}
            | {"times_faster": round(reference / cuts[4], 2), "busy": round(busy, 2)}
        )
    return rows


def about() -> dict[str, object]:
    """Where and with what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "device": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hf_skiprnn": __version__,
        "commit": commit.stdout.strip(),
    }


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def check_equality(with_onnx: bool) -> None:
    """Refuse to time what is not right."""
    tests = ["tests/inference/test_streaming.py", *(["tests/inference/test_export.py"] if with_onnx else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The tests fail; nothing is timed:\n{done.stdout[-2000:]}")


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    """Measure, print, append to the CSV file; returns its new rows."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each shape")
    parser.add_argument("--no_onnx", action="store_true", help="streams only")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file to append to")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    check_equality(not options.no_onnx)
    rows: list[dict[str, object]] = []
    for inputs, units, steps in SHAPES:
        rows += measure(streams(inputs, units), options.seconds)
        if not options.no_onnx:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(exported(inputs, units, steps, Path(folder)), options.seconds)
    if not options.no_onnx:
        rows = [row | {"onnxruntime": version("onnxruntime")} for row in rows]
    for row in rows:
        print(" ".join(f"{row[key]}" for key in ("name", "inputs", "units", "rate", "p50", "unit", "times_faster")))
    quiet = [row for row in rows if float(str(row["busy"])) <= BUSY]
    if len(quiet) < len(rows):
        print(f"{len(rows) - len(quiet)} of {len(rows)} rows are not written: others kept the machine busy.")
    if quiet:
        append(quiet, options.output)
    return rows


def append(rows: list[dict[str, object]], path: Path) -> None:
    """Add rows to a CSV file of the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*dict.fromkeys([*rows[0], "onnxruntime"])]
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
