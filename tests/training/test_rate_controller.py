"""RateController keeps the share of steps read at its target during training, on sequences of any length."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.training import RateController, SkipRNNTrainer, calibrate, rate_controller, set_update_rate
from hf_skiprnn.training.calibration import share_read
from hf_skiprnn.training.callbacks import BudgetArguments, BudgetController
from hf_skiprnn.training.rate_controller import LIMIT, SMALL
from hf_skiprnn.training.window import BatchCounts, Held


def tiny(**fields) -> SkipRNNForSequenceClassification:
    torch.manual_seed(0)
    return SkipRNNForSequenceClassification(SkipRNNConfig(**({"hidden_size": 12, "num_labels": 2} | fields)))


def rows_of(steps: int, count: int = 256) -> list[dict[str, torch.Tensor]]:
    """Make rows of noise; in rows of class 1 a part of it is positive."""
    generator = torch.Generator().manual_seed(steps)
    x, labels = torch.randn(count, steps, 1, generator=generator), torch.arange(count) % 2
    at = torch.randint(0, steps * 3 // 4, (count,), generator=generator)
    for row, start in enumerate(at.tolist()):
        if labels[row]:
            x[row, start : start + steps // 4] += 2
    return [{"input_values": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def train(folder, model, rows, controller, steps: int, cls=SkipRNNTrainer, resume=False, **options):
    args = TrainingArguments(
        str(folder),
        **{"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "logging_steps": 20}
        | {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
        | options,
    )
    trainer = cls(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[controller])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("steps", "target"), [(15, 0.4), (60, 0.1), (60, 0.6), (400, 0.1)])
def test_the_share_is_reached_at_any_length(tmp_path, steps: int, target: float) -> None:
    model, rows, controller = tiny(), rows_of(steps), RateController(target)
    train(tmp_path, model, rows, controller, 80)
    batch = {"input_values": torch.stack([row["input_values"] for row in rows])}
    model.eval()
    raw = share_read(model, [batch], 0.0)
    assert raw == pytest.approx(target, rel=0.3)  # before calibration
    calibrate(model, [batch])
    controller.judge(set_update_rate(model, target), model.config)
    assert controller.outcome["reached"]
    assert controller.warning() is None
    assert share_read(model, [batch], model.config.gate_shift) == pytest.approx(target, rel=0.1)


def test_a_new_gate_starts_as_a_stride_and_a_trained_one_stays(tmp_path) -> None:
    model = tiny(hidden_size=64)
    before = model.skip_rnn.update_gate.weight.clone()
    train(tmp_path, model, rows_of(40, 32), RateController(0.2), 1, learning_rate=0.0)
    torch.testing.assert_close(model.skip_rnn.update_gate.weight, SMALL * before)
    assert model.skip_rnn.update_gate.bias.item() == pytest.approx(math.log(0.2 / 0.8) - math.log(2))
    out = model.eval()(torch.zeros(1, 100, 1), output_update_gates=True)
    assert out.num_updates.item() == pytest.approx(20, abs=4)
    with torch.no_grad():
        model.skip_rnn.update_gate.bias.fill_(0.3)  # as a trained gate's would be
    train(tmp_path, model, rows_of(40, 32), RateController(0.5), 1, learning_rate=0.0)
    assert model.skip_rnn.update_gate.bias.item() == pytest.approx(0.3)


def held(share: float, task_loss: float) -> Held:
    return Held(share, task_loss, 0.0, 0.0, 60 * share)


def test_lambda_follows_the_error_and_may_reward_reading() -> None:
    controller, config = RateController(0.2), tiny().config
    controller.rate = 0.1
    controller.observe(config, held(0.36, 2.0), 1)  # error (0.36 - 0.2) / (2 * 0.16) = 0.5
    assert controller.level == pytest.approx(0.05)
    assert config.budget_weight == pytest.approx(2.0 * (0.05 + 0.5) / 0.64)
    controller.observe(config, held(0.01, 1.0), 2)  # the scale does not fall with the loss
    assert config.budget_weight == pytest.approx(2.0 * (0.05 - 0.1 * 0.59375 - 0.59375) / 0.64)
    for step in range(1000):
        controller.observe(config, held(1.0, 4.0), step)
    assert controller.level == LIMIT
    assert controller.scale == pytest.approx(4.0)  # a trained model's first loss would be too small


def test_the_errors_of_rows_are_of_their_own_targets() -> None:
    noise, lengths = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([50, 40, 100])
    updates = torch.tensor([5.0, 20.0, 90.0])
    counts = BatchCounts(torch.tensor(0.7), torch.tensor(0.1), updates, lengths, noise)
    targets = torch.sigmoid(torch.logit(torch.tensor(0.3)) + noise)
    errors = (updates / lengths - targets) / (2 * targets * (1 - targets))
    means = Held.of(counts.reads(0.3).tolist())
    wanted = (115 / 190, 0.7, errors.mean().item(), (errors * noise).mean().item(), 115 / 3)
    assert means == pytest.approx(wanted, rel=1e-5)


def test_a_dial_has_a_price_for_each_row() -> None:
    """If rows with a high target read too little, reading gets cheaper for them and dearer for the others."""
    controller, config = RateController(0.2, dial=(0.05, 0.6)), tiny(budget_loss="rate", budget_target=0.2).config
    controller.rate, controller.max_steps = 0.1, 100
    controller.widen(config, 100)
    low, high = config.gate_noise
    assert torch.sigmoid(torch.tensor([low, high]) + math.log(0.25)).tolist() == pytest.approx([0.05, 0.6])
    spread = (high - low) / math.sqrt(12)
    controller.observe(config, Held(0.2, 2.0, 0.0, -0.5 * spread, 6.0), 100)  # the error's slope is -0.5
    assert (controller.level, controller.slope) == (0.0, pytest.approx(-0.05))
    prices = [config.budget_weight + config.budget_slope * noise for noise in (low, (low + high) / 2, high)]
    assert prices[0] > 0 > prices[2]
    assert prices[1] == pytest.approx(0.0, abs=1e-9)
    assert config.budget_slope * spread == pytest.approx(2.0 * (-0.05 - 0.5) / 0.64)


def test_a_dial_is_widened_during_training(tmp_path) -> None:
    controller, config = RateController(0.2, dial=(0.1, 0.8)), tiny().config
    controller.max_steps = 100
    widths = []
    for step in (0, 10, 25, 40, 100):
        controller.widen(config, step)
        widths.append(config.gate_noise[1])
    whole = math.log(4) - math.log(0.25)
    assert widths == pytest.approx([0.0, 0.0, whole / 2, whole, whole])


def test_one_model_reads_every_share_of_its_dial(tmp_path) -> None:
    model, rows = tiny(), rows_of(60)
    train(tmp_path, model, rows, RateController(0.3, dial=(0.08, 0.8)), 300)
    batch = {"input_values": torch.stack([row["input_values"] for row in rows])}
    calibrate(model, [batch])
    rates = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.7]).repeat_interleave(50)
    with torch.no_grad():
        shares = model.eval()(batch["input_values"][:250], update_rate=rates).num_updates / 60
    for share, rate in zip(shares.view(5, 50).mean(1).tolist(), rates[::50].tolist(), strict=True):
        assert share == pytest.approx(rate, rel=0.15)


def test_a_gate_that_closed_is_opened_again(tmp_path) -> None:
    model = tiny()
    with torch.no_grad():
        model.skip_rnn.update_gate.bias.fill_(-4.5)  # two updates a row
    controller = RateController(0.3)
    train(tmp_path, model, rows_of(60), controller, 250, learning_rate=2e-2)
    assert controller.share == pytest.approx(0.3, rel=0.5)


@pytest.mark.parametrize("steps", [13, 60])
def test_a_gate_that_is_shut_starts_anew(tmp_path, caplog, steps: int) -> None:
    """At this bias its gradient is 0 in float32, so no lambda opens it. A row's first step is read all the same."""
    model = tiny()
    with torch.no_grad():
        model.skip_rnn.update_gate.weight.fill_(-10.0)
        model.skip_rnn.update_gate.bias.fill_(-120.0)
    controller = RateController(0.3)
    train(tmp_path, model, rows_of(steps), controller, 200, learning_rate=1e-2)
    assert caplog.text.count("It starts anew as a stride") == controller.restarts == 1
    assert controller.share == pytest.approx(0.3, rel=0.2)


