"""Check, time and use the Triton engine on a machine with a CUDA GPU, within ten minutes: what `make gpu` runs.

    python scripts/gpu.py mnist.npz        # the file: scripts/mnist_npz.py

First tests/triton_suite.py; only if it passes, scripts/benchmark.py --device cuda; then scripts/gpu_training.py. Logs
and numbers go to model_cards/speed/gpu*. Needs torch with CUDA, Triton, transformers and numpy; no installation of the
package, no network.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "model_cards" / "speed"
ALL, TRAINING, START_UP = (
    570,
    75,
    45,
)  # seconds: of everything, of the training, and what a part may take beside its work


def run(name: str, limit: float, *command: str) -> int:
    """One part, its output to the terminal and to a log; its exit status, 124 where it took too long."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = OUTPUT / f"gpu-{name}.log"
    print(f"== {name} ==", flush=True)
    with log.open("w", encoding="utf-8") as file:
        command = ("timeout", str(limit), sys.executable, *command)
        part = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert part.stdout is not None
        for line in part.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            file.write(line.decode(errors="replace"))
        status = part.wait()
        file.write(f"exit status {status}, {time.monotonic() - start:.0f} s\n")
    return status


def main() -> None:
    """All parts; the exit status says whether the suite passed."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"Give the path of mnist.npz (made by scripts/mnist_npz.py).\n\n{__doc__}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start, training = time.monotonic(), TRAINING + START_UP
    failed = run("suite", ALL - training - 60, "tests/triton_suite.py")
    if failed:
        print("The suite failed: nothing is timed.", flush=True)
    else:
        left = ALL - training - (time.monotonic() - start)
        run("benchmark", left, "scripts/benchmark.py", "--device", "cuda", "--budget", f"{left - START_UP:.0f}")
    data = str(Path(sys.argv[1]).resolve())
    run("training", training, "scripts/gpu_training.py", data, "--seconds", str(TRAINING))
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
