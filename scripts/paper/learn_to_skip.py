"""Teach a trained torch.nn.LSTM to skip: convert it, fine-tune it with a budget, and compare before and after.

    python -m scripts.paper.learn_to_skip --dataset_name stanfordnlp/imdb    # or a folder in the same layout
    python -m scripts.paper.learn_to_skip --dataset_name stanfordnlp/imdb --weights my_lstm.pt

The task is IMDB. --weights is a state dict with embedding.weight, lstm.* (one nn.LSTM, batch_first) and classifier.*,
for the task's vocabulary; without it such a model is first trained in plain PyTorch. The converted model reads every
word and gives the same answers. Then its gate is set to read every n-th word, about the share --target, and fine-tuning
with a budget teaches it which words to read. (A gate that starts by reading every word does not learn to skip, because
the weights were trained on the state after every word.) For comparison the same weights are fine-tuned with a fixed
stride of n. The script writes learned-to-skip.json and the checkpoint into --output_dir.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.conversion import load_native, native_config
from hf_skiprnn.tasks import IMDB
from hf_skiprnn.training.provenance import commit, cpu_name
from hf_skiprnn.training.trainer import SkipRNNTrainer

OPEN = 0.05  # b_p of a gate that reads every step: sigmoid(0.05) = 0.512 >= 0.5
DROPOUT = 0.3  # embedding dropout in both trainings


@dataclass
class Settings:
    """The options of the two trainings."""

    weights: Path | None = field(default=None, metadata={"help": "State dict of a trained model; default: train one."})
    output_dir: Path = field(default=Path("runs/learn-to-skip"), metadata={"help": "Folder of the results."})
    hidden_size: int = field(default=128, metadata={"help": "Units of the nn.LSTM that is trained here."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of the nn.LSTM that is trained here."})
    fine_tuning_epochs: float = field(default=2.0, metadata={"help": "Epochs with the budget."})
    target: float = field(default=0.4, metadata={"help": "Share of the words to read."})
    budget_weight: float = field(default=1e-4, metadata={"help": "Lambda of the squared distance from the target."})
    batch_size: int = field(default=64, metadata={"help": "Reviews at a time."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of both trainings."})
    seed: int = field(default=0, metadata={"help": "Seed of the initial weights and of the order of rows."})

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target must be a share of the words, between 0 and 1; got {self.target}.")


class NativeClassifier(nn.Module):
    """An embedding, an nn.LSTM, and a linear layer on h after the last real step."""

    def __init__(self, vocabulary: int, width: int, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.lstm = nn.LSTM(width, hidden_size, batch_first=True)
        self.classifier = nn.Linear(hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens [B, T] and their mask (padding on the right) to logits [B, C]."""
        lengths = attention_mask.sum(dim=1).cpu()
        embedded = nn.functional.dropout(self.embedding(input_ids), DROPOUT, self.training)
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        return self.classifier(self.lstm(packed)[1][0][-1])


