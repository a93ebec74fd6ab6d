"""optuna: a study over the settings of a model; SkipRNNTrainer's own search is in tests/training."""

import pytest
import torch
from small_models import classifier

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna, or make tools")


def test_a_study_finds_the_budget_that_reads_less() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    x, labels = torch.rand(8, 12, 2), torch.arange(8) % 3

    def updates(trial: "optuna.Trial") -> float:
        torch.manual_seed(0)
        config = {"budget_weight": trial.suggest_float("budget_weight", 0, 1), "update_bias": 1.0}
        model = classifier(**config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(8):
            optimizer.zero_grad()
            model(x, labels=labels).loss.backward()
            optimizer.step()
        return model.eval()(x).num_updates.mean().item()

    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"budget_weight": [0.0, 1.0]}))
    study.optimize(updates, n_trials=2)
    assert study.best_params == {"budget_weight": 1.0}
