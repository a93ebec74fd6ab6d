"""Hooks, replaced modules, pruning and parametrisations: inference and training use what a module is now."""

import copy
import functools

import pytest
import torch
from small_models import BACKENDS, classifier
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_skiprnn import SkipLSTM

X = torch.linspace(-2, 2, 2 * 20 * 2).reshape(2, 20, 2).sin()
IDS = torch.arange(24).reshape(2, 12) % 7
LABELS = torch.tensor([0, 2])


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(X, labels=LABELS).loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_embeddings_act_in_inference_and_in_training(backend: str) -> None:
    model = classifier(vocab_size=7).eval()
    model.set_scan_backend(backend)
    plain = model(IDS).logits
    hook = model.base_model.embeddings.register_forward_hook(lambda module, args, out: 3 * out)
    with torch.no_grad():
        hooked = model(IDS).logits
    torch.testing.assert_close(hooked, model(IDS).logits)
    assert not torch.allclose(hooked, plain)
    rows = model.pull(lambda at: torch.stack([IDS[row, step] for row, step in at]), length=[12, 12])
    torch.testing.assert_close(rows.logits, hooked)
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain)


class Hashed(nn.Module):
    """Embeddings of a user's own: no weight, no num_embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(3, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids % 3]


def test_embeddings_of_a_users_own() -> None:
    model = classifier(vocab_size=7)
    model.set_input_embeddings(Hashed())
    model(IDS, labels=LABELS).loss.backward()
    assert model.base_model.embeddings.table.grad.abs().sum() > 0
    with torch.no_grad():
        want = model.eval()(inputs_embeds=Hashed.forward(model.base_model.embeddings, IDS)).logits
        torch.testing.assert_close(model(IDS).logits, want)
        torch.testing.assert_close(model(IDS % 3).logits, want)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, vocab_size = 7\)"):
        model(IDS + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["weight_hh", "weight_ih", "bias", "initial_h"])
def test_pruned_layers_train_and_infer_with_what_is_left(name: str, backend: str) -> None:
    model = classifier(num_hidden_layers=2)
    model.set_scan_backend(backend)
    layer = model.base_model.layers[1]
    prune.random_unstructured(layer, name, amount=0.5)
    for _ in range(2):
        loss_of(model).backward()
    gradient = getattr(layer, f"{name}_orig").grad
    assert gradient.abs().sum() > 0
    assert not gradient[getattr(layer, f"{name}_mask") == 0].any()
    with torch.no_grad():
        getattr(layer, f"{name}_orig").add_(0.5)
        pruned = model.eval()(X).logits
        prune.remove(layer, name)
        torch.testing.assert_close(model(X).logits, pruned)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weight_norm_is_recomputed_in_every_forward(cell: str) -> None:
    model = classifier(cell_type=cell)
    layer = model.base_model.layers[0]
    before = loss_of(model)
    parametrizations.weight_norm(layer, "weight_hh")
    parametrizations.weight_norm(model.base_model.update_gate, "weight")
    torch.testing.assert_close(loss_of(model), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parametrizations.parameters())
        assert all(p.grad is not None for p in model.base_model.update_gate.parameters())
        optimizer.step()
    assert loss_of(model) < before
    trained = model(X).logits
    nn.utils.parametrize.remove_parametrizations(layer, "weight_hh")
    nn.utils.parametrize.remove_parametrizations(model.base_model.update_gate, "weight")
    torch.testing.assert_close(model(X).logits, trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_on_the_gate_moves_it_as_its_bias_does(backend: str) -> None:
    model = classifier().eval()
    model.set_scan_backend(backend)
    shifted = model(X, gate_shift=1.5)
    model.base_model.update_gate.register_forward_hook(lambda module, args, out: out + 1.5)
    hooked = model(X, output_update_gates=True)
    assert torch.equal(hooked.num_updates, shifted.num_updates)
    torch.testing.assert_close(hooked.logits, shifted.logits)
    stream = model.stream()
    read = torch.tensor([stream.push(x) for x in X[0]])
    assert torch.equal(read, hooked.update_gates[0].bool())


def test_a_gate_of_two_linear_layers_has_gradients_of_both() -> None:
    model = classifier()
    gate = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.base_model.update_gate.weight.copy_(gate[1].weight @ gate[0].weight)
        merged.base_model.update_gate.bias.copy_(gate[1].weight @ gate[0].bias + gate[1].bias)
    model.base_model.update_gate = gate
    torch.testing.assert_close(model(X).logits, merged(X).logits)
    model(X, labels=LABELS).loss.backward()
    assert all(p.grad.any() for p in gate.parameters())


def test_a_gate_that_is_not_linear_is_refused_by_name() -> None:
    model = classifier()
    model.base_model.update_gate = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="update_gate is now a Sequential that is not linear"):
        model(X)
    model.base_model.update_gate = nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"update_gate is now a Linear, which returns \(8, 2\) for \[8, 6\]"):
        model(X)
    model.base_model.update_gate = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1))
    assert loss_of(model.train()).isfinite()


def test_a_layer_in_the_place_of_nn_lstm_is_pruned_too() -> None:
    layer = SkipLSTM(2, 5, batch_first=True)
    prune.random_unstructured(layer.layers[0], "weight_hh", amount=0.5)
    for _ in range(2):
        layer(X)[0].sum().backward()
    assert layer.layers[0].weight_hh_orig.grad.any()


def test_a_forward_that_was_replaced_on_the_instance_is_called() -> None:
    """As accelerate does to offload weights."""
    model = classifier().eval()
    layer = model.base_model.layers[0]
    plain, calls = model(X).logits, []

    @functools.wraps(layer.forward)
    def forward(*args: object) -> object:
        calls.append(args)
        return type(layer).forward(layer, *args)

    layer.forward = forward
    torch.testing.assert_close(model(X).logits, plain)
    assert calls


def test_a_global_hook_acts_on_the_gate_and_on_the_layers() -> None:
    """Profilers and FLOP counters hook all modules at once."""
    model, called = classifier().eval(), set[nn.Module]()
    plain = model(X, output_update_gates=True).update_gates

    def read_every_step(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor | None:
        called.add(module)
        return out + 100 if module is model.base_model.update_gate else None

    hook = nn.modules.module.register_module_forward_hook(read_every_step)
    try:
        assert model(X, output_update_gates=True).update_gates.all()
    finally:
        hook.remove()
    assert set(model.base_model.layers) <= called
    assert not plain.all()
    assert torch.equal(model(X, output_update_gates=True).update_gates, plain)


def test_sparse_weights_are_refused_by_name() -> None:
    model = classifier()
    layer = model.base_model.layers[0]
    layer.weight_hh = nn.Parameter(layer.weight_hh.detach().to_sparse())
    with pytest.raises(ValueError, match=r"weight_hh must be a dense tensor; got torch.sparse_coo. .*to_dense\(\)"):
        model(X)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_without_values_are_refused(backend: str) -> None:
    """Also where the model has none either: which steps are read depends on values."""
    for model in (classifier(), classifier().to("meta")):
        model.set_scan_backend(backend)
        with pytest.raises((ValueError, RuntimeError), match="meta"):
            model(X.to("meta"))
    with pytest.raises(ValueError, match="no values"):
        SkipLSTM(2, 4)(X.to("meta"))
