"""The runs that the benchmarks time: our scan, nn.LSTM or nn.GRU, ONNX Runtime, and a loop that masks every step."""

import io
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from .workload import NATIVE, Run, Workload, bias_of_interval

# Whether PyTorch's libraries are limited to a narrower instruction set than the machine's (scripts/benchmark.py --isa).
RESTRICTED = "ONEDNN_MAX_CPU_ISA" in os.environ


def skip_layer(workload: Workload) -> Any:
    """Return our layer with the native one's weights and a gate that updates every `workload.interval` steps."""
    layer = NATIVE[workload.cell][1].from_native(workload.native)
    layer.update_gate.float()  # the gate is float32 in every precision, as in the models
    with torch.no_grad():
        layer.update_gate.weight.zero_()
        layer.update_gate.bias.fill_(bias_of_interval(workload.interval))
    return layer


def ours(workload: Workload, backend: str = "auto", dtype: torch.dtype | None = None) -> Run:
    """Return a run of our layer with a learned gate; it computes the last state or, in sequence mode, every output."""
    if workload.model is not None:
        return _trained(workload, workload.model)
    dtype = dtype or workload.dtype
    layer = skip_layer(workload).to(dtype)
    layer.update_gate.float()  # as before, after the conversion
    layer.set_scan_backend(backend)

    def forward(x: Tensor) -> Tensor:
        state = layer.initial_state(x.shape[0])
        out = layer.scan(x.to(dtype), state, forced_gates=workload.gates, sequence=workload.shape.sequence)
        result = out.sequence if out.sequence is not None else out.state.h[-1]
        return result if workload.mode == "inference" else result.sum() + out.num_updates.sum()

    return workload.run(forward, list(layer.parameters()))


def ours_bf16(workload: Workload) -> Run | None:
    """Return a run of our layer in bfloat16, with the gate in float32; None for a trained model."""
    return None if workload.model is not None else ours(workload, dtype=torch.bfloat16)


def _trained(workload: Workload, model: nn.Module) -> Run:
    """Return a run of a whole trained model; it computes the logits or, in training, the loss."""

    def forward(_: Tensor) -> Tensor:
        out = model(**workload.batch)
        result: Tensor = out.logits if workload.mode == "inference" else out.loss
        return result

    return workload.run(forward, list(model.parameters()))


def native(workload: Workload) -> Run:
    """Return a run of nn.LSTM or nn.GRU."""
    return workload.run(lambda x: native_result(workload, workload.native(x)), list(workload.native.parameters()))


def native_bf16(workload: Workload) -> Run:
    """Return a run of nn.LSTM or nn.GRU in bfloat16."""
    module = NATIVE[workload.cell][0](
        workload.shape.inputs, workload.shape.units, workload.shape.layers, batch_first=True
    ).bfloat16()
    return workload.run(lambda x: native_result(workload, module(x.bfloat16())), list(module.parameters()))


