"""Check, time and use the package on a machine with a CUDA GPU within nine minutes: `make gpu` runs this.

    python -m scripts.gpu.check mnist.npz        # the file: scripts/gpu/mnist_npz.py

The parts run in this order, each in its own processes and with a time limit:

- suite: compare the Triton engine with the dense scan (tests/triton/triton_suite.py);
- cuda_path: run everything else that uses a GPU, with small shapes (scripts/gpu/cuda_path.py);
- benchmark-reach: measure what has a target in scripts/benchmarks/gpu_targets.py;
- training: train on MNIST (scripts/gpu/train_mnist.py);
- benchmark-peers: make the other measurements, the most important first, until the time is over. A second run at the
  same commit continues after them.

Every result is written as soon as it is known, so the run may be interrupted at any time. Failures are written too, and
the other parts still run. If the check of programs that share a row block fails, the other parts run without such
programs (HF_SKIPRNN_TRITON_SHARE=0). Logs and numbers go to model_cards/speed/gpu*. The script needs torch with CUDA,
Triton, transformers and numpy, but neither an installation of this package nor a network. accelerate is optional.
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
# Time limits in seconds: of the whole run and of its parts. The last part gets the time that others do not use.
ALL, SUITE, CUDA_PATH, REACH, TRAINING = 530.0, 150.0, 90.0, 150.0, 40.0
START_UP = 25.0  # seconds that a part may need to start and stop
BROKEN = 3  # exit status of a benchmark whose device became unusable
RESTARTS = 6
SHARED = "shared units"  # name of the suite's check of programs that wait for each other


def run(name: str, limit: float, *command: str, more: bool = False) -> int:
    """Run one part, copy its output to a log, and return its exit status; 124 if it took too long."""
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
            kill_group(part.pid)  # processes that it started may still run, for example in a hanging kernel
        status = 124 if late.is_set() else status
        file.write(f"exit status {status}, {time.monotonic() - start:.0f} s\n")
    return status


def kill_group(group: int) -> None:
    """Kill the processes of a part that are still running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def check(outcomes: Path) -> list[str]:
    """Run the suite, and return the names of the checks that did not pass."""
    outcomes.unlink(missing_ok=True)
    arguments = ("--results", str(outcomes), "--limit", f"{SUITE - START_UP:.0f}")
    run("suite", SUITE, "tests/triton/triton_suite.py", *arguments)
    results = json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else {"the suite": "did not start"}
    return [name for name, outcome in results.items() if outcome != "ok"]


def measure(seconds: float, outcomes: Path, *parts: str) -> None:
    """Run these parts of the benchmark; after an error that makes the device unusable, continue in a new process."""
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
        print("The check of programs that share a row block failed: the other parts run without them.", flush=True)
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
