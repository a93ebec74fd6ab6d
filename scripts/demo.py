"""Train a Skip LSTM on handwritten digits, reload it in a new process, and compare it.

    python scripts/demo.py

Beside it are a plain LSTM, which reads every pixel, one that reads as many pixels as the Skip LSTM but at random (the
paper's baseline), and a strided one, which reads every n-th. All are trained alike, by
scripts/recipes/digits-skip-lstm.yaml. Options go on to train.py:

    python scripts/demo.py --seed 1 --output_dir runs/demo-1
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import evaluate
import torch
import train
from transformers import AutoImageProcessor, AutoModelForSequenceClassification

import hf_skiprnn  # noqa: F401 - registers the model with the Auto classes
from hf_skiprnn.tasks import Digits

PIXELS = 64


def train_one(folder: Path, options: list[str], *model: str) -> dict[str, Any]:
    """Results of a training run."""
    print(f"\n== {folder} ==", flush=True)
    return train.main(["--task", "digits", f"--output_dir={folder}", *model, *options])


def reload(folder: str) -> dict[str, float]:
    """Accuracy on held-out digits and pixels read, from nothing but the checkpoint folder and its Auto classes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    digits = Digits().load(seed=0).test
    with torch.no_grad():
        out = model(**processor(digits["image"][:], return_tensors="pt"))
    right = out.logits.argmax(dim=1) == torch.tensor(digits["label"][:])
    return {"accuracy": right.float().mean().item(), "pixels": out.num_updates.mean().item()}


def reload_in_a_new_process(folder: Path) -> dict[str, float]:
    """What `reload` finds there."""
    command = [sys.executable, __file__, "--reload", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, results: dict[str, Any]) -> str:
    """A line of the table."""
    test, counts = results["metrics"]["test"], results["multiply_accumulates"]
    return (
        f"{name:22} {test['accuracy']:9.1%} {test['updates']:12.1f} {test['update_rate']:7.0%} {counts['read']:10,.0f}"
    )


def main(argv: list[str]) -> None:
    """Train the four, evaluate, reload, and print the table."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where the three runs go")
    parser.add_argument("--reload", metavar="CHECKPOINT", help="only evaluate this checkpoint, and print JSON")
    settings, options = parser.parse_known_args(argv)
    if settings.reload:
        print(json.dumps(reload(settings.reload)))
        return
    torch.set_num_threads(1)  # scans this small gain nothing by threads
    start, folder = time.monotonic(), settings.output_dir
    skip = train_one(folder / "skip-lstm", options)
    plain = train_one(folder / "plain-lstm", options, "--gate=always")
    updates = skip["metrics"]["test"]["updates"]
    chance = 1 - updates / PIXELS
    random = train_one(folder / "random-lstm", options, "--gate=random", f"--skip_probability={chance:.4f}")
    stride = max(int(PIXELS / updates), 2)  # whole strides only; above 32 pixels none reads as many
    strided = train_one(folder / "strided-lstm", options, "--gate=strided", f"--stride={stride}")
    print(f"\n== {folder / 'skip-lstm'}, evaluated ==", flush=True)
    evaluate.main([str(folder / "skip-lstm")])
    again = reload_in_a_new_process(folder / "skip-lstm")
    print(f"loaded in a new process: accuracy {again['accuracy']:.1%}, {again['pixels']:.1f} pixels read")
    print(f"\n{'360 held-out digits':22} {'accuracy':>9} {'pixels read':>12} {'of 64':>7} {'mult-adds':>10}")
    print(row("Skip LSTM", skip))
    print(row("plain LSTM", plain))
    print(row("LSTM, random skips", random))
    print(row(f"strided LSTM (every {stride})", strided))
    print(f"\n{time.monotonic() - start:.0f} s. Checkpoints and pictures: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
