"""The models: inputs, outputs, masks, states and precision."""

import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_models import BACKENDS, TINY, VARIANTS, classifier
from torch.utils._pytree import tree_map
from transformers import AutoModelForSequenceClassification
from transformers.utils.generic import ModelOutput

from hf_skiprnn import SkipRNNConfig, SkipRNNModel, SkipRNNState
from hf_skiprnn.model.outputs_skip_rnn import SkipRNNClassifierOutput


def test_input_noise_is_added_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SkipRNNModel(SkipRNNConfig(**(TINY | {"input_noise": 0.3, "gate": "always"})))
    x, read = torch.rand(200, 50, 2), []
    scan = model.scan
    monkeypatch.setattr(model, "scan", lambda inputs, *rest: (read.append(inputs), scan(inputs, *rest))[1])
    model.eval()(input_values=x)
    model.train()(input_values=x)
    assert torch.equal(read[0], x)
    noise = read[1] - x
    assert abs(noise.mean()) < 0.01  # 20,000 draws: a deviation of 0.002
    assert noise.std() == pytest.approx(0.3, abs=0.01)


def test_three_kinds_of_input_give_the_same_result() -> None:
    pixels = torch.rand(2, 2, 3, 4)
    model = classifier().eval()
    rows = pixels.permute(0, 2, 3, 1).reshape(2, 12, 2)  # row by row
    torch.testing.assert_close(model(pixel_values=pixels).logits, model(input_values=rows).logits)
    text = classifier(vocab_size=11).eval()
    assert text.main_input_name == "input_ids"
    assert model.main_input_name == "input_values"
    ids = torch.randint(0, 11, (2, 12))
    text.skip_rnn.load_state_dict(model.skip_rnn.state_dict(), strict=False)
    text.classifier.load_state_dict(model.classifier.state_dict())
    values = text.get_input_embeddings()(ids)
    torch.testing.assert_close(text(input_ids=ids).logits, model(input_values=values).logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_in_inference_are_those_of_training(backend: str) -> None:
    """In inference the native engine looks up only the tokens that are read."""
    model = classifier(vocab_size=11, num_hidden_layers=2).eval()
    model.set_scan_backend(backend)
    ids, mask = torch.randint(0, 11, (3, 20)), torch.rand(3, 20) < 0.8
    want = model(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        got = model(input_ids=ids.int(), attention_mask=mask, output_update_gates=True)
    torch.testing.assert_close(got.logits, want.logits)
    assert torch.equal(got.num_updates, want.num_updates)
    with torch.no_grad():  # what is not read does not matter
        read = got.update_gates.bool()
        again = model(input_ids=ids.where(read, 0), attention_mask=mask)
    assert torch.equal(again.logits, got.logits)


def test_contract_of_the_output() -> None:
    out = classifier()(torch.rand(4, 9, 2), labels=torch.tensor([0, 1, 2, 0]), output_update_gates=True)
    assert list(out) == ["loss", "logits", "task_loss", "budget_loss", "num_updates", "update_gates", "state"]
    torch.testing.assert_close(out.loss, out.task_loss + out.budget_loss)
    assert torch.equal(out.num_updates, out.update_gates.sum(1))
    assert set(out.update_gates.unique().tolist()) <= {0.0, 1.0}
    assert isinstance(out.state, SkipRNNState)
    without = classifier()(torch.rand(4, 9, 2))
    assert list(without) == ["logits", "budget_loss", "num_updates", "state"]


def test_outputs_behave_as_those_of_transformers() -> None:
    @dataclass
    class Theirs(ModelOutput):
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        state: Any = None

    ours, a, b = SkipRNNClassifierOutput, torch.zeros(2), torch.ones(2)
    for arguments in ({"logits": a, "state": b},), ([("loss", a), ("logits", b)],), (a,), (None, b), (a, b), ():
        out, theirs = ours(*arguments), Theirs(*arguments)  # accelerate makes them of one mapping
        assert list(out.items()) == list(theirs.items())
        assert (out.loss, out.logits, out.state) == (theirs.loss, theirs.logits, theirs.state)
    out = ours(logits=a, state=b)
    out.loss, out["num_updates"], out.note, out.logits = a, b, "kept", None
    assert list(out) == ["logits", "state", "loss", "num_updates"]
    assert out["loss"] is out.loss is a
    assert out.num_updates is b
    assert out.note == "kept"
    again = pickle.loads(pickle.dumps(ours(logits=a)))
    assert (type(again), list(again)) == (ours, ["logits"])
    assert torch.equal(again.logits, a)
    mapped = tree_map(lambda part: part + 1, ours(logits=a, budget_loss=b))
    assert (type(mapped), list(mapped)) == (ours, ["logits", "budget_loss"])
    assert torch.equal(mapped.logits, b)


def test_base_model_output() -> None:
    model = SkipRNNModel(SkipRNNConfig(**TINY))
    out = model(torch.rand(4, 9, 2))
    assert out.last_hidden_state.shape == (4, 9, 6)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, -1])
    assert model(torch.rand(4, 9, 2), output_sequence=False).last_hidden_state is None
    assert isinstance(model.update_gate, torch.nn.Linear)
    assert not hasattr(SkipRNNModel(SkipRNNConfig(gate="always")), "update_gate")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_on_any_side_changes_nothing(variant: dict) -> None:
    model = classifier(**variant).eval()
    x = torch.rand(3, 10, 2)

    def run(inputs: torch.Tensor, mask: torch.Tensor | None = None):
        if variant.get("gate") == "random":  # one draw per padded step: the same draws at the same real steps
            draws = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)) > 0.4
            gates = draws[:, : inputs.shape[1]].clone()
            if mask is not None:
                gates[mask] = draws[:, :10].reshape(-1)
            return model(inputs, mask, forced_gates=gates)
        return model(inputs, mask)

    want = run(x)
    for place in (range(10), range(4, 14), [0, 1, 3, 5, 6, 7, 8, 10, 12, 13]):
        padded, mask = torch.full((3, 14, 2), math.inf), torch.zeros(3, 14, dtype=torch.long)
        padded[:, list(place)], mask[:, list(place)] = x, 1
        got = run(padded, mask.bool())
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-6)
        assert torch.equal(got.num_updates, want.num_updates)


