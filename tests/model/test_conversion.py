"""Weights of nn.LSTM and nn.GRU there and back; the authors' variables against their equations in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_skiprnn import SkipGRU, SkipLSTM, SkipRNNConfig, SkipRNNForSequenceClassification, SkipRNNModel
from hf_skiprnn.conversion import load_native, load_tensorflow, native_config, native_state, tensorflow_config

# torch.nn


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("native_class", [nn.LSTM, nn.GRU])
def test_native_weights_there_and_back(native_class: type[nn.RNNBase], layers: int) -> None:
    native = native_class(3, 5, layers, batch_first=True).double()
    state = {f"rnn.{name}": value for name, value in native.state_dict().items()}
    config = SkipRNNConfig(**native_config(state, "rnn."), gate="always", learn_initial_state=False)
    model = SkipRNNModel(config).double()
    load_native(model, state, prefix="rnn.")
    x = torch.rand(2, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x).last_hidden_state, native(x)[0], rtol=1e-12, atol=1e-12)
    back = native_class(3, 5, layers, batch_first=True).double()
    back.load_state_dict(native_state(model))
    torch.testing.assert_close(back(x)[0], native(x)[0], rtol=1e-12, atol=1e-12)


def test_native_weights_into_a_skipping_head_and_into_layers_without_bias() -> None:
    lstm = nn.LSTM(3, 5)
    head = SkipRNNForSequenceClassification(SkipRNNConfig(input_size=3, hidden_size=5))
    gate = head.base_model.update_gate.weight.clone()
    load_native(head, lstm.state_dict())
    assert torch.equal(head.base_model.layers[0].weight_hh, lstm.weight_hh_l0)
    assert torch.equal(head.base_model.update_gate.weight, gate)
    gru = nn.GRU(3, 5, bias=False)
    layer = SkipGRU(3, 5, bias=False, gate="always")
    load_native(layer, gru.state_dict())
    x = torch.rand(4, 2, 3)
    torch.testing.assert_close(layer(x)[0], gru(x)[0])
    assert native_state(layer).keys() == gru.state_dict().keys()
    biased = SkipGRU(3, 5, gate="always")
    load_native(biased, gru.state_dict())
    torch.testing.assert_close(biased(x)[0], gru(x)[0])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (nn.LSTM(3, 5, bidirectional=True).state_dict(), "bidirectional"),
        (nn.LSTM(3, 5, proj_size=2).state_dict(), "with projections"),
        (nn.Linear(3, 5).state_dict(), "has weight_hh_l0; got .'bias', 'weight'. and prefix ''"),
        (nn.RNN(3, 5).state_dict(), r"\[4H, H\] .LSTM. or \[3H, H\] .GRU.; got .5, 5."),
        (nn.LSTM(4, 5).state_dict(), r"need .cell.* = .'lstm', 4, 5, 1.; the target has .'lstm', 3, 5, 1."),
        (nn.GRU(3, 5).state_dict(), "'gru_reset_after', 3, 5, 1"),
    ],
)
def test_native_weights_that_do_not_fit(state: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_native(SkipLSTM(3, 5), state)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (SkipLSTM(3, 5), ValueError, "gate='learned' may skip steps"),
        (SkipGRU(3, 5, gate="always", gru_reset="before"), ValueError, "resets after the product"),
        (SkipLSTM(3, 5, gate="always", learn_initial_state=True), ValueError, "pass it to them as hx"),
        (nn.LSTM(3, 5), TypeError, "got LSTM"),
    ],
)
def test_weights_that_the_native_layer_cannot_have(source: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        native_state(source)


def test_biases_need_a_place() -> None:
    with pytest.raises(ValueError, match="made with bias=False"):
        load_native(SkipLSTM(3, 5, bias=False), nn.LSTM(3, 5).state_dict())


# The authors' code: their graph in NumPy, float64, one row


def variables(cell: str, inputs: int, units: int, layers: int = 1) -> dict[str, np.ndarray]:
    """Random variables under the names that their graph gives them."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {}
    scope = f"model/rnn/{'Multi' if layers > 1 else ''}Skip{cell.upper()}Cell"
    for layer in range(layers):
        inner = f"layer_{layer + 1}/" if layers > 1 else ""
        width = (inputs if layer == 0 else units) + units
        maps = {"": 4} if cell == "lstm" else {"gates/": 2, "candidate/": 1}
        for name, gates in maps.items():
            shapes[f"{scope}/{inner}{name}Weights"] = (width, gates * units)
            shapes[f"{scope}/{inner}{name}Biases"] = (gates * units,)
        for state in "hc" if cell == "lstm" else "h":
            shapes[f"model/{inner}initial_{state}/initial_state"] = (1, units)
    shapes |= {f"{scope}/state_update_prob/Weights": (units, 1), f"{scope}/state_update_prob/Biases": (1,)}
    shapes |= {"model/fully_connected/weights": (units, 3), "model/fully_connected/biases": (3,)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    values[f"{scope}/state_update_prob/Biases"] -= 1.0  # so that steps are skipped
    return values


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def their_graph(cell: str, v: dict[str, np.ndarray], x: np.ndarray, layers: int) -> tuple[np.ndarray, list[int]]:
    """Logits and gates of one row x [T, I]."""
    scope = f"model/rnn/{'Multi' if layers > 1 else ''}Skip{cell.upper()}Cell"
    inner = [f"layer_{i + 1}/" if layers > 1 else "" for i in range(layers)]
    h = [v[f"model/{name}initial_h/initial_state"][0] for name in inner]
    c = [v[f"model/{name}initial_c/initial_state"][0] for name in inner] if cell == "lstm" else h
    update_prob, accumulated, gates = 1.0, 0.0, []
    for x_t in x:
        below, new_h, new_c = x_t, [], []
        for i, name in enumerate(inner):

            def linear(part: str, *parts: np.ndarray) -> np.ndarray:
                return np.concatenate(parts) @ v[f"{scope}/{name}{part}Weights"] + v[f"{scope}/{name}{part}Biases"]  # noqa: B023 - called at once

            if cell == "lstm":
                in_gate, candidate, forget, out = np.split(linear("", below, h[i]), 4)
                new_c.append(c[i] * sigmoid(forget + 1.0) + sigmoid(in_gate) * np.tanh(candidate))
                new_h.append(np.tanh(new_c[i]) * sigmoid(out))
            else:
                reset, keep = np.split(sigmoid(linear("gates/", below, h[i])), 2)
                new_h.append(keep * h[i] + (1 - keep) * np.tanh(linear("candidate/", below, reset * h[i])))
            below = new_h[i]
        top = new_c[-1] if cell == "lstm" else new_h[-1]
        proposed = sigmoid(top @ v[f"{scope}/state_update_prob/Weights"] + v[f"{scope}/state_update_prob/Biases"])[0]
        accumulated += min(update_prob, 1 - accumulated)
        gates.append(round(accumulated))
        if gates[-1]:
            h, c, update_prob, accumulated = new_h, new_c if cell == "lstm" else new_h, proposed, 0.0
    return h[-1] @ v["model/fully_connected/weights"] + v["model/fully_connected/biases"], gates


@pytest.mark.parametrize(("cell", "layers"), [("lstm", 1), ("lstm", 3), ("gru", 1)])
def test_the_authors_variables_give_what_their_graph_gives(cell: str, layers: int) -> None:
    values = variables(cell, inputs=2, units=4, layers=layers)
    listed = {f"{name}:0": value for name, value in values.items()}
    extra = {f"{name}/Adam": value for name, value in values.items()} | {"beta1_power": np.array(0.9)}
    config = SkipRNNConfig(**tensorflow_config(listed | extra), num_labels=3)
    assert config.num_hidden_layers == layers
    model = SkipRNNForSequenceClassification(config).double()
    load_tensorflow(model, listed | extra)
    x = np.random.default_rng(1).normal(size=(40, 2))
    logits, gates = their_graph(cell, values, x, layers)
    out = model(torch.from_numpy(x)[None], output_update_gates=True)
    assert out.update_gates[0].tolist() == gates
    assert 0 < sum(gates) < 40
    torch.testing.assert_close(out.logits[0].detach().numpy(), logits, rtol=1e-10, atol=1e-12)


def test_variables_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="feeds the input, not the layer below"):
        tensorflow_config(variables("gru", 2, 4, layers=2))
    single = variables("lstm", 2, 4)
    with pytest.raises(ValueError, match="layer normalisation"):
        tensorflow_config(single | {"model/rnn/SkipLSTMCell/i/gain": np.ones(4)})
    with pytest.raises(ValueError, match=r"such as rnn/SkipLSTMCell/Weights; got .'dense/kernel'."):
        tensorflow_config({"dense/kernel": np.ones((2, 2))})
    model = SkipRNNForSequenceClassification(SkipRNNConfig(**tensorflow_config(single), num_labels=3))
    del single["model/initial_h/initial_state"]
    with pytest.raises(ValueError, match="one variable whose name ends in initial_h/initial_state"):
        load_tensorflow(model, single)
    with pytest.raises(ValueError, match="learned gate; the target has gate='always'"):
        load_tensorflow(SkipLSTM(2, 4, gate="always"), single)