def test_a_gate_that_reads_a_little_or_is_frozen_does_not_start_anew(tmp_path) -> None:
    for bias, trained in ((-5.0, True), (-120.0, False)):
        model = tiny()
        gate = model.skip_rnn.update_gate
        with torch.no_grad():
            gate.bias.fill_(bias)
        gate.requires_grad_(trained)
        controller = RateController(0.3)
        train(tmp_path / str(bias), model, rows_of(60), controller, 110, learning_rate=1e-5)
        assert controller.restarts == 0
        assert gate.bias.item() == pytest.approx(bias, abs=0.1)


def test_a_gate_astray_is_told_once(caplog) -> None:
    controller, config = RateController(0.2), tiny().config
    controller.rate = 0.1
    for step in range(300):
        controller.observe(config, held(0.01, 1.0), step)
    assert caplog.text.count("The gate has read 1.0 % of the steps") == 1


def test_exploding_gradients_are_calmed_once(caplog) -> None:
    controller, config = RateController(0.2), tiny(gate_gradient="capped").config
    controller.rate = 0.1
    for step, largest in enumerate((1.0, 1e3, 99.0, 1e9, 0.0)):
        controller.observe(config, held(0.2, 1.0), step, largest)
    assert config.gate_gradient == "capped"
    for step in (5, 6):
        controller.observe(config, held(0.2, 1.0), step, 101.0)
    assert config.gate_gradient == "mean"
    assert caplog.text.count("Gradients have exploded in 3 steps, up to step 5.") == 1
    assert controller.state()["attributes"]["explosions"] == 4


