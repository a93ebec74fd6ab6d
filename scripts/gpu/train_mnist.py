"""Train a Skip LSTM on sequential MNIST on a GPU, from one file, with only torch and transformers.

    python -m scripts.gpu.train_mnist mnist.npz --seconds 120

The file is made by scripts/gpu/mnist_npz.py. The settings are those of the recipe mnist-skip-lstm except the schedule:
the learning rate follows a cosine over the given seconds. 5000 training images are held out. Matrix products use TF32.
The script prints one line each epoch, and writes accuracy, updates and speed to model_cards/speed/gpu-mnist.json after
every epoch.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from scripts.benchmarks.rows import ROOT, provenance

CONFIG: dict[str, Any] = {
    "cell_type": "lstm",
    "input_size": 1,
    "hidden_size": 110,
    "num_labels": 10,
    "update_bias": -1.0,
    "budget_loss": "l2",
    "budget_weight": 1e-6,
    "budget_target": 0.4,
}
BATCH, LEARNING_RATE, WARMUP_STEPS, HELD_OUT = 128, 1e-3, 500, 5000


def load(path: Path, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (images [N, 784, 1] in [0, 1], labels [N]) for train, validation and test."""
    with np.load(path) as arrays:
        whole = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
    images = {split: (whole[f"{split}_images"].float() / 255).unsqueeze(-1) for split in ("train", "test")}
    labels = {split: whole[f"{split}_labels"].long() for split in ("train", "test")}
    order = torch.randperm(len(labels["train"]), generator=torch.Generator().manual_seed(0)).to(device)
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return {
        "train": (images["train"][train], labels["train"][train]),
        "validation": (images["train"][held_out], labels["train"][held_out]),
        "test": (images["test"], labels["test"]),
    }


@torch.no_grad()
def evaluate(model: SkipRNNForSequenceClassification, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the accuracy and the updates per row."""
    model.eval()
    hits, updates, batch = 0.0, 0.0, 1000
    for x, y in zip(data[0].split(batch), data[1].split(batch), strict=True):
        out = model(input_values=x)
        hits += float((out.logits.argmax(-1) == y).sum())
        updates += float(out.num_updates.sum())
    model.train()
    return {"accuracy": hits / len(data[1]), "updates": updates / len(data[1])}


def train(
    model: SkipRNNForSequenceClassification,
    data: dict[str, tuple[Tensor, Tensor]],
    seconds: float,
    keep: Callable[[list[dict[str, float]]], None],
) -> None:
    """Train until the time is over. After every epoch, call `keep` with the numbers of all epochs so far."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    images, labels = data["train"]
    history: list[dict[str, float]] = []
    start, step, training = time.perf_counter(), 0, 0.0
    while time.perf_counter() - start < seconds:
        begun, losses = time.perf_counter(), []
        for index in torch.randperm(len(labels), device=labels.device).split(BATCH):
            spent = (time.perf_counter() - start) / seconds
            rate = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate
            loss = model(input_values=images[index], labels=labels[index]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
            if step % 50 == 0:
                losses[-1].item()  # waits for the device, so that the measured time is right
                if time.perf_counter() - start > seconds:
                    break
        training += time.perf_counter() - begun
        step_ms = round(1e3 * training / step, 3)
        loss = float(torch.stack(losses).mean())
        line = {"epoch": len(history) + 1, "step": step, "loss": loss, "training_step_ms": step_ms}
        history.append(line | evaluate(model, data["validation"]))
        print("  ".join(f"{name} {value:.4g}" for name, value in history[-1].items()), flush=True)
        keep(history)


def main() -> None:
    """Train, test and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="made by scripts/gpu/mnist_npz.py")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training")
    parser.add_argument("--backend", default="triton", help="backend of the scan")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards" / "speed" / "gpu-mnist.json")
    parser.add_argument(
        "--equality", default="not asked", help="outcome of the engine's checks, to be stored in the results"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    data = load(options.data, options.device)
    model = SkipRNNForSequenceClassification(SkipRNNConfig(**CONFIG)).to(options.device)
    model.set_scan_backend(options.backend)
    facts: dict[str, Any] = provenance() | {"backend": options.backend, "equality": options.equality}
    if options.device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    facts |= {"precision": "tf32" if options.device == "cuda" else "float32", "config": CONFIG, "batch_size": BATCH}

    def keep(history: list[dict[str, float]], **more: object) -> None:
        results = facts | {"seconds": options.seconds, "epochs": history} | more
        options.output.parent.mkdir(parents=True, exist_ok=True)
        part = options.output.with_suffix(".part")
        part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        part.replace(options.output)
        kept[:] = history

    kept: list[dict[str, float]] = []
    train(model, data, options.seconds, keep)
    test = evaluate(model, data["test"])
    keep(list(kept), test=test)
    print(f"test: {test}")


if __name__ == "__main__":
    main()
