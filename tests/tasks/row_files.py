"""Rows of data of one's own, files of rows, a loaded task, and options of a short training."""

import json

import numpy as np
import torch

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


def check_prepared(task, rows, batch):
    """Assert that a trainer's rows give the same batch as the first four rows, from memory too."""
    prepared = task.prepared(rows)
    for _ in range(2):
        again = task.collate(prepared.__getitems__([0, 1, 2, 3]))
        assert again.keys() == batch.keys()
        assert all(torch.equal(again[name], batch[name]) and again[name].dtype == batch[name].dtype for name in batch)


def fit(task):
    """Call the methods of a task that the trainer needs before it starts."""
    splits = task.load(0)
    rows = list(splits.train.take(4))
    defaults, batch = task.model_defaults(), task.collate(rows)
    if not task.streaming:
        check_prepared(task, splits.train, batch)
    return splits, defaults, batch


def table(folder, text, name="train.csv"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder)
