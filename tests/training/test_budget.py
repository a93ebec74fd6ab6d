"""BudgetWarmup and BudgetController: how lambda changes, their outcomes, and resumed trainings."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.training.callbacks import LARGEST, SMALLEST, BudgetArguments, BudgetController, BudgetWarmup
from hf_skiprnn.training.trainer import SkipRNNTrainer


def tiny(**options):
    torch.manual_seed(0)
    return SkipRNNForSequenceClassification(
        SkipRNNConfig(**{"hidden_size": 8, "num_labels": 2, "budget_weight": 0.01} | options)
    )


def rows(count=64, steps=20):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    values = rng.normal(0, 0.3, (count, steps, 1)) + labels[:, None, None]
    return Dataset.from_dict({"input_values": values.astype(np.float32), "labels": labels}).with_format("torch")


def trainer(model, folder, callbacks, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 10,
            "logging_steps": 1,
            "save_strategy": "no",
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
        }
        | options,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.01,
    )
    data = rows()
    return SkipRNNTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def budgets(run):
    """Return lambda at each step, computed from the logs: budget loss over updates."""
    return [entry["budget_loss"] / entry["updates"] for entry in run.state.log_history if "budget_loss" in entry]


@pytest.mark.parametrize(("steps", "length"), [(4, 4), (0.5, 5)])
def test_warm_up_grows_linearly_and_leaves_the_whole_lambda(tmp_path, steps, length):
    model = tiny()
    run = trainer(model, tmp_path, [BudgetWarmup(steps)])
    run.train()
    expected = [0.01 * min(step / length, 1) for step in range(10)]
    assert budgets(run) == pytest.approx(expected, rel=1e-4)
    assert model.config.budget_weight == 0.01


def test_warm_up_goes_on_after_a_stop(tmp_path):
    trainer(tiny(), tmp_path, [BudgetWarmup(8)], max_steps=4, save_strategy="steps", save_steps=4).train()
    model = tiny()
    run = trainer(model, tmp_path, [BudgetWarmup(8)], save_strategy="steps", save_steps=4)
    run.train(resume_from_checkpoint=True)
    assert budgets(run)[4:] == pytest.approx([0.01 * min(step / 8, 1) for step in range(4, 10)], rel=1e-4)
    assert model.config.budget_weight == 0.01


def test_warm_up_goes_on_in_a_model_loaded_from_its_checkpoint(tmp_path):
    """The checkpoint's config holds lambda at that step; so does the config of a model whose training failed."""
    options = {"save_strategy": "steps", "save_steps": 4}
    first = trainer(tiny(), tmp_path, [BudgetWarmup(8)], max_steps=4, **options)
    first.train()
    half = SkipRNNForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert half.config.budget_weight < 0.01
    run = trainer(half, tmp_path, [BudgetWarmup(8)], **options)
    run.train(resume_from_checkpoint=True)
    assert half.config.budget_weight == 0.01

    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    model, warmup = tiny(), BudgetWarmup(8)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path / "broken", [warmup, Broken()]).train()
    trainer(model, tmp_path / "again", [warmup]).train()
    assert model.config.budget_weight == 0.01


def steer(controller, model, rates, max_steps=100, start=100):
    """Pass update rates to a controller as the trainer's logs do; from step `start`, by default after the descent."""
    state = TrainerState(max_steps=max_steps)
    controller.on_train_begin(None, state, None, model=model)
    weights = []
    for i, rate in enumerate(rates):
        state.global_step = start + i
        controller.on_log(None, state, None, logs={"loss": 1.0, "update_rate": rate}, model=model)
        weights.append(model.config.budget_weight)
    return weights


def test_lambda_grows_while_too_much_is_read_and_shrinks_while_too_little():
    model = tiny()
    up = steer(BudgetController(0.4), model, [0.9, 0.9, 0.8])
    assert 0.01 < up[0] < up[1]
    model = tiny()
    down = steer(BudgetController(0.4), model, [0.2, 0.2, 0.2])
    assert 0.01 > down[0] > down[1] > down[2]
    model = tiny()
    assert steer(BudgetController(0.4), model, [0.4, 0.4]) == pytest.approx([0.01, 0.01])
    assert steer(BudgetController(0.4), tiny(budget_weight=0.0), [0.4]) == pytest.approx([1e-5])