def test_random_gates_follow_the_real_step_and_the_seed() -> None:
    model = classifier(gate="random", skip_probability=0.4).eval()
    x, mask = torch.rand(50, 20, 2), torch.ones(50, 20, dtype=torch.long)

    def gates(seed: int, **kwargs) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model(x, generator=generator, output_update_gates=True, **kwargs).update_gates

    assert torch.equal(gates(3), gates(3))
    assert not torch.equal(gates(3), gates(4))
    assert gates(3)[:, 0].all()
    assert 0.55 < gates(3)[:, 1:].mean() < 0.65
    mask[:, 5] = 0
    holed = gates(3, attention_mask=mask)
    assert torch.equal(holed[:, mask[0] == 1], gates(3)[:, :19])


def test_strided_gates_continue_over_a_seam() -> None:
    model = classifier(gate="strided", stride=4).eval()
    x = torch.rand(2, 21, 2)
    whole = model(x, output_update_gates=True)
    assert whole.update_gates[0].nonzero().squeeze(1).tolist() == [0, 4, 8, 12, 16, 20]
    state, gates = None, []
    for start, end in ((0, 3), (3, 10), (10, 21)):
        out = model(x[:, start:end], state=state, output_update_gates=True)
        state = out.state
        gates.append(out.update_gates)
    assert torch.equal(torch.cat(gates, 1), whole.update_gates)
    torch.testing.assert_close(out.logits, whole.logits)


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_state_continues_a_sequence(variant: dict) -> None:
    model = classifier(**variant).eval()
    x = torch.rand(3, 30, 2)
    first = model(x[:, :13])
    second = model(x[:, 13:], state=first.state.detach())
    whole = model(x)
    torch.testing.assert_close(second.logits, whole.logits, rtol=0, atol=1e-6)
    assert torch.equal(first.num_updates + second.num_updates, whole.num_updates)
    swapped = model(x[[2, 0], 13:], state=first.state.reorder(torch.tensor([2, 0])))
    torch.testing.assert_close(swapped.logits, whole.logits[[2, 0]], rtol=0, atol=1e-6)


def test_a_row_without_real_steps_returns_the_initial_state() -> None:
    model = classifier().eval()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    out = model(torch.rand(2, 5, 2), mask)
    assert out.num_updates[1] == 0
    torch.testing.assert_close(out.logits[1], model.classifier(model.skip_rnn.layers[0].initial_h))


@pytest.mark.parametrize("mode", ["autocast", "model"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_trains_without_nan_and_gates_stay_float32(mode: str, cell: str, backend: str) -> None:
    model = classifier(cell_type=cell, num_hidden_layers=2)
    model.set_scan_backend(backend)
    if mode == "model":
        model = model.to(torch.bfloat16)
        assert model.skip_rnn.update_gate.weight.dtype == torch.float32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, labels = torch.rand(12, 20, 2), torch.arange(12) % 3
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            out = model(x, labels=labels)
        assert out.num_updates.dtype == out.state.increment.dtype == out.state.h.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]


def test_a_model_made_in_half_precision_has_its_gate_in_float32() -> None:
    model = AutoModelForSequenceClassification.from_config(SkipRNNConfig(**TINY), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.base_model.update_gate.weight.dtype == torch.float32


def test_float16_inference() -> None:
    model = classifier().half()
    logits = model(torch.rand(3, 20, 2, dtype=torch.float16)).logits
    assert logits.dtype == torch.float16
    assert logits.isfinite().all()


def test_the_gate_stays_in_float32_from_any_precision() -> None:
    for model in (classifier().double().bfloat16(), classifier().double().half(), classifier().bfloat16()):
        assert model.base_model.update_gate.weight.dtype == torch.float32
    assert classifier().double().base_model.update_gate.weight.dtype == torch.float64