def test_a_run_whose_gradients_explode_goes_on_with_their_mean(tmp_path, monkeypatch) -> None:
    """Also after an interruption."""
    monkeypatch.setattr(rate_controller, "EXPLODED", 0.0)  # every step counts
    rows, model = rows_of(30, 64), tiny()
    train(tmp_path, model, rows, RateController(0.3), 6, save_strategy="steps", save_steps=3)
    assert model.config.gate_gradient == "mean"
    monkeypatch.setattr(rate_controller, "EXPLODED", 1e9)
    again = tiny()
    train(tmp_path, again, rows, RateController(0.3), 6, resume=str(tmp_path / "checkpoint-3"))
    assert again.config.gate_gradient == "mean"


@pytest.mark.parametrize(("chosen", "used"), [("sum", "capped"), ("capped", "capped"), ("mean", "mean")])
def test_a_calmer_gate_gradient_that_was_chosen_stays(tmp_path, chosen, used) -> None:
    model = tiny(gate_gradient=chosen)
    train(tmp_path, model, rows_of(30, 64), RateController(0.3), 1)
    assert model.config.gate_gradient == used


@pytest.mark.parametrize("dial", [None, (0.1, 0.8)])
def test_a_resumed_run_ends_as_one_that_was_not_cut(tmp_path, dial) -> None:
    rows, options = rows_of(30, 64), {"save_strategy": "steps", "save_steps": 6}
    whole, parts = tiny(), tiny()
    train(tmp_path / "whole", whole, rows, RateController(0.3, dial), 12, **options)
    train(tmp_path / "parts", parts, rows, RateController(0.3, dial), 12, **options)
    again = tiny()
    train(
        tmp_path / "parts", again, rows, RateController(0.3, dial), 12, resume=str(tmp_path / "parts" / "checkpoint-6")
    )
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.config.budget_weight == again.config.budget_weight


