"""The benchmarks: one instruction set for all libraries, updated rows of CSV files, and the tables of targets."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import CARDS, ROOT, SCRIPTS

from hf_skiprnn.kernels.cpu import library
from scripts import benchmark
from scripts.benchmarks import cpu, peak, rows, streaming, targets
from scripts.benchmarks.peers import skip_layer
from scripts.benchmarks.timing import interleaved
from scripts.benchmarks.workload import Shape, Workload, of_one_length


def test_the_launcher_holds_every_library_to_one_set(tmp_path: Path) -> None:
    options = ["--isa", "portable", "--dry_run", "--shapes", "2,6,1,3", "--cells", "gru", "--rates", "0.5"]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *options, "--seconds", "0", "--peers", "native", "ours"]
    wider = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}  # the launcher must replace it
    done = subprocess.run(command, cwd=tmp_path, env=wider, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, *measured = done.stdout.splitlines()
    assert ", portable: " in first
    assert second == "2 workloads, at least 0 minutes"
    assert [line.split()[1] for line in measured] == ["inference", "inference", "training", "training"]
    assert all("of peak" in line for line in measured[1::2])


def test_a_set_names_a_value_for_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    held = benchmark.environment("avx2")
    assert {held[name] for name in benchmark.PEERS["avx2"]} == {"AVX2", "avx2"}
    assert held["HF_SKIPRNN_CPU_ISA"] == "avx2"
    assert not set(benchmark.PEERS["avx2"]) & benchmark.environment(None).keys()
    monkeypatch.setattr(library, "instruction_set", lambda: "amx")
    widest = benchmark.environment("avx512")  # nothing of the machine is left out
    assert widest["HF_SKIPRNN_CPU_ISA"] == "amx"
    assert not set(benchmark.PEERS["avx2"]) & widest.keys()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("HF_SKIPRNN_CPU_ISA", "avx2")
    with pytest.raises(SystemExit, match=r"the comparison would not be fair.*--isa avx2"):
        rows.instruction_set()


def test_subnormal_numbers_are_flushed_for_every_peer() -> None:
    """Also where another peer has changed the setting of the thread."""
    flushed = []

    def run() -> None:
        flushed.append(float(torch.tensor(1e-40) * 1) == 0)
        torch.set_flush_denormal(False)

    times = interleaved({"first": run, "second": run}, 0)
    assert [len(values) for values in times.values()] == [3, 3]
    assert set(flushed) == {torch.set_flush_denormal(False)}  # False where the processor cannot flush


def test_the_bounds_are_positive() -> None:
    assert peak.peak_flops() > 1e8
    assert peak.read_bandwidth(1 << 16) > 1e8


def test_rows_are_renewed_and_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "speed" / "cpu.csv"
    rows.write(path, [{"name": "ours", "set": "avx2", "ms": 3}, {"name": "native", "set": "avx2", "ms": 5}], ["name"])
    known = rows.write(path, [{"name": "ours", "set": "avx2", "ms": 2, "new": 1}], ["name", "set"])
    assert {row["name"]: row["ms"] for row in known} == {"ours": "2", "native": "5"}
    assert [row["new"] for row in rows.read(path)] == ["1", ""]
    assert rows.read(tmp_path / "none.csv") == []


def row(isa: str, ms: float, name: str = "ours", **values: object) -> dict[str, str]:
    workload = Shape(16, 784, 1, 110).columns() | {"level": "layer", "cell": "lstm", "mode": "inference", "rate": 1.0}
    measured = {"spread": "constant", "threads": 1, "p50_ms": ms, "native_over_this": 6 / ms, "share_of_peak": 0.5}
    everything = workload | measured | {"name": name, "instruction_set": isa, "device": "here"} | values
    return {column: str(value) for column, value in everything.items()}


def test_each_set_is_judged_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    there = row("avx512", 0.1, device="there")
    targets.report(
        [row("avx2", 6.0), row("avx512", 3.0), row("avx512", 1.5, threads=2), row("avx2", 5.0, threads=2), there]
    )
    avx2, avx512 = capsys.readouterr().out.split("== avx2, here ==")[1].split("== avx512, here ==")
    avx512, other = avx512.split("== avx512, there ==")
    assert "100%:  60.00 (1.5) pass" in other  # another machine: its times are never compared with these
    assert "two threads" not in other
    assert "100%:   1.00 (1.5) MISS" in avx2
    assert "1.20 (1.7) MISS" in avx2
    assert "100%:   2.00 (1.5) pass" in avx512
    assert "2.00 (1.7) pass" in avx512
    assert "lstm inference  B 16  100%:   2.00 (1.5) pass    50%:      - (3) unmeasured" in avx512
    assert "avx512: 2 pass, 0 MISS, " in avx512


def test_wide_shapes_and_other_software_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"batch": 8, "steps": 250, "inputs": 4096, "units": 256, "layers": 2}
    targets.report(
        [row("avx2", 5.0, **wide), row("avx2", 6.0, "native", **wide), row("avx2", 4.0, "onnxruntime", **wide)]
    )
    said = capsys.readouterr().out
    assert "lstm inference (8, 250, 4096, 256, 2)    100%:   1.20 (1.2) pass" in said
    assert "lstm inference (8, 250, 4096, 256, 2)    100%:   0.50 (0.75) MISS" in said  # of the peak
    assert "onnxruntime: 0.80 (1) MISS" in said
    assert "1 of 2 measurements of others are slower than ours" in said


def test_folders_without_weights_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(CARDS / name) for name in ("skip-lstm-imdb", "skip-lstm-digits")]
    planned = cpu.workloads(cpu.parse(["--checkpoints", *folders, "--modes", "inference"]))
    assert [workload.spread for workload, _, _ in planned] == ["skip-lstm-digits"]
    assert capsys.readouterr().out == f"{folders[0]} holds no weights: it is not measured.\n"


def test_the_tests_of_equality_exist() -> None:
    assert all((ROOT / test).is_file() for test in cpu.TESTS)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1])
def test_a_workload_updates_as_often_as_it_says(rate: float) -> None:
    workload = Workload(Shape(2, 40, 1, 4), "lstm", "inference", rate)
    layer = skip_layer(workload)
    with torch.no_grad():
        out = layer.scan(workload.x, layer.initial_state(2))
    assert out.num_updates.sum() == workload.updates() == 2 * math.ceil(40 * rate)


def test_streams_are_timed_by_the_step() -> None:
    timed = list(streaming.streams(1, 3))[:2]
    measured = streaming.measure(timed, 0.0)
    assert [item["name"] for item in measured] == ["nn.LSTMCell", "stream lstm"]
    assert measured[0]["times_faster"] == 1.0
    assert {item["unit"] for item in measured} == {"us/step"}


def test_a_shape_of_the_parts_is_the_same_workload_by_itself() -> None:
    assert cpu.as_in_parts(Shape.parse("32,400,300,128")).input_gradients
    assert cpu.as_in_parts(Shape.parse("5,6,7,8")) == Shape(5, 6, 7, 8)


def test_a_trained_model_is_timed_without_padding() -> None:
    lengths = torch.tensor([3, 9, 5, 7])
    x = torch.arange(4 * 9).view(4, 9, 1).float()
    batch = {"input_values": x, "attention_mask": (torch.arange(9) < lengths[:, None]).long(), "labels": lengths}
    cropped = of_one_length(batch)
    assert cropped["labels"].tolist() == [9, 5, 7, 9]
    assert torch.equal(cropped["input_values"], x[[1, 2, 3, 1], :5])
    assert cropped.keys() == {"input_values", "labels"}
    whole = {"input_values": x, "labels": lengths}
    assert of_one_length(whole) is whole
