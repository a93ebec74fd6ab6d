"""Compare SkipRNNTrainer with training loops written by hand, and check its docstring's claims."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.training.callbacks import BudgetController
from hf_skiprnn.training.checkpoints import COMPLETE, delete_older, last_complete_checkpoint
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


def test_training_logs_equal_a_loop_by_hand(tmp_path):
    trainer = new_trainer(tmp_path)
    trainer.train()
    model = new_model()
    steps = by_hand(batches_of(4), model)
    assert_same_weights(trainer.model, model)
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(logs) == len(steps) // 2 == 6
    for log, pair in zip(logs, zip(steps[::2], steps[1::2], strict=True), strict=True):
        task, budget, updates, lengths = zip(*pair, strict=True)
        assert log["task_loss"] == pytest.approx(np.mean(task), rel=1e-9)
        assert log["budget_loss"] == pytest.approx(np.mean(budget), rel=1e-9)
        assert log["loss"] == pytest.approx(np.mean(task) + np.mean(budget), rel=1e-6)  # Trainer's own, in float32
        assert log["updates"] == np.mean(updates)
        assert log["update_rate"] == np.sum(updates) / np.sum(lengths)
    rates = {log["update_rate"] for log in logs}
    assert len(rates) > 1
    assert all(0.1 < rate < 0.9 for rate in rates)


def test_accumulated_gradients_equal_a_big_batch(tmp_path):
    big = new_trainer(tmp_path, per_device_train_batch_size=12)
    accumulated = new_trainer(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    big.train()
    accumulated.train()
    assert_same_weights(accumulated.model, big.model)
    logged = [entry for entry in big.state.log_history if "task_loss" in entry]
    for ours, theirs in zip(accumulated.state.log_history, logged, strict=False):
        for name in ("loss", "task_loss", "budget_loss", "updates", "update_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    assert accumulated.state.total_flos == big.state.total_flos > 0


def test_an_epoch_that_accumulation_does_not_divide(tmp_path):
    """With five batches and two accumulation steps, the last optimizer step has one batch, of four rows."""
    trainer = new_trainer(
        tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2, num_train_epochs=1, logging_steps=1
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(logs) == 3
    model, batches = new_model(), batches_of(5)
    for log, group in zip(logs, (batches[:2], batches[2:4], batches[4:]), strict=True):
        outs = [model(**batch) for batch in group]
        loss = sum(out.loss for out in outs) / len(group)
        model.zero_grad()
        loss.backward()
        descend(model, 0.05)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert log["task_loss"] + log["budget_loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert log["updates"] == pytest.approx(torch.cat([out.num_updates for out in outs]).mean().item())
    assert_same_weights(trainer.model, model)


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


def summed_cross_entropy(outputs, labels, num_items_in_batch=None):
    """The form that Trainer expects: the sum over a micro-batch, divided by the items of the whole step."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


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


def test_the_device_is_waited_for_once_an_optimizer_step_and_at_logs(tmp_path, monkeypatch):
    waits = Counter()

    def counted(name, method):
        def wrapper(*args):
            caller = Path(sys._getframe(1).f_code.co_filename)
            waits[caller.parent.name] += 1
            return method(*args)

        monkeypatch.setattr(torch.Tensor, name, wrapper)

    trainer = new_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=4)
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        counted(name, getattr(torch.Tensor, name))
    trainer.train()
    assert trainer.state.global_step == 12
    assert 12 <= waits["training"] <= 12 + 2 * 6 + 2  # steps, two transfers at each log, and the end