def test_what_cannot_work_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1; got 20"):
        RateController(20)
    with pytest.raises(ValueError, match="needs gate='learned'"):
        train(tmp_path, tiny(gate="strided"), rows_of(10, 32), RateController(0.2), 1)
    with pytest.raises(RuntimeError, match="needs SkipRNNTrainer"):
        train(tmp_path, tiny(), rows_of(10, 32), RateController(0.2), 1, cls=Trainer)
    with pytest.raises(ValueError, match=r"The target, 0.5, must lie in the range of the dial, 0.1 to 0.4"):
        RateController(0.5, dial=(0.1, 0.4))
    for wrong in ([0.9, 0.1], [5.0, 90.0], [0.2], [-0.1, 0.5]):  # the target is computed from these
        with pytest.raises(ValueError, match=r"dial must be two shares.* the lower one first.*; got \["):
            BudgetArguments(dial=wrong).callbacks()
    controller = RateController(0.05)
    controller.judge(0.2, tiny().config)
    assert "5.0%, was not reached: the share is 20.0%" in controller.warning()


@pytest.mark.parametrize(("noise", "used"), [(0.0, 0.25), ([-2.0, 3.0], 0.25), ([-0.5, 0.5], 0.5), (0.7, 0.7)])
def test_a_calibrated_dial_is_trained_anew(tmp_path, caplog, noise, used) -> None:
    model, rows = tiny(gate_noise=noise, gate_calibration=[[0.1, -1.0], [0.9, 1.0]]), rows_of(30, 64)
    train(tmp_path, model, rows, RateController(0.3), 4)
    assert model.config.gate_noise == used  # the range of a dial would move the share
    assert model.config.gate_calibration is None  # it was that of other weights
    assert caplog.text.count("calibration is removed") == 1
    with pytest.raises(ValueError, match="needs a calibrated model"):
        model(rows[0]["input_values"][None], update_rate=0.3)
    with pytest.raises(ValueError, match="set_update_rate needs a calibrated model"):
        set_update_rate(model, 0.3)


def test_a_frozen_skip_rnn_keeps_its_calibration(tmp_path) -> None:
    model = tiny(gate_calibration=[[0.1, -1.0], [0.9, 1.0]])
    model.skip_rnn.requires_grad_(False)
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    SkipRNNTrainer(model, args, train_dataset=rows_of(10, 16)).train()
    assert model.config.gate_calibration == [[0.1, -1.0], [0.9, 1.0]]


