"""What `make gpu` runs, without a GPU: its order and limits, its table, and peers that must compute what we compute."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 and aarch64")

from paths import ROOT

from hf_skiprnn.kernels.triton import tiling as triton_tiling
from scripts.benchmarks import gpu as benchmark_gpu
from scripts.benchmarks import gpu_peers as peers
from scripts.benchmarks import gpu_targets as targets
from scripts.benchmarks import workload as workloads
from scripts.benchmarks.peers import ours
from scripts.benchmarks.workload import Shape
from scripts.gpu import check as gpu

TESTS = (ROOT, ROOT / "tests" / "scans", ROOT / "tests" / "triton")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of gpu_dry_run.py."""
    folder = tmp_path_factory.mktemp("dry_run")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, TESTS)),
    }
    command = [sys.executable, ROOT / "tests" / "triton" / "gpu_dry_run.py", folder]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return folder / "model_cards" / "speed", done.stdout


def test_everything_runs_in_its_order(dry_run: tuple[Path, str]) -> None:
    folder, said = dry_run
    parts = [line.split(":")[0].strip("= ") for line in said.splitlines() if line.startswith("==")]
    assert parts == ["suite", "cuda_path", "benchmark-reach", "training", "benchmark-peers", "report"]
    assert json.loads((folder / "gpu-suite.json").read_text()) == {"ties, zero and NaN": "ok"}
    outcomes = json.loads((folder / "gpu-cuda-path.json").read_text())
    assert outcomes == {"autocast": "ok", "trainer": "not run: accelerate is not installed"}
    assert "Checks that did not pass: none." in said
    assert "exit status 0" in said


def test_rows_and_errors_are_written(dry_run: tuple[Path, str]) -> None:
    folder, said = dry_run
    with (folder / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == set(peers.PEERS)
    assert len({benchmark_gpu.key(row) for row in rows}) == len(rows)
    for row in rows:
        failed = row["name"] == "masked_loop_compiled"
        assert row["error"] == ("RuntimeError: This peer fails." if failed else ""), row
        assert bool(row["p50_ms"]) != failed
        assert row["equality"] == "passed"
        assert bool(row["native_over_this"]) != failed
    again = said.split("\nagain\n")[1]
    assert f"{len(rows)} rows in" in again
    assert " ms " not in again.split("\n\n")[0]  # nothing was measured twice


def test_the_table_judges(dry_run: tuple[Path, str]) -> None:
    report = dry_run[1].split("cuDNN's LSTM over ours")[1]
    assert report.count(" pass\n") == 2  # two modes, one rate and precision; the targets there are 0
    assert report.count("not measured") == 6


def test_training_leaves_its_results(dry_run: tuple[Path, str]) -> None:
    results = json.loads((dry_run[0] / "gpu-mnist.json").read_text())
    assert results["epochs"]
    assert 0 < results["test"]["updates"] <= 5
    assert (results["precision"], results["equality"]) == ("tf32", "passed")


def row(name: str, **values: object) -> dict[str, str]:
    target = targets.TARGETS[0]
    where = {key: value for key, value in target._asdict().items() if key != "at_least"} | targets.FIXED
    rest = {"name": name, "mode": "training", "precision": "bfloat16", "error": "", "equality": "passed"}
    rest |= {"p50_ms": 10, "peak_mib": 90, "slowest_row_updates": 392, "device": "a GPU"}
    return {key: str(value) for key, value in (where | rest | values).items()}


def test_pass_miss_and_what_is_not_judged() -> None:
    def verdict(**ours: object) -> str:
        return next(line for line in targets.lines([row("native"), row("ours", **ours)]) if "not measured" not in line)

    assert "2.00 (1.5) pass" in verdict(p50_ms=5)
    assert "1.25 (1.5) MISS" in verdict(p50_ms=8)
    assert "equality: float32, lstm" in verdict(p50_ms=5, equality="float32, lstm")
    assert all("not measured" in line for line in targets.lines([row("native"), row("ours", error="Error")]))
    memory = [row("native", rate=0.25), row("ours", rate=0.25, peak_mib=31)]
    assert any("0.34 of the memory (0.33) MISS" in line for line in targets.lines(memory))


@pytest.mark.parametrize(
    ("check", "does"),
    [
        ("options, lstm, resident", True),
        ("options, gru, resident", False),
        ("options, gru_reset_after, resident", False),
        ("TF32", False),
        ("bfloat16, lstm", True),
        ("float32, lstm", False),
        ("long offsets", True),
    ],
)
def test_which_checks_a_time_rests_on(check: str, does: bool) -> None:
    wanted = benchmark_gpu.Wanted(benchmark_gpu.MAIN, "lstm", "bfloat16", "training", 0.5, "constant", ("ours",))
    assert benchmark_gpu.touches(check, wanted) == does
    assert benchmark_gpu.equality({check: "FAILED", "strided arguments": "ok"}, wanted) == (check if does else "passed")
    gru = wanted._replace(cell="gru")
    assert benchmark_gpu.touches("options, gru_reset_after, resident", gru)  # nn.GRU's cell
    assert not benchmark_gpu.touches("options, gru, resident", gru)


def test_what_is_asked_for_is_measured_first() -> None:
    plan = benchmark_gpu.plan(benchmark_gpu.parse([]))
    first = plan[: len(benchmark_gpu.plan(benchmark_gpu.parse(["--parts", "reach"])))]
    measured = {(*item.shape[:4], item.rate, item.precision, item.mode) for item in first}
    assert measured >= {
        (*target[:5], precision, mode)
        for target in targets.TARGETS
        for precision in ("bfloat16", "tf32")
        for mode in ("inference", "training")
    }
    options = ["--shapes", "4,5,6,7", "--rates", "0.5", "--precisions", "tf32", "--cells", "gru", "--peers", "ours"]
    (one,) = benchmark_gpu.plan(benchmark_gpu.parse([*options, "--modes", "training"]))
    assert one == (Shape(4, 5, 6, 7), "gru", "tf32", "training", 0.5, "constant", ("ours",))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.25])