def train_native(task: IMDB, settings: Settings) -> NativeClassifier:
    """Train an nn.LSTM in plain PyTorch."""
    defaults = task.model_defaults()
    model = NativeClassifier(defaults["vocab_size"], defaults["input_size"], settings.hidden_size, len(task.labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    rows: Any = task.load(settings.seed).train
    loader = DataLoader(rows, batch_size=settings.batch_size, shuffle=True, collate_fn=task.collate)
    for step in range(round(settings.epochs * len(loader))):
        if step % len(loader) == 0:
            batches = iter(loader)
        batch = next(batches)
        loss = nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"nn.LSTM, step {step} of {round(settings.epochs * len(loader))}: loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def convert(state: dict[str, Tensor], task: IMDB, **gate: Any) -> SkipRNNForSequenceClassification:
    """Make a Skip RNN with these weights. `gate`: fields of its config. A learned gate reads every step (W_p is 0)."""
    fields = task.model_defaults() | native_config(state, "lstm.") | gate
    fields["vocab_size"] = len(state["embedding.weight"])
    config = SkipRNNConfig(**fields, learn_initial_state=False, embedding_dropout=DROPOUT)
    model = SkipRNNForSequenceClassification(config)
    load_native(model, state, "lstm.")
    base: Any = model.base_model
    base.embeddings.weight.copy_(state["embedding.weight"])
    model.classifier.load_state_dict({name: state[f"classifier.{name}"] for name in ("weight", "bias")})
    if config.gate == "learned":
        base.update_gate.weight.zero_()
        base.update_gate.bias.fill_(OPEN)
    return model


@torch.no_grad()
def read_about(model: SkipRNNForSequenceClassification, share: float) -> None:
    """Set the gate to read every n-th step, where n is 1 / share, rounded up."""
    cast(Any, model.base_model).update_gate.bias.fill_(math.log(0.5 * share / (1 - 0.5 * share)))


@torch.no_grad()
def largest_difference(native: NativeClassifier, model: SkipRNNForSequenceClassification, task: IMDB) -> float:
    """Return the largest difference between the two models' logits, over some test reviews."""
    rows = task.load(0).test
    batch = task.collate([rows[i] for i in range(0, len(rows), max(len(rows) // 32, 1))])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return (native.eval()(**inputs) - model.eval()(**inputs).logits).abs().max().item()


def native_of(task: IMDB, settings: Settings) -> NativeClassifier:
    """Load the model of --weights, or train one."""
    if settings.weights is None:
        return train_native(task, settings)
    state = torch.load(settings.weights, weights_only=True)
    vocabulary, width = state["embedding.weight"].shape
    hidden_size = native_config(state, "lstm.")["hidden_size"]
    native = NativeClassifier(vocabulary, width, hidden_size, task.model_defaults()["num_labels"])
    native.load_state_dict(state)
    return native


def trainer_of(model: SkipRNNForSequenceClassification, task: IMDB, settings: Settings) -> SkipRNNTrainer:
    """Make the trainer that fine-tunes and evaluates a converted model."""
    args = TrainingArguments(
        output_dir=str(settings.output_dir),
        num_train_epochs=settings.fine_tuning_epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=500,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings.seed,
        report_to="none",
    )
    return SkipRNNTrainer(
        model,
        args,
        data_collator=task.collate,
        train_dataset=task.load(settings.seed).train,
        processing_class=task.processor(),
        compute_metrics=task.compute_metrics,
    )


def tested(trainer: SkipRNNTrainer, task: IMDB) -> dict[str, float]:
    """Return accuracy and updates on the test split."""
    metrics = trainer.evaluate(cast(Any, task.load(0).test), metric_key_prefix="test")
    return {name: metrics[f"test_{name}"] for name in ("accuracy", "updates", "updates_std", "update_rate")}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train or load, convert, evaluate, fine-tune, evaluate; return the content of the JSON file."""
    kinds: list[Any] = [IMDB, Settings]
    parser = HfArgumentParser(kinds, description=__doc__)
    task, settings = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    set_seed(settings.seed)
    native = native_of(task, settings)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    torch.save(native.state_dict(), settings.output_dir / "native.pt")
    budget = {"budget_loss": "l2", "budget_weight": settings.budget_weight, "budget_target": settings.target}
    model = convert(native.state_dict(), task, **budget)
    results: dict[str, Any] = {
        "task_options": dataclasses.asdict(task),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(settings).items()},
        "device": cpu_name(),
        "commit": commit(),
        "largest_difference_of_logits_after_conversion": largest_difference(native, model, task),
    }
    trainer = trainer_of(model, task, settings)
    results["before"] = tested(trainer, task)
    read_about(model, settings.target)
    results["not fine-tuned"] = tested(trainer, task)
    trainer.train()
    results["after"] = tested(trainer, task)
    trainer.save_model()
    stride = math.ceil(1 / settings.target)
    strided = trainer_of(convert(native.state_dict(), task, gate="strided", stride=stride), task, settings)
    strided.train()
    results["strided"] = tested(strided, task)
    path = settings.output_dir / "learned-to-skip.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name in ("before", "not fine-tuned", "after", "strided"):
        found: dict[str, float] = results[name]
        print(
            f"{name}: accuracy {found['accuracy']:.2%}, {found['updates']:.1f} words read, {found['update_rate']:.1%}"
        )
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
