"""Losses: the budget, the tasks, and gradients of both."""

import pytest
import torch
from small_models import BACKENDS, TINY, VARIANTS, classifier
from torch.nn import functional as F

from hf_skiprnn import SkipRNNConfig, SkipRNNForFrameClassification


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("cost", None, lambda n, length: n),
        ("l1", 0.3, lambda n, length: abs(n - 0.3 * length)),
        ("l2", 0.3, lambda n, length: (n - 0.3 * length) ** 2),
    ],
)
def test_budgets(kind: str, target: float | None, expected) -> None:
    model = classifier(budget_loss=kind, budget_target=target, budget_weight=0.01)
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[0, 12:] = 0
    out = model(torch.rand(4, 20, 2), mask)
    want = 0.01 * sum(expected(n, m) for n, m in zip(out.num_updates.tolist(), mask.sum(1).tolist(), strict=True)) / 4
    torch.testing.assert_close(out.budget_loss.item(), want, rtol=1e-5, atol=0)
    out.budget_loss.backward()
    assert model.skip_rnn.update_gate.bias.grad.abs() > 0


def test_task_losses() -> None:
    x = torch.rand(4, 6, 2)
    classes, several, numbers = torch.tensor([0, 2, 1, -100]), torch.rand(4, 3).round(), torch.rand(4)
    model = classifier(budget_weight=0)
    out = model(x, labels=classes)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:3], classes[:3]))
    assert model.config.problem_type == "single_label_classification"
    model = classifier(budget_weight=0)
    out = model(x, labels=several)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, several))
    assert model.config.problem_type == "multi_label_classification"
    model = classifier(budget_weight=0, num_labels=1)
    for labels in (numbers, numbers[:, None]):
        out = model(x, labels=labels)
        torch.testing.assert_close(out.loss, F.mse_loss(out.logits.squeeze(-1), numbers))
    out = classifier(budget_weight=0)(x, labels=torch.full((4,), -100))
    assert out.loss == 0


def test_several_labels_of_which_some_are_unknown() -> None:
    model = classifier(budget_weight=0, problem_type="multi_label_classification")
    x, several = torch.rand(4, 6, 2), torch.rand(4, 3).round()
    known = torch.tensor([[True, False, True]]).repeat(4, 1)
    out = model(x, labels=several.where(known, -100))
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits[known], several[known]))
    assert model(x, labels=torch.full((4, 3), -100)).loss == 0


def test_frame_losses_are_means_of_row_means() -> None:
    model = SkipRNNForFrameClassification(SkipRNNConfig(**(TINY | {"budget_weight": 0})))
    x, mask = torch.rand(2, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[0, -100, 2, 1], [1, 1, 0, 0]])
    out = model(x, mask, labels)
    assert out.logits.shape == (2, 4, 3)
    rows = [
        F.cross_entropy(out.logits[0, [0, 2, 3]], labels[0, [0, 2, 3]]),
        F.cross_entropy(out.logits[1, :2], labels[1, :2]),
    ]
    torch.testing.assert_close(out.loss, sum(rows) / 2)
    halves = [model(x[i : i + 1], mask[i : i + 1], labels[i : i + 1]).loss for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, out.loss)

    several = torch.rand(2, 4, 3).round()
    several[0, 1] = -100
    several[0, 2, 0] = -100
    out = model(x, mask, several)
    terms = F.binary_cross_entropy_with_logits(out.logits, several.clamp(min=0), reduction="none")
    first = (terms[0, 0].mean() + terms[0, 2, 1:].mean() + terms[0, 3].mean()) / 3
    torch.testing.assert_close(out.loss, (first + terms[1, :2].mean()) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_every_parameter(backend: str) -> None:
    for variant in VARIANTS:
        model = classifier(vocab_size=7, **variant)
        model.set_scan_backend(backend)
        model(input_ids=torch.randint(0, 7, (3, 12)), labels=torch.tensor([0, 1, 2])).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing, (variant, missing)
