"""Losses and models of the user's own hold the budget once, as in a loop written by hand."""

import numpy as np
import pytest
from small_trainers import (
    BUDGET,
    assert_same_weights,
    batches_of,
    by_hand,
    collate,
    new_model,
    new_trainer,
    rows,
    summed_cross_entropy,
)
from torch import nn
from torch.nn import functional as F

from hf_skiprnn.training.trainer import SkipRNNTrainer


def smoothed(out, labels, epsilon=0.1):
    return F.cross_entropy(out.logits, labels, label_smoothing=epsilon)


def test_label_smoothing_keeps_the_budget(tmp_path):
    trainer = new_trainer(
        tmp_path, label_smoothing_factor=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.train()
    model = new_model()
    steps = by_hand(batches_of(4), model, task_loss=smoothed)
    assert_same_weights(trainer.model, model, atol=1e-8)  # transformers smooths in float32
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert logs[0]["task_loss"] == pytest.approx((steps[0][0] + steps[1][0]) / 2, rel=1e-9)
    assert logs[0]["budget_loss"] == pytest.approx((steps[0][1] + steps[1][1]) / 2, rel=1e-9)
    metrics = trainer.evaluate()
    out = model(**collate(rows(11, seed=1)))
    assert metrics["eval_task_loss"] == pytest.approx(smoothed(out, collate(rows(11, seed=1))["labels"]).item())
    assert metrics["eval_budget_loss"] == pytest.approx(BUDGET * out.num_updates.mean().item())


def summed_with_budget(outputs, labels, num_items_in_batch=None):
    return summed_cross_entropy(outputs, labels, num_items_in_batch) + outputs.budget_loss / 2


class OwnLoss(SkipRNNTrainer):
    """A trainer with its own loss, written as Trainer's documentation shows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.get("logits"), labels)
        return (loss, outputs) if return_outputs else loss


class LabelsLeftIn(OwnLoss):
    """The same, but the labels stay in the inputs, so that the model computes its loss too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Halved(SkipRNNTrainer):
    """A trainer whose loss is computed from the model's loss, which includes the budget loss."""

    def compute_loss(self, *args, **kwargs):
        loss, outputs = super().compute_loss(*args, **kwargs)
        return loss + 0.0 * outputs.logits.sum(), outputs


class Containing(nn.Module):
    """A user's model: its inputs have other names, it starts with a linear layer, its loss has no budget loss."""

    def __init__(self):
        super().__init__()
        inner = new_model()
        self.front, self.reader, self.head = nn.Linear(2, 2).double(), inner.skip_rnn, inner.classifier
        nn.init.eye_(self.front.weight)
        nn.init.zeros_(self.front.bias)
        self.front.requires_grad_(False)

    def forward(self, series, mask, labels=None):
        logits = self.head(self.reader(self.front(series), attention_mask=mask).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def renamed(batch):
    batch = collate(batch)
    return {"series": batch["input_values"], "mask": batch["attention_mask"], "labels": batch["labels"]}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SkipRNNTrainer, {"compute_loss_func": summed_cross_entropy}),
        (SkipRNNTrainer, {"compute_loss_func": summed_with_budget}),
        (OwnLoss, {}),
        (LabelsLeftIn, {}),
        (Halved, {}),
        (SkipRNNTrainer, {"model": Containing, "data_collator": renamed}),
    ],
    ids=["function", "function-with-budget", "override", "labels-left-in", "override-of-ours", "own-model"],
)
def test_any_loss_of_ones_own_holds_the_budget_once(tmp_path, kind, options):
    """Weights, logs and metrics equal those of the loop by hand."""
    options = dict(options)
    trained = options.pop("model", new_model)()
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "remove_unused_columns": False}
    trainer = new_trainer(tmp_path, trained, options, kind, **arguments)
    if options.get("compute_loss_func") is not summed_with_budget:
        untrained, metrics = new_model()(**collate(rows(11, seed=1))), trainer.evaluate()
        assert metrics["eval_task_loss"] == pytest.approx(untrained.task_loss.item(), rel=1e-6)
        assert metrics["eval_loss"] == pytest.approx(untrained.loss.item(), rel=1e-6)
    trainer.train()
    model = new_model()
    steps = by_hand(batches_of(4), model)
    if isinstance(trained, Containing):
        trained = nn.ModuleDict({"skip_rnn": trained.reader, "classifier": trained.head})
    assert_same_weights(trained, model)
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    for log, first, second in zip(logs, steps[::2], steps[1::2], strict=True):
        assert log["task_loss"] == pytest.approx((first[0] + second[0]) / 2, rel=1e-9)
        assert log["budget_loss"] == pytest.approx((first[1] + second[1]) / 2, rel=1e-9)
        assert log["loss"] == pytest.approx(log["task_loss"] + log["budget_loss"], rel=1e-6)
        assert log["updates"] == pytest.approx(np.mean(first[2] + second[2]))
        assert log["update_rate"] == pytest.approx(np.sum(first[2] + second[2]) / np.sum(first[3] + second[3]))
    if options.get("compute_loss_func") is not summed_with_budget:  # whose half budget is right for two micro-batches
        out, metrics = model(**collate(rows(11, seed=1))), trainer.evaluate()
        assert metrics["eval_task_loss"] == pytest.approx(out.task_loss.item(), rel=1e-6)
        assert metrics["eval_budget_loss"] == pytest.approx(out.budget_loss.item(), rel=1e-6)


def test_a_model_without_a_skip_rnn_trains_and_is_warned_of(tmp_path, caplog):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3).double()

        def forward(self, series, mask, labels):
            logits = self.head(series.mean(dim=1))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    trainer = new_trainer(tmp_path, Plain(), {"data_collator": renamed}, remove_unused_columns=False)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert [r.message for r in caplog.records if "SkipRNNModel" in r.message] == [
        "No SkipRNNModel ran in Plain: no budget, no updates to log."
    ]
