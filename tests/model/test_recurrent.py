"""SkipLSTM and SkipGRU where nn.LSTM and nn.GRU stand."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from hf_skiprnn import SkipGRU, SkipLSTM

FLOAT32 = 2e-6  # a few dozen steps of rounding

PAIRS = [(nn.LSTM, SkipLSTM), (nn.GRU, SkipGRU)]


def outputs(result) -> list[torch.Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("backend", ["dense", "events", "auto"])
@pytest.mark.parametrize(
    ("pair", "layers", "batch_first", "bias"), list(itertools.product(PAIRS, [1, 3], [True, False], [True, False]))
)
def test_equal_to_native_with_the_gate_always_open(
    pair, layers: int, batch_first: bool, bias: bool, backend: str
) -> None:
    native = pair[0](3, 7, layers, bias=bias, batch_first=batch_first)
    skip = pair[1].from_native(native, gate="always")
    skip.set_scan_backend(backend)
    x = torch.randn(5, 20, 3)
    state = torch.randn(layers, 5 if batch_first else 20, 7)
    for hx in (None, (state, state.flip(0)) if pair[0] is nn.LSTM else state):
        for got, want in zip(outputs(skip(x, hx)), outputs(native(x, hx)), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_equal_native(pair) -> None:
    native = pair[0](3, 7, 2).double()
    skip = pair[1].from_native(native, gate="always")
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    grads = []
    for module in (native, skip):
        leaf = x.clone().requires_grad_()
        (module(leaf)[0] ** 2).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(skip.layers[1].weight_ih.grad, native.weight_ih_l1.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(skip.layers[0].weight_hh.grad, native.weight_hh_l0.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(skip.layers[0].bias.grad, native.bias_ih_l0.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(pair, enforce_sorted: bool) -> None:
    native = pair[0](3, 7, 2)
    skip = pair[1].from_native(native, gate="always")
    lengths = [9, 6, 6, 1] if enforce_sorted else [6, 1, 9, 6]
    packed = pack_padded_sequence(torch.randn(9, 4, 3), lengths, enforce_sorted=enforce_sorted)
    state = torch.randn(2, 4, 7)
    hx = (state, state.flip(0)) if pair[0] is nn.LSTM else state
    got, want = skip(packed, hx), native(packed, hx)
    torch.testing.assert_close(got[0].data, want[0].data, rtol=0, atol=FLOAT32)
    assert torch.equal(got[0].batch_sizes, want[0].batch_sizes)
    for mine, theirs in zip(outputs(got)[1:], outputs(want)[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT32)
    torch.testing.assert_close(pad_packed_sequence(got[0])[0], pad_packed_sequence(want[0])[0], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("pair", PAIRS)
def test_without_a_batch(pair) -> None:
    native = pair[0](3, 7, 2)
    skip = pair[1].from_native(native, gate="always")
    x, state = torch.randn(9, 3), torch.randn(2, 7)
    hx = (state, state.flip(0)) if pair[0] is nn.LSTM else state
    for got, want in zip(outputs(skip(x, hx)), outputs(native(x, hx)), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=FLOAT32)
    _, _, (num_updates, gates) = skip(x, return_updates=True)
    assert num_updates.shape == ()
    assert gates.shape == (9,)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_to_native(pair, bias: bool) -> None:
    skip = pair[1](3, 7, 2, bias=bias, gate="always", dtype=torch.float64)
    native = skip.to_native()
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(native(x)[0], skip(x)[0], rtol=0, atol=1e-14)
    again = pair[1].from_native(native, gate="always")
    assert again.state_dict().keys() == skip.state_dict().keys()
    for name, value in skip.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_learned_gate_skips_and_trains() -> None:
    layer = SkipLSTM(2, 8, batch_first=True, update_bias=-2.0)
    output, (h, c), (num_updates, gates) = layer(torch.randn(4, 50, 2), return_updates=True)
    assert output.shape == (4, 50, 8)
    assert h.shape == c.shape == (1, 4, 8)
    assert torch.equal(gates.sum(1), num_updates)
    assert 4 < num_updates.mean() < 40
    (output[:, -1].sum() + num_updates.mean()).backward()
    assert layer.update_gate.weight.grad.abs().sum() > 0
    held = gates[:, 1:] == 0
    assert torch.equal(output[:, 1:][held], output[:, :-1][held])


@pytest.mark.parametrize("gate", ["learned", "strided"])
@pytest.mark.parametrize(("kind", "layers"), [(SkipLSTM, 2), (SkipGRU, 1)])
@pytest.mark.parametrize("form", ["batch", "no batch", "packed"])
def test_a_state_continues_exactly_at_every_cut(form: str, kind: type, layers: int, gate: str) -> None:
    layer = kind(3, 7, layers, gate=gate, stride=3, update_bias=-1.5, learn_initial_state=True).double()
    if gate == "learned":
        layer.update_gate.weight.data.mul_(3)
    x = torch.randn(12, 1 if form == "no batch" else 4, 3, dtype=torch.float64)

    def run(x: torch.Tensor, state):
        given = x[:, 0] if form == "no batch" else pack_padded_sequence(x, [len(x)] * 4) if form == "packed" else x
        output, last, (_, gates) = layer(given, state, return_updates=True)
        return pad_packed_sequence(output)[0] if form == "packed" else output, last, gates

    start = layer.initial_state(x.shape[1])
    whole, end, gates = run(x, start)
    torch.testing.assert_close(whole, run(x, None)[0], rtol=0, atol=0)
    assert gates.mean() < 0.8
    for cut in range(1, 12):
        first, middle, early = run(x[:cut], start)
        second, last, late = run(x[cut:], middle)
        assert torch.equal(torch.cat((early, late), -1), gates)
        torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=1e-12)
        for mine, theirs in zip(last, end, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_gradients_flow_through_a_state() -> None:
    layer, x = SkipLSTM(3, 7, update_bias=-1.0).double(), torch.randn(12, 4, 3, dtype=torch.float64)
    _, middle = layer(x[:5], layer.initial_state(4))
    _, last = layer(x[5:], middle)
    (last.h.sum() + last.increment.sum()).backward()
    found = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    _, end = layer(x, layer.initial_state(4))
    (end.h.sum() + end.increment.sum()).backward()
    for mine, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="state must have shapes"):
        layer(x, layer.initial_state(3))


def test_learned_initial_state_and_reset_before() -> None:
    layer = SkipGRU(2, 8, num_layers=2, learn_initial_state=True, gru_reset="before")
    assert {"layers.0.initial_h", "layers.1.initial_h"} <= layer.state_dict().keys()
    layer(torch.randn(5, 3, 2))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_returns_half_and_keeps_the_gate_in_float32(dtype: torch.dtype) -> None:
    assert SkipLSTM(2, 8, dtype=dtype).update_gate.weight.dtype == torch.float32
    layer = SkipLSTM(2, 8).to(dtype)
    assert layer.update_gate.weight.dtype == torch.float32
    assert layer.layers[0].weight_ih.dtype == dtype
    output, (h, c) = layer(torch.randn(5, 3, 2, dtype=dtype))
    assert output.dtype == h.dtype == c.dtype == dtype
    assert layer.double().update_gate.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bidirectional": True}, "bidirectional=True is refused"),
        ({"dropout": 0.5}, "dropout=0.5 is refused"),
        ({"proj_size": 3}, "proj_size=3 is refused"),
        ({"gate": "open"}, 'gate must be "learned"'),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"gate": "strided", "stride": 0}, "stride must be at least 1; got 0"),
        ({"gate_gradient": "average"}, 'gate_gradient must be "sum", "capped" or "mean"; got \'average\''),
        ({"gate": "random", "skip_probability": 1.5}, r"skip_probability must be in \[0, 1\); got 1.5"),
        ({"gate": "random", "skip_probability": float("nan")}, "skip_probability must be in"),
    ],
)
def test_refused_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipLSTM(3, 7, **arguments)


def test_wrong_inputs() -> None:
    layer = SkipLSTM(3, 7)
    with pytest.raises(ValueError, match=r"input must be \[T, I\], \[T, B, I\] with I = 3; got \(5, 2, 4\)"):
        layer(torch.randn(5, 2, 4))
    with pytest.raises(ValueError, match=r"floating point; got torch.int64"):
        layer(torch.ones(5, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"floating point; got torch.int64"):  # nn.LSTM refuses it too
        layer(pack_sequence([torch.ones(5, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)]))
    with pytest.raises(ValueError, match=r"a PackedSequence of rows \[T, I\] with I = 3; got \(1, 5, 4\)"):
        layer(pack_sequence([torch.randn(5, 4)]))
    with pytest.raises(ValueError, match="at least one step"):
        layer(torch.randn(0, 2, 3))
    with pytest.raises(ValueError, match=r"h_0 must be \[num_layers, B, H\] = \(1, 2, 7\); got \(1, 3, 7\)"):
        layer(torch.randn(5, 2, 3), (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)))


@pytest.mark.parametrize("shape", [(4, 1, 2), (4, 2)], ids=["batch", "no batch"])
def test_states_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    x, h = torch.rand(shape), torch.zeros(1, *shape[1:-1], 5)
    for hx, got in (
        (h, "Tensor"),
        ((h,), r"\(Tensor\)"),
        ((h, h, h), r"\(Tensor, Tensor, Tensor\)"),
        ((h, None), "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"hx must be \(h_0, c_0\) or a SkipRNNState; got .*{got}"):
            SkipLSTM(2, 5)(x, hx)
    with pytest.raises(ValueError, match=r"hx must be h_0 or a SkipRNNState; got \(Tensor, Tensor\)"):
        SkipGRU(2, 5)(x, (h, h))
    assert SkipLSTM(2, 5)(x, [h, h])[0].shape == (*shape[:-1], 5)


def test_conversions_that_would_change_the_function_are_refused() -> None:
    with pytest.raises(ValueError, match="resets after the product"):
        SkipGRU.from_native(nn.GRU(3, 7), gru_reset="before")
    with pytest.raises(ValueError, match="bidirectional"):
        SkipLSTM.from_native(nn.LSTM(3, 7, bidirectional=True))


def test_empty_batch_as_native() -> None:
    output, (h, _) = SkipLSTM(3, 7)(torch.randn(5, 0, 3))
    assert output.shape == (5, 0, 7)
    assert h.shape == (1, 0, 7)
