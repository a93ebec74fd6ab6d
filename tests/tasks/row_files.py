"""Rows of data of one's own, files of rows, and options of a short training."""

import json

import numpy as np

RNG = np.random.default_rng(0)
QUICK = ["--hidden_size", "8", "--max_steps", "4", "--per_device_train_batch_size", "4", "--use_cpu"]
QUICK += ["--disable_tqdm=true", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false"]


def write(folder, rows, split="train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder)


def series(rows, channels=2, labels=("walk", "run")):
    """Make rows of different lengths; the second channel has a large mean."""
    return [
        {
            "wave": (RNG.normal(size=(3 + i % 5, channels)) + [0, 50][:channels]).tolist(),
            "label": labels[i % len(labels)],
        }
        for i in range(rows)
    ]
