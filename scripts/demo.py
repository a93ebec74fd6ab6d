"""Train a Skip LSTM on handwritten digits, reload it in a new process, and compare it with three baselines.

    python scripts/demo.py

The baselines are a plain LSTM, which reads every pixel; one that reads as many pixels as the Skip LSTM but at random
(the paper's baseline); and a strided one, which reads every n-th pixel. All are trained with the recipe
digits-skip-lstm, two at a time. Unknown options are passed to train.py:

    python scripts/demo.py --seed 1 --output_dir runs/demo-1
"""

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != SCRIPTS]  # its evaluate.py would hide `evaluate`

import torch
from transformers import AutoImageProcessor, AutoModelForSequenceClassification

import hf_skiprnn  # noqa: F401 - registers the model with the Auto classes
from hf_skiprnn.commands import evaluate
from hf_skiprnn.tasks import Digits

PIXELS = 64
TRAIN = os.path.relpath(Path(__file__).with_name("train.py"))  # relative, because results.json stores the command


def train_two(shown: tuple[Path, list[str]], beside: tuple[Path, list[str]]) -> list[dict[str, Any]]:
    """Train two runs (folder, options) in parallel and return their results; the second prints to train.log."""
    print(f"\n== {shown[0]}, and beside it {beside[0]} ==", flush=True)
    log = beside[0] / "train.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as quiet:
        processes = [start(*shown), start(*beside, stdout=quiet, stderr=subprocess.STDOUT)]
        codes = [process.wait() for process in processes]
    if any(codes):
        said = log.read_text(encoding="utf-8") if codes[1] else ""
        raise SystemExit(f"{said}\nA training failed; exit codes {codes}.")
    return [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder, _ in (shown, beside)]


def start(folder: Path, options: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    """Start a training on one thread; such small scans do not profit from more."""
    command = [sys.executable, TRAIN, "--task", "digits", f"--output_dir={folder}", *options]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def reload(folder: str) -> dict[str, float]:
    """Load a checkpoint with the Auto classes only; return its accuracy and pixels read on held-out digits."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    digits = Digits().load(seed=0).test
    with torch.no_grad():
        out = model(**processor(digits["image"][:], return_tensors="pt"))
    right = out.logits.argmax(dim=1) == torch.tensor(digits["label"][:])
    return {"accuracy": right.float().mean().item(), "pixels": out.num_updates.mean().item()}


def reload_in_a_new_process(folder: Path) -> dict[str, float]:
    """Call `reload` in a new process, and return its result."""
    command = [sys.executable, __file__, "--reload", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, results: dict[str, Any]) -> str:
    """Return a line of the table."""
    test, counts = results["metrics"]["test"], results["multiply_accumulates"]
    return (
        f"{name:22} {test['accuracy']:9.1%} {test['updates']:12.1f} {test['update_rate']:7.0%} {counts['read']:10,.0f}"
    )


def main(argv: list[str]) -> None:
    """Train the four models, evaluate and reload the first, and print the table."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where the four runs go")
    parser.add_argument("--reload", metavar="CHECKPOINT", help="only evaluate this checkpoint, and print JSON")
    settings, options = parser.parse_known_args(argv)
    if settings.reload:
        print(json.dumps(reload(settings.reload)))
        return
    begin, folder = time.monotonic(), settings.output_dir
    skip, plain = train_two((folder / "skip-lstm", options), (folder / "plain-lstm", ["--gate=always", *options]))
    updates = skip["metrics"]["test"]["updates"]
    by_chance = ["--gate=random", f"--skip_probability={1 - updates / PIXELS:.4f}"]
    stride = max(int(PIXELS / updates), 2)  # strides are whole numbers, so none reads between 32 and 64 pixels
    every = ["--gate=strided", f"--stride={stride}"]
    random, strided = train_two(
        (folder / "random-lstm", [*by_chance, *options]), (folder / "strided-lstm", [*every, *options])
    )
    print(f"\n== {folder / 'skip-lstm'}, evaluated ==", flush=True)
    evaluate.main([str(folder / "skip-lstm")])
    again = reload_in_a_new_process(folder / "skip-lstm")
    print(f"loaded in a new process: accuracy {again['accuracy']:.1%}, {again['pixels']:.1f} pixels read")
    print(f"\n{'360 held-out digits':22} {'accuracy':>9} {'pixels read':>12} {'of 64':>7} {'mult-adds':>10}")
    print(row("Skip LSTM", skip))
    print(row("plain LSTM", plain))
    print(row("LSTM, random skips", random))
    print(row(f"strided LSTM (every {stride})", strided))
    print(f"\n{time.monotonic() - begin:.0f} s. Checkpoints and pictures: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