def test_the_default_objective_of_a_search_leaves_our_metrics_out(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda self, space, objective, **kw: chosen.append(objective))
    trainer = new_trainer(tmp_path, trainer_kwargs={"compute_metrics": lambda prediction: {"accuracy": 0.75}})
    metrics = trainer.evaluate()
    trainer.hyperparameter_search(n_trials=1)
    trainer.hyperparameter_search(compute_objective=len)
    assert chosen[0](metrics) == 0.75
    assert chosen[0](new_trainer(tmp_path).evaluate()) == metrics["eval_loss"]
    assert chosen[1] is len


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_evaluation_counts_every_row_once_in_any_batch_size(tmp_path, batch_size):
    def count_rows(prediction):
        logits, labels = prediction  # as with a plain Trainer
        return {"rows": len(labels), "classes": logits.shape[1]}

    trainer = new_trainer(
        tmp_path, trainer_kwargs={"compute_metrics": count_rows}, per_device_eval_batch_size=batch_size
    )
    metrics = trainer.evaluate()
    batch = collate(rows(11, seed=1))
    with torch.no_grad():
        out = new_model()(**batch)
    updates = out.num_updates.numpy()
    assert metrics["eval_rows"] == 11
    assert metrics["eval_classes"] == 3
    assert metrics["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-9)
    assert metrics["eval_task_loss"] == pytest.approx(out.task_loss.item(), rel=1e-9)
    assert metrics["eval_budget_loss"] == pytest.approx(out.budget_loss.item(), rel=1e-9)
    assert metrics["eval_updates"] == pytest.approx(updates.mean())
    assert metrics["eval_updates_std"] == pytest.approx(updates.std())
    assert metrics["eval_updates_p80"] == pytest.approx(np.percentile(updates, 80))
    assert metrics["eval_update_rate"] == pytest.approx(updates.sum() / batch["attention_mask"].sum().item())
    assert trainer.state.log_history[-1]["eval_updates"] == metrics["eval_updates"]


def test_an_empty_evaluation_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rows to evaluate on \(Evaluation\): the data set is empty"):
        new_trainer(tmp_path).evaluate(rows(2).select([]))


def test_predicting_without_labels_needs_no_losses(tmp_path):
    unlabelled = rows(5).remove_columns("labels")
    trainer = new_trainer(tmp_path)
    trainer.data_collator = lambda batch: {
        name: value for name, value in collate([row | {"labels": 0} for row in batch]).items() if name != "labels"
    }
    output = trainer.predict(unlabelled)
    assert output.predictions.shape == (5, 3)
    assert "test_loss" not in output.metrics


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    data = rows()
    broken = [row["input_values"] for row in data]
    broken[9][2][0] = float("nan")  # row 9: the third batch of four
    trainer = new_trainer(tmp_path)
    trainer.train_dataset = data.remove_columns("input_values").add_column("input_values", broken)
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 3\. .*check_inputs=True"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_labels_that_are_nan_are_named(tmp_path):
    labels = [float("nan") if i == 9 else float(i) for i in range(ROWS)]
    data = rows().remove_columns("labels").add_column("labels", labels)
    config = SkipRNNConfig(input_size=2, hidden_size=6, num_labels=1)
    trainer = new_trainer(tmp_path, SkipRNNForSequenceClassification(config).double(), {"train_dataset": data})
    with pytest.raises(FloatingPointError, match=r"nan at step 3\. .* 1 labels of this step are NaN: fill them"):
        trainer.train()


def test_rows_without_a_real_step_are_told_of_once(tmp_path, caplog):
    data = rows()
    masks = [[0] * STEPS if i in (2, 9) else mask for i, mask in enumerate(data["attention_mask"])]
    data = data.remove_columns("attention_mask").add_column("attention_mask", masks)
    new_trainer(tmp_path, trainer_kwargs={"train_dataset": data}).train()
    found = [record.message for record in caplog.records if "no real step" in record.message]
    assert len(found) == 1
    assert found[0].startswith("1 training rows up to step 2 have no real step")


def trained_with(folder, scales, **options):
    """Train for one epoch of six steps, in which gradients are multiplied by `scales`; return the trainer."""
    trainer = new_trainer(folder, max_grad_norm=0.1, **options)
    backward = iter(scales)
    scale_of = {}

    def scaled(gradient):
        step = trainer.state.global_step
        if step not in scale_of:
            scale_of[step] = next(backward)
        return gradient * scale_of[step]

    for parameter in trainer.model.parameters():
        parameter.register_hook(scaled)
    trainer.train()
    return trainer


def test_an_exploded_gradient_keeps_its_direction_through_clipping(tmp_path):
    """Its squares overflow even in float64, so that clipping alone would make it zero."""
    large, exploded = (trained_with(tmp_path, [scale] * 6, num_train_epochs=1) for scale in (1e6, 1e200))
    for a, b in zip(large.model.parameters(), exploded.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_update_without_a_finite_gradient_is_left_out(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trainer = trained_with(tmp_path, [1, 1, float("inf"), 1, float("nan"), 1], num_train_epochs=1)
    assert [record.args[0] for record in caplog.records if "is not finite" in record.message] == [3, 5]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    # A skipped update changes nothing, like a learning rate of 0 in the third and fifth of six steps.
    other = trained_with(tmp_path, [1, 1, 0, 1, 0, 1], num_train_epochs=1)
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ten_gradients_in_a_row_that_are_not_finite_stop_training(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite in 10 steps in a row, up to step 12; .*update_bias"):
        trained_with(tmp_path, [1, 1, *[float("inf")] * 18])


def test_a_token_in_the_arguments_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"hub_token must not be .* HF_TOKEN"):
        new_trainer(tmp_path, hub_token="hf_secret")


def saving(folder, model=None, **kwargs):
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "optim": "adamw_torch"}
    return new_trainer(folder, model, **(settings | kwargs))


def test_resumes_from_the_last_complete_checkpoint_only(tmp_path, caplog):
    whole = saving(tmp_path / "whole")
    whole.train()
    cut = saving(tmp_path / "cut", max_steps=9)
    cut.train()
    folders = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert folders == ["checkpoint-6", "checkpoint-9"]
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-9")
    (tmp_path / "cut/checkpoint-9" / COMPLETE).unlink()  # as after a kill while it was written
    (tmp_path / "cut/checkpoint-9/model.safetensors").write_bytes(b"half")
    with caplog.at_level("WARNING"):
        assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-6")
    resumed = saving(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert_same_weights(resumed.model, whole.model)
    assert (tmp_path / "cut/checkpoint-9" / COMPLETE).is_file()  # the resumed run wrote it again
    assert whole.state.log_history[-2]["task_loss"] == pytest.approx(resumed.state.log_history[-2]["task_loss"])


def test_checkpoints_that_cannot_be_resumed_from(tmp_path):
    trainer = saving(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    (tmp_path / "checkpoint-3" / COMPLETE).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 holds no file named 'complete': its writing was interrupted"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", "{"),
        ("trainer_state.json", '{"global_step": "x"}'),
        ("trainer_state.json", '{"strange": 1}'),
        ("training_window.json", "[]"),
        ("training_window.json", '{"sums": [1, 2, NaN, 1, 1, 1, 1]}'),
    ],
)
def test_broken_files_of_a_checkpoint_are_named(tmp_path, name, content):
    saving(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"checkpoint-3/{name} is damaged \(.*Resume from an earlier checkpoint"):
        saving(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_a_link_is_unlinked_and_nothing_behind_it_touched(tmp_path):
    for name in ("kept", "run"):
        (tmp_path / name).mkdir()
    behind = tmp_path / "kept/best"
    behind.mkdir()
    (behind / COMPLETE).touch()
    (behind / "model.safetensors").write_bytes(b"mine")
    for step in (1, 6):  # an older checkpoint, and one that will be written again
        (tmp_path / f"run/checkpoint-{step}").symlink_to(behind)
    saving(tmp_path / "run", max_steps=6, save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / "run/checkpoint-6").is_symlink()
    assert {path.name: path.read_bytes() for path in behind.iterdir()} == {COMPLETE: b"", "model.safetensors": b"mine"}


def test_an_older_checkpoint_is_kept_until_the_new_one_is_complete(tmp_path, monkeypatch):
    trainer = saving(tmp_path, save_total_limit=1)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0 if folder.endswith("-6") else None)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert (tmp_path / "checkpoint-6").is_dir()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-3")
    assert trainer.args.save_total_limit == 1


def test_complete_checkpoints_beyond_the_limit_go_oldest_first(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 10:  # incomplete, and later than the current one
            (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    (tmp_path / "checkpoint-best").mkdir()  # not a checkpoint of the trainer

    def left():
        return sorted(path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir())

    delete_older(tmp_path / "checkpoint-8", 3, best=str(tmp_path / "checkpoint-2"))
    assert left() == ["10", "2", "6", "8", "best"]
    delete_older(tmp_path / "checkpoint-8", 1, best=str(tmp_path / "checkpoint-2"))
    assert left() == ["10", "2", "8", "best"]
    delete_older(tmp_path / "checkpoint-8", 1, best=None)
    assert left() == ["10", "8", "best"]


def test_the_trainers_card_is_rewritten_with_the_numbers_of_this_training(tmp_path):
    card = tmp_path / "a-run/README.md"
    trainer = new_trainer(card.parent, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(license="mit")
    text = card.read_text()
    assert "license: mit\npipeline_tag: other\n" in text
    assert f"| task_loss | {metrics['eval_task_loss']:.4g} |" in text
    assert "after 2 steps" in text
    assert 'pipeline("sequence-classification", model="a-run", trust_remote_code=True)' in text
    assert str(tmp_path) not in text
    trainer.model.config.id2label = {0: "<b>up</b>", 1: "down"}
    trainer.state.log_history.append({"eval_task_loss": 0.123456, "step": 3})
    trainer.create_model_card()  # keeps the licence and shows the new numbers
    text = card.read_text()
    assert "license: mit" in text
    assert "| task_loss | 0.1235 |" in text
    assert "after 3 steps" in text
    assert f"{metrics['eval_task_loss']:.4g}" not in text
    assert "Labels: &lt;b&gt;up&lt;/b&gt;, down." in text
    card.unlink()
    trainer.create_model_card()
    assert "license" not in card.read_text()  # nobody chose one
    card.write_text("mine")
    trainer.create_model_card()
    assert card.read_text() == "mine"


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_killed_after_its_last_checkpoint_goes_on_to_the_same_end(tmp_path, stream):
    """No step is trained after the last one, and the next evaluation uses the same random gates."""
    data = {"train_dataset": rows().to_iterable_dataset()} if stream else {}

    def new(folder):
        model = new_model(gate="random", skip_probability=0.5)
        return saving(folder, model, trainer_kwargs=dict(data), max_steps=9)

    whole = new(tmp_path)
    whole.train()
    metrics = whole.evaluate()
    torch.manual_seed(99)
    resumed = new(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9
    assert_same_weights(resumed.model, whole.model, atol=0)
    assert resumed.evaluate()["eval_updates"] == metrics["eval_updates"]


def test_a_checkpoint_in_the_middle_of_a_logging_window_keeps_it(tmp_path):
    """Steps 4 to 6 are one logging window with a checkpoint after step 5; the resumed run logs the same numbers."""
    kwargs = {"logging_steps": 3, "save_steps": 5, "max_steps": 8}
    logs = []
    for cut in (False, True):
        controller = BudgetController(0.4)
        trainer = saving(tmp_path, trainer_kwargs={"callbacks": [controller]}, **kwargs)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if cut else None)
        log = next(log for log in trainer.state.log_history if log["step"] == 6 and "task_loss" in log)
        logs.append({name: log[name] for name in ("loss", "task_loss", "budget_loss", "updates", "update_rate")})
        logs[-1]["lambda"] = controller.weight
    assert logs[0] == logs[1]
