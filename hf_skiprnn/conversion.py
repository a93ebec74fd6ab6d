"""Convert weights from and to torch.nn.LSTM and nn.GRU, and from the authors' TensorFlow code.

    state = torch.load("lstm.pt")  # the state dict of an nn.LSTM
    model = SkipRNNModel(SkipRNNConfig(**native_config(state), gate="always", learn_initial_state=False))
    load_native(model, state)
    lstm.load_state_dict(native_state(model))

The weights go into or come from a SkipRNNModel, one of its heads, a SkipLSTM or a SkipGRU. Parameters that the source
lacks (gate, classifier) keep their values.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_skiprnn.model.layers_skip_rnn import SkipRNNLayer, SkipStack

FORGET_BIAS = 1.0  # the authors' code adds it inside the sigmoid
OPTIMIZER = re.compile(r"(/Adam(_\d+)?|(^|/)beta[12]_power|(^|/)global_step)$")


def native_config(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Return fields of SkipRNNConfig for the state dict of an nn.LSTM or nn.GRU. `prefix`: what its names start with.

    Raises:
        ValueError: the state dict belongs to another module, a bidirectional one, or one with projections.
    """
    names = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    for mark, what in (
        ("_reverse", "bidirectional: the gate decides from the past"),
        ("weight_hr", "with projections"),
    ):
        if any(mark in name for name in names):
            raise ValueError(f"The state dict is {what}; no Skip RNN has that.")
    layers = sum(re.fullmatch(r"weight_hh_l\d+", name) is not None for name in names)
    if not layers:
        raise ValueError(
            f"A state dict of nn.LSTM or nn.GRU has weight_hh_l0; got {sorted(state_dict)[:8]} and prefix {prefix!r}."
        )
    rows, hidden = state_dict[f"{prefix}weight_hh_l0"].shape
    if rows not in (3 * hidden, 4 * hidden):
        raise ValueError(f"weight_hh_l0 must be [4H, H] (LSTM) or [3H, H] (GRU); got {(rows, hidden)}.")
    cell = {"cell_type": "lstm"} if rows == 4 * hidden else {"cell_type": "gru", "gru_reset": "after"}
    width = state_dict[f"{prefix}weight_ih_l0"].shape[1]
    return {**cell, "input_size": width, "hidden_size": hidden, "num_hidden_layers": layers}