def test_rounds_of_events_compute_what_ours_does(cell: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads.Workload, "run", lambda self, forward, parameters: forward(self.x))
    workload = workloads.Workload(Shape(3, 21, 2, 5), cell, "inference", rate)
    torch.testing.assert_close(peers.event_rounds(workload), ours(workload))


def test_a_measurement_that_does_not_end_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    status: list[int] = []
    monkeypatch.setattr(benchmark_gpu.os, "_exit", status.append)
    monkeypatch.setattr(benchmark_gpu.Deadline, "on_end", staticmethod(lambda *what: said.append(what)))
    with benchmark_gpu.Deadline("ours", 0.05):
        time.sleep(0.5)
    assert said == [("ours", "did not end within 0 s")]
    assert status == [benchmark_gpu.BROKEN]
    with benchmark_gpu.Deadline("ours", 0.2):
        pass
    time.sleep(0.4)
    assert len(said) == 1


def test_parts_have_logs_limits_and_no_survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OUTPUT", tmp_path)
    assert gpu.run("part", 60, "-c", "print('hello'); raise SystemExit(3)") == 3
    assert gpu.run("part", 60, "-c", "print('again')", more=True) == 0
    assert [line.split(",")[0] for line in (tmp_path / "gpu-part.log").read_text().splitlines()] == [
        "hello",
        "exit status 3",
        "again",
        "exit status 0",
    ]
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    start = time.monotonic()
    assert gpu.run("stuck", 5, "-c", f"{child}; print('started', flush=True); time.sleep(600)") == 124
    assert time.monotonic() - start < 60
    assert "started" in (tmp_path / "gpu-stuck.log").read_text()


def test_a_lost_device_is_begun_again_and_other_failures_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    statuses = [gpu.BROKEN, gpu.BROKEN, 1, 0]

    def run(name: str, limit: float, *command: str, more: bool = False) -> int:
        calls.append(command)
        return statuses[len(calls) - 1]

    monkeypatch.setattr(gpu, "run", run)
    gpu.measure(500, Path("outcomes"), "reach")
    assert ["--resume" in command for command in calls] == [False, True, True]
    gpu.measure(gpu.START_UP - 1, Path("outcomes"), "reach")
    assert len(calls) == 3
    gpu.measure(500, Path("outcomes"), "peers", "all")
    assert "--resume" in calls[3]  # what is asked for was measured before


def test_where_programs_cannot_share_all_else_runs_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None]] = []

    def run(name: str, limit: float, *command: str, more: bool = False) -> int:
        seen.append((name, os.environ.get("HF_SKIPRNN_TRITON_SHARE")))
        if name == "suite":
            (tmp_path / "gpu-suite.json").write_text('{"shared units": "not finished", "TF32": "ok"}')
        return 0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "OUTPUT", tmp_path)
    monkeypatch.setenv("HF_SKIPRNN_TRITON_SHARE", "1")
    (tmp_path / "data.npz").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "data.npz")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    assert seen == [
        ("suite", "1"),
        ("cuda_path", "0"),
        ("benchmark-reach", "0"),
        ("training", "0"),
        ("benchmark-peers", "0"),
        ("report", "0"),
    ]
    wanted = benchmark_gpu.Wanted(benchmark_gpu.WIDE, "lstm", "bfloat16", "training", 0.5, "constant", ("ours",))
    assert benchmark_gpu.equality({"shared units": "FAILED"}, wanted) == "shared units"
    monkeypatch.setattr(triton_tiling, "SHARES", False)
    assert benchmark_gpu.equality({"shared units": "FAILED"}, wanted) == "passed"


def test_the_suite_survives_a_check_whose_process_fails(tmp_path: Path) -> None:
    """Without a GPU every check fails in its process, and the outcome says so."""
    if torch.cuda.is_available():
        pytest.skip("the check would pass on this GPU")
    results = tmp_path / "results.json"
    code = (
        "import triton_suite as suite; from pathlib import Path; "
        f"outcomes = suite.Outcomes(['uneven rows'], Path({str(results)!r})); suite.run_in_processes(outcomes, 300)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, TESTS))
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(results.read_text()) == {"uneven rows": "FAILED"}
    assert "uneven rows: FAILED" in done.stdout