@pytest.mark.parametrize("metric", [None, "task_loss"])
def test_the_outcome_is_that_of_the_best_checkpoint_which_is_loaded(tmp_path, caplog, metric) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_strategy": "steps"}
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "learning_rate": 0.3}
    model, rows, controller = tiny(), rows_of(20, 64), RateController(0.3)
    trainer = train(tmp_path, model, rows, controller, 8, **best, **every)
    assert ("compares eval_loss, which contains lambda" in caplog.text) is (metric is None)
    read = trainer.evaluate()["eval_update_rate"]
    assert controller.outcome["update_rate"] == pytest.approx(read)
    if metric == "task_loss":
        shares = [log["eval_update_rate"] for log in trainer.state.log_history if "eval_update_rate" in log]
        assert trainer.state.best_global_step < 8  # else this says nothing
        assert shares[3] != pytest.approx(read, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_update_rate": 0.0}, "target must be a share of the steps, above 0 and below 1; got 0"),
        ({"dial": [0.0, 0.9]}, r"dial must be two shares of the steps.* got \[0.0, 0.9\]"),
        ({"steered_update_rate": 0.0}, "above 0"),
    ],
)
def test_a_share_of_0_is_refused_not_ignored(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetArguments(**options).callbacks()
    assert BudgetArguments(budget_warmup_steps=0.0).callbacks() == []


def test_options_make_the_callbacks() -> None:
    (rate,) = BudgetArguments(target_update_rate=0.4).callbacks()
    (dial,) = BudgetArguments(dial=[0.1, 0.9]).callbacks()
    assert (dial.dial, dial.target) == ((0.1, 0.9), pytest.approx(0.3))
    (steered,) = BudgetArguments(steered_update_rate=0.4).callbacks()
    assert (type(rate), rate.target, type(steered)) == (RateController, 0.4, BudgetController)
    with pytest.raises(ValueError, match="all set lambda: use only one"):
        BudgetArguments(target_update_rate=0.4, budget_warmup_steps=3).callbacks()


class Wrapped(torch.nn.Module):
    """A model of the user's own that contains a Skip RNN."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, input_values, labels=None):
        out = self.inner(input_values, labels=labels)
        return {"loss": out.task_loss, "logits": out.logits}


def test_a_model_that_contains_a_skip_rnn_is_held_too(tmp_path) -> None:
    model, controller = Wrapped(), RateController(0.3)
    train(tmp_path, model, rows_of(40, 64), controller, 12)
    assert model.inner.config.budget_loss == "rate"
    assert controller.share == pytest.approx(0.3, abs=0.15)
    with pytest.raises(ValueError, match="contains a SkipRNNModel; got Linear"):
        controller.on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))


def test_a_second_training_starts_anew(tmp_path) -> None:
    rows, controller = rows_of(30, 64), RateController(0.3)
    first, second = tiny(), tiny()
    train(tmp_path, first, rows, controller, 6)
    kept = controller.level, controller.scale
    train(tmp_path, second, rows, controller, 6)
    assert (controller.level, controller.scale) == kept
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_outcome_is_measured_not_looked_up() -> None:
    """A gate that sees nothing of its state knows whole strides only: between two of them no shift reads the share."""
    model = tiny(hidden_size=4)
    with torch.no_grad():
        model.skip_rnn.update_gate.weight.zero_()
    batch = {"input_values": torch.randn(8, 60, 1)}
    calibrate(model.eval(), [batch])
    assert set_update_rate(model, 0.75) == 0.75
    read = share_read(model, [batch], model.config.gate_shift)
    assert read in (0.5, 1.0)
    controller = RateController(0.75)
    controller.judge(read, model.config)
    assert not controller.outcome["reached"]


class Uneven(torch.nn.Module):
    """Reads the more, the larger the shift, but a fifth of the steps more where the shift is between 0.2 and 0.3."""

    def __init__(self, middle: float = 0.0) -> None:
        super().__init__()
        self.config, self.device = SkipRNNConfig(), torch.device("cpu")
        self.middle, self.calls = middle, 0

    def set_gate_shift(self, shift: float) -> None:
        self.config.gate_shift = shift

    def forward(self, input_values: torch.Tensor, gate_shift: float) -> Any:
        assert not self.training
        self.calls += 1
        shift = gate_shift - self.middle
        share = min(max(0.3 + 0.1 * shift, 0.0), 1.0) + (0.2 if 0.2 < shift < 0.3 else 0.0)
        return SimpleNamespace(num_updates=torch.full((len(input_values),), 100 * share))


@pytest.mark.parametrize("middle", [0.0, -1.0, 2.0])
def test_a_share_that_jumps_between_two_entries_of_the_table_is_looked_for(middle: float) -> None:
    model, batches = Uneven(middle), [{"input_values": torch.zeros(4, 100, 1), "labels": torch.zeros(4)}]
    rows = [{"input_values": batches[0]["input_values"]}]
    table = calibrate(model, batches)
    calls = model.calls
    set_update_rate(model, 0.325)
    assert share_read(model.eval(), rows, model.config.gate_shift) == pytest.approx(0.525)
    assert calibrate(model.train(), batches, rate=0.36) == table  # the table is right there: one more call
    assert model.training
    assert model.calls == 2 * calls + 2
    longer = calibrate(model, batches, rate=0.325)
    ((rate, shift),) = [pair for pair in longer if pair not in table]
    assert (rate, shift) == (0.325, pytest.approx(middle + 0.25, abs=0.1))
    assert longer == sorted(longer)
    assert set_update_rate(model, 0.325) == 0.325
    assert model.config.gate_shift == pytest.approx(shift)
    assert share_read(model.eval(), rows, model.config.gate_shift) == pytest.approx(0.325, rel=0.02)
    for rate in (0.0, 1.5):  # out of reach
        assert calibrate(model, batches, rate=rate) == table
