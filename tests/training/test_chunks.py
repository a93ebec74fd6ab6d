"""Training in chunks: gates are those of the whole sequence, and gradients stop between chunks."""

import pytest
import torch

from hf_skiprnn import SkipRNNConfig, SkipRNNForFrameClassification, SkipRNNForSequenceClassification
from hf_skiprnn.training.chunks import chunks

STEPS = 53
KINDS = [SkipRNNForSequenceClassification, SkipRNNForFrameClassification]


def build(kind: type, **overrides):
    torch.manual_seed(0)
    settings = {"hidden_size": 6, "input_size": 2, "num_labels": 3, "update_bias": -1.5, "budget_weight": 1e-2}
    model = kind(SkipRNNConfig(**(settings | overrides))).double()
    with torch.no_grad():
        model.base_model.update_gate.weight.mul_(3)
    return model


def a_batch(kind: type) -> dict[str, torch.Tensor]:
    mask = torch.arange(STEPS) >= torch.tensor([0, 7, 30, 52]).unsqueeze(1)  # left padding
    labels = (4, STEPS) if kind is SkipRNNForFrameClassification else (4,)
    x = torch.randn(4, STEPS, 2, dtype=torch.float64)
    return {"input_values": x, "attention_mask": mask.long(), "labels": torch.randint(0, 3, labels)}


def run(model, batch: dict[str, torch.Tensor], steps: int, detach: bool = True) -> list:
    outs, state = [], None
    for chunk in chunks(batch, steps):
        outs.append(model(**chunk, state=state, output_update_gates=True))
        if detach:
            (outs[-1].budget_loss if outs[-1].loss is None else outs[-1].loss).backward()
        state = outs[-1].state.detach() if detach else outs[-1].state
    return outs


@pytest.mark.parametrize("cell_type", ["lstm", "gru"])
@pytest.mark.parametrize("steps", [1, 5, 26, STEPS, 100])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_gates_know_no_seam(kind: type, steps: int, cell_type: str) -> None:
    model, batch = build(kind, cell_type=cell_type), a_batch(kind)
    whole = model(**batch, output_update_gates=True)
    outs = run(model, batch, steps)
    assert torch.equal(torch.cat([out.update_gates for out in outs], 1), whole.update_gates)
    assert whole.update_gates[0].sum() < STEPS / 2
    logits = torch.cat([out.logits for out in outs], 1) if model.per_frame else outs[-1].logits
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(sum(out.budget_loss for out in outs), whole.budget_loss)
    for mine, theirs in zip(outs[-1].state, whole.state, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


def test_budgets_on_the_share_add_up_by_the_share_of_the_steps() -> None:
    model = build(KINDS[0], budget_loss="rate", budget_target=0.3, budget_weight=0.7)
    batch = a_batch(KINDS[0]) | {"attention_mask": torch.ones(4, STEPS)}
    parts = [out.budget_loss * out.update_gates.shape[1] / STEPS for out in run(model, batch, 5)]
    torch.testing.assert_close(sum(parts), model(**batch).budget_loss)


def test_without_truncation_gradients_are_those_of_the_whole() -> None:
    model, batch = build(KINDS[0]), a_batch(KINDS[0])
    model(**batch).loss.backward()
    want = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()
    outs = run(model, batch, 10, detach=False)
    (outs[-1].task_loss + sum(out.budget_loss for out in outs)).backward()
    for name, part in model.named_parameters():
        torch.testing.assert_close(part.grad, want[name], msg=lambda m, n=name: f"{n}: {m}")


def test_truncation_ends_gradients_at_the_seam() -> None:
    model, batch = build(KINDS[0]), a_batch(KINDS[0])
    batch["input_values"].requires_grad_()
    state = None
    for chunk in chunks(batch, 40):
        out = model(**chunk, state=state)
        state = out.state.detach()
    out.loss.backward()
    assert not batch["input_values"].grad[:, :40].any()
    assert batch["input_values"].grad[:, 40:].any()


def test_a_long_sequence_is_learned_in_chunks() -> None:
    """The label is the sign of the last of hundreds of values, which truncated gradients can learn."""
    torch.manual_seed(0)
    model = SkipRNNForSequenceClassification(SkipRNNConfig(hidden_size=8, num_labels=2, budget_weight=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(40):
        x = torch.randn(16, 200, 1)
        labels = (x[:, -1, 0] > 0).long()
        run(model, {"input_values": x, "labels": labels}, 50)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(64, 200, 1)
    with torch.no_grad():
        predicted = model(input_values=x).logits.argmax(1)
    assert (predicted == (x[:, -1, 0] > 0)).float().mean() > 0.85


def test_wrong_batches_are_refused() -> None:
    x = torch.zeros(2, 9, 1)
    with pytest.raises(ValueError, match="at least one step; got steps=0"):
        next(chunks({"input_values": x}, 0))
    with pytest.raises(ValueError, match=r"got \{'input_values': 9, 'attention_mask': 8\}"):
        next(chunks({"input_values": x, "attention_mask": torch.ones(2, 8)}, 3))
    with pytest.raises(ValueError, match=r"in a batch of \['pixel_values'\]. Flatten pixel_values"):
        next(chunks({"pixel_values": torch.zeros(2, 1, 3, 3)}, 3))
