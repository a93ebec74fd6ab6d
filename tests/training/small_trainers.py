"""A small trainer with its data, and the same training written by hand."""

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainingArguments

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.training.trainer import SkipRNNTrainer

ROWS, STEPS = 24, 12
BUDGET = 0.03


def rows(count=ROWS, seed=0):
    """Make sequences of different real lengths with one of three labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, STEPS + 1, count)
    return Dataset.from_dict(
        {
            "input_values": rng.normal(size=(count, STEPS, 2)).tolist(),
            "attention_mask": (np.arange(STEPS) < lengths[:, None]).astype(int).tolist(),
            "labels": rng.integers(0, 3, count).tolist(),
        }
    )


def collate(batch):
    return {
        "input_values": torch.tensor([row["input_values"] for row in batch], dtype=torch.float64),
        "attention_mask": torch.tensor([row["attention_mask"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }


def new_model(**kwargs):
    torch.manual_seed(3)
    config = SkipRNNConfig(
        input_size=2,
        hidden_size=6,
        num_labels=3,
        problem_type="single_label_classification",
        budget_weight=BUDGET,
        update_bias=-1.0,
        **kwargs,
    )
    return SkipRNNForSequenceClassification(config).double()


def new_trainer(folder, model=None, trainer_kwargs=None, kind=SkipRNNTrainer, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "num_train_epochs": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = TrainingArguments(output_dir=str(folder), **(defaults | kwargs))
    data = {"train_dataset": rows(), "eval_dataset": rows(11, seed=1), "data_collator": collate}
    return kind(model or new_model(), args, **(data | (trainer_kwargs or {})))


def descend(model, rate):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(rate * parameter.grad)


def by_hand(batches, model, epochs=2, rate=0.05, task_loss=None):
    """Train with plain SGD over the batches; return the outputs of every step."""
    steps = []
    for _ in range(epochs):
        for batch in batches:
            out = model(**batch)
            task = out.task_loss if task_loss is None else task_loss(out, batch["labels"])
            model.zero_grad()
            (task + BUDGET * out.num_updates.mean()).backward()
            descend(model, rate)
            lengths = batch["attention_mask"].sum(1)
            steps.append(
                (task.item(), BUDGET * out.num_updates.mean().item(), out.num_updates.tolist(), lengths.tolist())
            )
    return steps


def batches_of(size, data=None):
    data = rows() if data is None else data
    return [collate([data[i] for i in range(at, min(at + size, len(data)))]) for at in range(0, len(data), size)]


def assert_same_weights(model, other, atol=1e-12):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def summed_cross_entropy(outputs, labels, num_items_in_batch=None):
    """The form that Trainer expects: the sum over a micro-batch, divided by the items of the whole step."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def saving(folder, model=None, **kwargs):
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "optim": "adamw_torch"}
    return new_trainer(folder, model, **(settings | kwargs))