def native_packed(workload: Workload) -> Run:
    """Return a run of nn.LSTM or nn.GRU over a packed batch, in which each row has as many steps as it has updates.

    This is the work of a batch that skips steps, without the work of the gate.
    """
    if workload.gates is None:
        return native(workload)
    lengths = workload.gates.sum(1).cpu()

    def forward(x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, _ = workload.native(packed)
        return output.data

    return workload.run(forward, list(workload.native.parameters()))


def native_result(workload: Workload, outputs: Any) -> Tensor:
    """Return every step's output in sequence mode, else the last one."""
    output: Tensor = outputs[0]
    return output if workload.shape.sequence else output[:, -1]


def masked_loop(workload: Workload) -> Run | None:
    """Return a run of a Skip RNN in plain PyTorch: one product for all inputs, then a loop that masks every step.

    Return None for workloads that it cannot run: several layers, different rates in one batch, or a trained model.
    """
    return _masked(workload, _lstm_step if workload.cell == "lstm" else _gru_step)


def masked_loop_compiled(workload: Workload) -> Run | None:
    """Return a run of the masked loop whose step is compiled by torch.compile."""
    torch.compiler.reset()  # torch stops compiling a function after eight recompilations
    return _masked(workload, torch.compile(_lstm_step if workload.cell == "lstm" else _gru_step))


def _masked(workload: Workload, step: Callable[..., tuple[Tensor, ...]]) -> Run | None:
    if workload.shape.layers > 1 or workload.gates is not None or workload.model is not None:
        return None
    module: Any = workload.native
    units = workload.shape.units
    w_p = nn.Parameter(workload.x.new_zeros(units, 1))
    b_p = nn.Parameter(workload.x.new_tensor([bias_of_interval(workload.interval)]))
    parameters = [*module.parameters(), w_p, b_p]

    def forward(x: Tensor) -> Tensor:
        batch = x.shape[0]
        products = (x.flatten(0, 1) @ module.weight_ih_l0.T + module.bias_ih_l0).view(batch, x.shape[1], -1).unbind(1)
        h = c = x.new_zeros(batch, units)
        d, q, updates = x.new_ones(batch, 1), x.new_zeros(batch, 1), x.new_zeros(batch, 1)
        weight = module.weight_hh_l0.T
        for product in products:
            h, c, d, q, updates = step(product, h, c, d, q, updates, weight, module.bias_hh_l0, w_p, b_p)
        return h if workload.mode == "inference" else h.sum() + updates.sum()

    return workload.run(forward, parameters)


def _gate(d: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    probability = q + torch.minimum(d, 1 - q)
    return probability + (probability.round() - probability).detach(), probability


def _lstm_step(
    product: Tensor, h: Tensor, c: Tensor, d: Tensor, q: Tensor, updates: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    weight, bias, w_p, b_p = weights
    i, f, g, o = (product + torch.addmm(bias, h, weight)).chunk(4, 1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * new_c.tanh()
    u, probability = _gate(d, q)
    d = torch.lerp(d, torch.addmm(b_p, new_c, w_p).sigmoid(), u)
    return torch.lerp(h, new_h, u), torch.lerp(c, new_c, u), d, (1 - u) * probability, updates + u


def _gru_step(
    product: Tensor, h: Tensor, c: Tensor, d: Tensor, q: Tensor, updates: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    weight, bias, w_p, b_p = weights
    units = h.shape[1]
    recurrent = torch.addmm(bias, h, weight)
    r, z = (product[:, : 2 * units] + recurrent[:, : 2 * units]).sigmoid().chunk(2, 1)
    n = (product[:, 2 * units :] + r * recurrent[:, 2 * units :]).tanh()
    new_h = torch.lerp(n, h, z)
    u, probability = _gate(d, q)
    d = torch.lerp(d, torch.addmm(b_p, new_h, w_p).sigmoid(), u)
    return torch.lerp(h, new_h, u), c, d, (1 - u) * probability, updates + u


def onnxruntime(workload: Workload) -> Run | None:
    """Return a run of ONNX Runtime's LSTM or GRU.

    Return None for training, if it is not installed, and if the instruction set is limited, which it does not support.
    """
    if workload.mode == "training" or RESTRICTED:
        return None
    try:
        import onnx  # noqa: F401 - torch's exporter needs it
        import onnxruntime as runtime
    except ImportError:
        return None
    file = io.BytesIO()
    module = workload.native.eval()
    torch.onnx.export(module, (workload.x,), file, dynamo=False, input_names=["x"])  # type: ignore[arg-type]  # accepts BytesIO
    options = runtime.SessionOptions()
    options.intra_op_num_threads = workload.threads
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": workload.x.numpy()}
    return lambda: session.run(None, feed)


PEERS: dict[str, Callable[[Workload], Run | None]] = {
    "native": native,
    "ours": ours,
    "native_bf16": native_bf16,
    "ours_bf16": ours_bf16,
    "native_packed": native_packed,
    "masked_loop": masked_loop,
    "masked_loop_compiled": masked_loop_compiled,
    "onnxruntime": onnxruntime,
}