@torch.no_grad()
def load_native(target: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the weights of an nn.LSTM or nn.GRU into `target`. If they have no biases, the target's become zero.

    Raises:
        TypeError: target is not a Skip RNN.
        ValueError: sizes or cell of `target` differ; a GRU needs gru_reset="after".
    """
    stack, config = _stack_of(target), native_config(state_dict, prefix)
    if config["cell_type"] == "gru":
        _check_reset(stack)
    _check_sizes(stack, config)
    for index, layer in enumerate(stack.layers):
        part = {name: state_dict.get(f"{prefix}{name}_l{index}") for name in ("bias_ih", "bias_hh")}
        layer.weight_ih.copy_(state_dict[f"{prefix}weight_ih_l{index}"])
        layer.weight_hh.copy_(state_dict[f"{prefix}weight_hh_l{index}"])
        _copy_biases(layer, part["bias_ih"], part["bias_hh"])


def _check_reset(stack: SkipStack) -> None:
    if stack.cell == "gru":
        raise ValueError("nn.GRU resets after the product; with gru_reset='before' the same weights compute otherwise.")


def _copy_biases(layer: SkipRNNLayer, bias_ih: Tensor | None, bias_hh: Tensor | None) -> None:
    if layer.bias is None:
        if bias_ih is not None:
            raise ValueError("The state dict has biases, but the target was made with bias=False.")
        return
    if bias_ih is None or bias_hh is None:
        layer.bias.zero_()
        if layer.bias_hh_n is not None:
            layer.bias_hh_n.zero_()
        return
    if layer.bias_hh_n is not None:  # kept apart from the other biases, because the reset gate multiplies it
        units = len(layer.bias_hh_n)
        layer.bias_hh_n.copy_(bias_hh[2 * units :])
        bias_hh = torch.cat([bias_hh[: 2 * units], torch.zeros_like(bias_hh[2 * units :])])
    layer.bias.copy_(bias_ih + bias_hh)


@torch.no_grad()
def native_state(source: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of the nn.LSTM or nn.GRU that computes the same as `source`.

    bias_ih holds the whole bias, except the part of a GRU's bias that the reset gate multiplies.

    Raises:
        TypeError: source is not a Skip RNN.
        ValueError: its gate may skip, its initial state is learned, or its GRU resets before the product.
    """
    stack = _stack_of(source)
    if stack.gate != "always":
        raise ValueError(f"gate={stack.gate!r} may skip steps; nn.LSTM and nn.GRU cannot. Use gate='always'.")
    _check_reset(stack)
    if stack.layers[0].initial_h is not None:
        raise ValueError("nn.LSTM and nn.GRU cannot store a learned initial state; pass it to them as hx.")
    state: dict[str, Tensor] = {}
    for index, layer in enumerate(stack.layers):
        state[f"{prefix}weight_ih_l{index}"] = layer.weight_ih.clone()
        state[f"{prefix}weight_hh_l{index}"] = layer.weight_hh.clone()
        if layer.bias is None:
            continue
        state[f"{prefix}bias_ih_l{index}"] = layer.bias.clone()
        hidden = state[f"{prefix}bias_hh_l{index}"] = torch.zeros_like(layer.bias)
        if layer.bias_hh_n is not None:
            hidden[-len(layer.bias_hh_n) :] = layer.bias_hh_n
    return state


def tensorflow_config(variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return fields of SkipRNNConfig for the authors' variables of SkipLSTMCell, MultiSkipLSTMCell or SkipGRUCell.

    variables: name -> array, from a TensorFlow checkpoint reader. Outer scopes, the ending ":0" and the variables of
    the optimizer are ignored.

    Raises:
        ValueError: the cell is another one, has layer normalisation or layers of different sizes, or is a stacked
            Skip GRU.
    """
    cell, kernels = _tensorflow_cell(_clean(variables))
    gates = 4 if cell == "lstm" else 2
    hidden = {kernel.shape[1] // gates for kernel in kernels}
    if len(hidden) > 1:
        raise ValueError(f"All layers must have the same number of units; got {sorted(hidden)}.")
    (units,) = hidden
    sizes = {"input_size": kernels[0].shape[0] - units, "hidden_size": units, "num_hidden_layers": len(kernels)}
    return {"cell_type": cell, "learn_initial_state": True, **sizes}


@torch.no_grad()
def load_tensorflow(target: nn.Module, variables: Mapping[str, np.ndarray]) -> None:
    """Copy the authors' variables into `target`: cells, update gate, initial state and, into a head, the classifier.

    Their LSTM orders the activations i j f o and adds a forget bias of 1 at run time; ours orders them i f g o, and its
    bias includes that 1. Their GRU resets before the product (gru_reset="before").

    Raises:
        TypeError: target is no Skip RNN.
        ValueError: as in tensorflow_config; also if the sizes of `target` differ or a variable is missing.
    """
    stack, clean = _stack_of(target), _clean(variables)
    _check_sizes(stack, tensorflow_config(variables))
    cell, kernels = _tensorflow_cell(clean)
    for index, layer in enumerate(stack.layers):
        scope = f"layer_{index + 1}/" if len(kernels) > 1 else ""
        kernel, bias = _gates_in_our_order(clean, cell, scope)
        width = layer.weight_ih.shape[1]
        _copy(layer.weight_ih, kernel[:width].T)
        _copy(layer.weight_hh, kernel[width:].T)
        _copy(layer.bias, bias)
        for name in ("h", "c") if cell == "lstm" else ("h",):
            initial = _find(clean, f"{scope}initial_{name}/initial_state")
            _copy(getattr(layer, f"initial_{name}"), initial[0])
    _copy(stack.update_gate.weight, _find(clean, "state_update_prob/Weights").T)
    _copy(stack.update_gate.bias, _find(clean, "state_update_prob/Biases"))
    classifier = getattr(target, "classifier", None)
    if classifier is not None:
        _copy(classifier.weight, _find(clean, "fully_connected/weights").T)
        _copy(classifier.bias, _find(clean, "fully_connected/biases"))


def _gates_in_our_order(clean: Mapping[str, np.ndarray], cell: str, scope: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel [I + H, G*H] and bias [G*H] of a layer, in torch's order of the activations."""
    if cell == "gru":  # two linear maps: one for r and u, one for the candidate
        parts = [scope + part for part in ("gates", "candidate")]
        kernel = np.concatenate([_find(clean, f"{part}/Weights") for part in parts], axis=1)
        return kernel, np.concatenate([_find(clean, f"{part}/Biases") for part in parts])
    own = f"Cell/{scope}"
    i, j, f, o = np.split(_find(clean, f"{own}Weights"), 4, axis=1)
    bias_i, bias_j, bias_f, bias_o = np.split(_find(clean, f"{own}Biases"), 4)
    return np.concatenate([i, f, j, o], axis=1), np.concatenate([bias_i, bias_f + FORGET_BIAS, bias_j, bias_o])


def _tensorflow_cell(clean: Mapping[str, np.ndarray]) -> tuple[str, list[np.ndarray]]:
    """Return the cell's name, and for each layer the kernel matrix, whose shape tells the layer's sizes."""
    if any(name.endswith("/gain") for name in clean):
        raise ValueError("These variables belong to a cell with layer normalisation, which no Skip RNN here has.")
    if any("MultiSkipGRUCell/" in name for name in clean):
        raise ValueError(
            "The authors' stacked Skip GRU feeds the input, not the layer below, to its upper layers' candidates. "
            "No model here computes that, so its weights cannot be used. A single Skip GRU and every Skip LSTM can."
        )
    for cell, pattern in (("lstm", r"SkipLSTMCell/(layer_\d+/)?Weights$"), ("gru", r"SkipGRUCell/gates/Weights$")):
        names = sorted((name for name in clean if re.search(pattern, name)), key=_layer_number)
        if names:
            return cell, [clean[name] for name in names]
    raise ValueError(
        f"Expected variables of SkipLSTMCell, MultiSkipLSTMCell or SkipGRUCell, such as "
        f"rnn/SkipLSTMCell/Weights; got {sorted(clean)[:8]}."
    )


def _layer_number(name: str) -> int:
    found = re.search(r"layer_(\d+)/", name)
    return int(found[1]) if found else 1


def _clean(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the optimizer's variables, and the output number (":0") at the end of the names."""
    named = {re.sub(r":\d+$", "", name): np.asarray(value) for name, value in variables.items()}
    return {name: value for name, value in named.items() if not OPTIMIZER.search(name)}


def _find(clean: Mapping[str, np.ndarray], ending: str) -> np.ndarray:
    """Return the one variable whose name has this ending."""
    found = [name for name in clean if f"/{name}".endswith(ending if ending.startswith("Cell/") else f"/{ending}")]
    if len(found) != 1:
        raise ValueError(f"Expected one variable whose name ends in {ending}; got {found or sorted(clean)}.")
    return clean[found[0]]


def _copy(parameter: Tensor | None, values: np.ndarray) -> None:
    if parameter is None:
        raise ValueError("The target lacks a parameter of the source: it needs learn_initial_state=True and biases.")
    if tuple(parameter.shape) != values.shape:
        raise ValueError(f"A parameter of shape {tuple(parameter.shape)} cannot take values of shape {values.shape}.")
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _stack_of(module: nn.Module) -> SkipStack:
    stack = getattr(module, "base_model", module)
    if not isinstance(stack, SkipStack):
        raise TypeError(f"Expected a SkipRNNModel, one of its heads, SkipLSTM or SkipGRU; got {type(module).__name__}.")
    return stack


def _check_sizes(stack: SkipStack, wanted: Mapping[str, Any]) -> None:
    cell = "gru_reset_after" if wanted.get("gru_reset") == "after" else wanted["cell_type"]
    layer = stack.layers[0]
    got = (stack.cell, layer.weight_ih.shape[1], layer.weight_hh.shape[1], len(stack.layers))
    needed = (cell, wanted["input_size"], wanted["hidden_size"], wanted["num_hidden_layers"])
    if got != needed:
        raise ValueError(f"The weights need (cell, input_size, hidden_size, layers) = {needed}; the target has {got}.")
    if "learn_initial_state" in wanted and stack.gate != "learned":
        raise ValueError(f"The authors' cells have a learned gate; the target has gate={stack.gate!r}.")
