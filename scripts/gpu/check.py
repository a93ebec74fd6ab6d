"""Check, time and use the package on a machine with a CUDA GPU, within nine minutes: what `make gpu` runs.

    python -m scripts.gpu.check mnist.npz        # the file: scripts/gpu/mnist_npz.py

In this order, each part in processes of its own and each with a limit:

- suite: the Triton engine against the definition (tests/triton/triton_suite.py);
- cuda_path: everything else that runs on a GPU, small (scripts/gpu/cuda_path.py);
- benchmark-reach: the measurements that scripts/benchmarks/gpu_targets.py judges;
- training: MNIST (scripts/gpu/train_mnist.py);
- benchmark-peers: the other measurements, most wanted first, until the time is over. At the same commit a second run
  goes on behind them.

Every result is written when it is known, so the run may be cut off anywhere. What fails is written down and the rest
goes on: where programs that share a row block do not pass their check, all else runs without them
(HF_SKIPRNN_TRITON_SHARE=0). Logs and numbers go to model_cards/speed/gpu*. It needs torch with CUDA, Triton,
transformers and numpy; no installation of the package, no network. accelerate is used where it is.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "model_cards" / "speed"
# Seconds: of everything, and of its parts. What a part does not use goes to the last.
ALL, SUITE, CUDA_PATH, REACH, TRAINING = 530.0, 150.0, 90.0, 150.0, 40.0
START_UP = 25.0  # what a part may take beside its work
BROKEN = 3  # status of a benchmark whose device was lost
RESTARTS = 6
SHARED = "shared units"  # the suite's check of programs that wait for each other


def run(name: str, limit: float, *command: str, more: bool = False) -> int:
    """One part, its output to the terminal and to a log; its exit status, 124 where it took too long."""
    start = time.monotonic()
    folders = (ROOT, ROOT / "tests" / "scans", ROOT / "tests" / "triton")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONUNBUFFERED": "1"}
    log = OUTPUT / f"gpu-{name}.log"
    print(f"== {name} ==", flush=True)
    with log.open("a" if more else "w", encoding="utf-8") as file:
        command = (sys.executable, *command)
        late = threading.Event()
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as part:

            def end() -> None:
                late.set()
                kill_group(part.pid)

            timer = threading.Timer(max(limit, 0.0), end)
            timer.start()
            assert part.stdout is not None
            for line in part.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
                file.write(line.decode(errors="replace"))
                file.flush()
            status = part.wait()
            timer.cancel()
            kill_group(part.pid)  # what it has started: a process whose kernel hangs
        status = 124 if late.is_set() else status
        file.write(f"exit status {status}, {time.monotonic() - start:.0f} s\n")
    return status


def kill_group(group: int) -> None:
    """End a part's processes, if there are any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def check(outcomes: Path) -> list[str]:
    """Run the suite; names of checks that did not pass."""
    outcomes.unlink(missing_ok=True)
    arguments = ("--results", str(outcomes), "--limit", f"{SUITE - START_UP:.0f}")
    run("suite", SUITE, "tests/triton/triton_suite.py", *arguments)
    results = json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else {"the suite": "did not start"}
    return [name for name, outcome in results.items() if outcome != "ok"]


def measure(seconds: float, outcomes: Path, *parts: str) -> None:
    """Time these parts of the benchmark; begun again behind what breaks the device."""
    start = time.monotonic()
    options = ["--equality", str(outcomes), "--parts", *parts]
    for attempt in range(RESTARTS):
        left = seconds - (time.monotonic() - start)
        if left < START_UP:
            return
        budget = ("--budget", f"{left - START_UP:.0f}", "--limit", f"{min(90.0, left):.0f}")
        resume = () if parts == ("reach",) and not attempt else ("--resume",)
        name = f"benchmark-{parts[0]}"
        if run(name, left, "-m", "scripts.benchmarks.gpu", *options, *budget, *resume, more=attempt > 0) != BROKEN:
            return


def main() -> None:
    """Run all parts; the exit status says whether the suite and the checks of the CUDA path passed."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"Give the path of mnist.npz (made by scripts/gpu/mnist_npz.py).\n\n{__doc__}")
    data, outcomes = str(Path(sys.argv[1]).resolve()), OUTPUT / "gpu-suite.json"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    failed = check(outcomes)
    if SHARED in failed:
        os.environ["HF_SKIPRNN_TRITON_SHARE"] = "0"
        print("Programs that share a row block did not pass: everything else runs without them.", flush=True)
    results = ("--results", str(OUTPUT / "gpu-cuda-path.json"))
    cuda_path = run("cuda_path", CUDA_PATH, "-m", "scripts.gpu.cuda_path", *results)
    measure(REACH, outcomes, "reach")
    arguments = (data, "--seconds", f"{TRAINING:.0f}", "--equality", "; ".join(failed) or "passed")
    run("training", TRAINING + START_UP, "-m", "scripts.gpu.train_mnist", *arguments)
    measure(ALL - START_UP - (time.monotonic() - start), outcomes, "peers", "rows", "all")
    run("report", START_UP, "-m", "scripts.benchmarks.gpu", "--report")
    print(f"Checks that did not pass: {'; '.join(failed) or 'none'}. {time.monotonic() - start:.0f} s.", flush=True)
    sys.exit(1 if failed or cuda_path else 0)


if __name__ == "__main__":
    main()
