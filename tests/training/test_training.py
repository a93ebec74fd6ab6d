"""Compare SkipRNNTrainer with training loops written by hand, and check its docstring's claims."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainers import (
    ROWS,
    STEPS,
    assert_same_weights,
    batches_of,
    by_hand,
    collate,
    descend,
    new_model,
    new_trainer,
    rows,
)
from transformers import Trainer

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification


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


def test_evaluation_is_of_the_rows_that_are_asked_for_with_persistent_workers_too(tmp_path):
    """Trainer keeps the loader of the validation rows under one name for all data sets."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = new_trainer(tmp_path, **workers)
    first = [trainer.evaluate(), trainer.evaluate(rows(7, seed=5)), trainer.evaluate()]
    alone = new_trainer(tmp_path).evaluate(rows(7, seed=5))
    assert first[1]["eval_task_loss"] == alone["eval_task_loss"]
    assert first[0]["eval_task_loss"] == first[2]["eval_task_loss"] != alone["eval_task_loss"]