@pytest.mark.parametrize("first", [1.0, 0.2])
def test_the_wanted_rate_goes_from_the_first_one_to_the_target_over_the_first_half(first):
    controller, half_way = BudgetController(0.4), (first + 0.4) / 2
    assert steer(controller, tiny(), [first], start=0) == pytest.approx([0.01])
    assert steer(controller, tiny(), [half_way], start=25) == pytest.approx([0.01])
    assert (steer(controller, tiny(), [half_way], start=50)[0] > 0.01) == (half_way > 0.4)


def test_lambda_stays_within_its_limits():
    assert steer(BudgetController(0.1), tiny(), [1.0] * 200)[-1] == LARGEST
    assert steer(BudgetController(0.9), tiny(), [0.0] * 200)[-1] == SMALLEST


@pytest.mark.parametrize(
    ("target", "rates", "reason"),
    [
        (0.1, [1.0] * 100, "Lambda is at its upper limit"),
        (0.9, [0.1] * 100, 'budget_loss="l1" with budget_target also rewards reading'),
        (0.4, [0.6], "Lambda was still moving"),
        (0.4, [], "Nothing was logged"),
    ],
)
def test_it_says_why_a_rate_was_not_reached(caplog, target, rates, reason):
    controller, model = BudgetController(target), tiny()
    steer(controller, model, rates)
    controller.on_train_end(None, None, None)
    assert controller.outcome["reached"] is False
    assert f"The target update rate of {100 * target:.1f} % was not reached" in caplog.text
    assert reason in caplog.text


def test_an_evaluated_rate_counts_at_the_end(caplog):
    controller = BudgetController(0.4)
    steer(controller, tiny(), [0.9])
    controller.on_evaluate(None, None, None, metrics={"eval_update_rate": 0.43})
    controller.on_train_end(None, None, None)
    assert controller.outcome["reached"] is True
    assert controller.outcome["update_rate"] == 0.43
    assert "not reached" not in caplog.text


def test_a_real_run_reads_less_than_without_and_comes_near_the_target(tmp_path):
    controller = BudgetController(0.5)
    run = trainer(tiny(budget_weight=1e-4), tmp_path, [controller], max_steps=200, logging_steps=5, eval_strategy="no")
    run.train()
    rate = run.evaluate()["eval_update_rate"]
    assert abs(rate - 0.5) < 0.15
    assert run.model.config.budget_weight == controller.outcome["budget_weight"] != 1e-4


def test_the_controller_goes_on_after_a_stop(tmp_path):
    first = BudgetController(0.4)
    trainer(tiny(), tmp_path, [first], max_steps=5, save_strategy="steps", save_steps=5).train()
    assert first.weight != 0.01
    second, model = BudgetController(0.4), tiny()
    run = trainer(model, tmp_path, [second], max_steps=6, save_strategy="steps", save_steps=5)
    run.train(resume_from_checkpoint=True)
    assert budgets(run)[5] == pytest.approx(first.weight, rel=1e-4)


@pytest.mark.parametrize("options", [{"gate": "always"}, {"budget_loss": "l1", "budget_target": 0.5}])
def test_it_needs_a_gate_and_a_budget_to_steer(options):
    with pytest.raises(ValueError, match='needs gate="learned" and budget_loss="cost"'):
        steer(BudgetController(0.4), tiny(**options), [])


def test_options():
    assert BudgetArguments().callbacks() == []
    (warmup,) = BudgetArguments(budget_warmup_steps=0.1).callbacks()
    assert (type(warmup), warmup.steps) == (BudgetWarmup, 0.1)
    (controller,) = BudgetArguments(steered_update_rate=0.4).callbacks()
    assert (type(controller), controller.target) == (BudgetController, 0.4)
    with pytest.raises(ValueError, match="give one of them"):
        BudgetArguments(0.1, 0.4).callbacks()
    with pytest.raises(ValueError, match="steps must be above 0; got -1"):
        BudgetArguments(-1).callbacks()
    with pytest.raises(ValueError, match=r"target must be a share .* got 40"):
        BudgetArguments(steered_update_rate=40).callbacks()


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_a_target_in_the_loss_itself_is_reached(tmp_path, kind):
    weight = {"l1": 0.05, "l2": 0.01}[kind]
    model = tiny(budget_loss=kind, budget_target=0.5, budget_weight=weight)
    run = trainer(model, tmp_path, [], max_steps=100, logging_steps=50)
    run.train()
    assert abs(run.evaluate()["eval_update_rate"] - 0.5) < 0.15
