"""What benchmark.py times: our scan, the native layer, ONNX Runtime's, and a masked loop that computes every step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from hf_skiprnn import SkipGRU, SkipLSTM

if TYPE_CHECKING:
    from scripts.benchmarks.cpu import Shape

Run = Callable[[], object]
NATIVE: dict[str, tuple[Any, Any]] = {"lstm": (nn.LSTM, SkipLSTM), "gru": (nn.GRU, SkipGRU)}


@dataclass
class Workload:
    """One point to measure, with its data."""

    shape: Shape
    cell: str
    mode: str  # "inference" | "training"
    rate: float  # share of steps that are updates
    spread: str = "constant"  # "constant": the learned gate has this interval; "lognormal": rows differ
    threads: int = 1
    level: str = "layer"  # or "model": a trained one
    model: nn.Module | None = None
    batch: dict[str, Tensor] = field(default_factory=dict)  # the model's inputs
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    native: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    gates: Tensor | None = field(init=False, default=None)  # [B, T] bool, forced where rows differ

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        shape = self.shape
        self.native = NATIVE[self.cell][0](shape.inputs, shape.units, shape.layers, batch_first=True)
        self.native.to(self.device, self.dtype)
        self.x = torch.randn(shape.batch, shape.steps, shape.inputs).to(self.device, self.dtype)
        if self.spread == "lognormal":
            self.gates = lognormal_gates(shape.batch, shape.steps, self.rate).to(self.device)

    @property
    def interval(self) -> int:
        """Steps from one update to the next."""
        return round(1 / self.rate)

    def updates(self) -> int:
        """Of all rows together."""
        if self.gates is not None:
            return int(self.gates.sum())
        if self.model is not None:
            return round(self.rate * self.shape.batch * self.shape.steps)
        return self.shape.batch * math.ceil(self.shape.steps / self.interval)

    def run(self, forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> Run:
        """Inference, or a training step: forward from x to a tensor, and backward from its sum."""
        if self.mode == "inference":

            def infer() -> None:
                with torch.inference_mode():
                    forward(self.x)

            return infer

        def train() -> None:
            x = self.x.detach().requires_grad_(self.shape.input_gradients)
            for parameter in parameters:
                parameter.grad = None
            forward(x).sum().backward()

        return train


def lognormal_gates(batch: int, steps: int, rate: float) -> Tensor:
    """Rows with update rates spread log-normally (sigma 0.5) around `rate`, at most 1: [B, T] bool."""
    rates = (rate * torch.exp(0.5 * torch.randn(batch) - 0.125)).clamp(max=1.0)
    gates = torch.rand(batch, steps) < rates.unsqueeze(1)
    gates[:, 0] = True
    return gates


def of_checkpoint(folder: str, mode: str) -> Workload:
    """A trained model on 256 rows of its task's test split, at the rate it reads them; peers get random inputs."""
    from transformers import AutoModelForSequenceClassification

    from hf_skiprnn.commands import evaluate
    from scripts.benchmarks.cpu import Shape

    _, task = evaluate.parse([folder])
    task.use_processor(folder)
    rows = task.load(seed=0).test
    batch = task.collate([rows[i] for i in range(min(256, len(rows)))])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        gates = model(**batch, output_update_gates=True).update_gates
    config = model.config
    batch_size, steps = gates.shape
    shape = Shape(batch_size, steps, config.input_size, config.hidden_size, config.num_hidden_layers)
    rate = round(float(gates.mean()), 3)
    name = Path(folder).resolve().name
    return Workload(shape, config.cell_type, mode, rate, name, level="model", model=model, batch=dict(batch))


def skip_layer(workload: Workload) -> Any:
    """Our layer with the native one's weights, and a gate that has learned one interval n: n * D is just above 0.5."""
    layer = NATIVE[workload.cell][1].from_native(workload.native)
    layer.update_gate.float()  # as in a model in half precision
    with torch.no_grad():
        layer.update_gate.weight.zero_()
        increment = 0.5 / workload.interval * (1 + 1e-4)
        layer.update_gate.bias.fill_(math.log(increment / (1 - increment)) if increment < 1 else 20.0)
    return layer


def ours(workload: Workload, backend: str = "auto") -> Run:
    """Our layer with a learned gate of that interval; the last state, or every step's in sequence mode."""
    if workload.model is not None:
        return _trained(workload, workload.model)
    layer = skip_layer(workload)
    layer.set_scan_backend(backend)

    def forward(x: Tensor) -> Tensor:
        state = layer.initial_state(x.shape[0])
        out = layer.scan(x, state, forced_gates=workload.gates, sequence=workload.shape.sequence)
        result = out.sequence if out.sequence is not None else out.state.h[-1]
        return result if workload.mode == "inference" else result.sum() + out.num_updates.sum()

    return workload.run(forward, list(layer.parameters()))


def _trained(workload: Workload, model: nn.Module) -> Run:
    """The whole model: its loss in training."""

    def forward(_: Tensor) -> Tensor:
        out = model(**workload.batch)
        result: Tensor = out.logits if workload.mode == "inference" else out.loss
        return result

    return workload.run(forward, list(model.parameters()))


def native(workload: Workload) -> Run:
    """nn.LSTM or nn.GRU in float32."""
    return workload.run(lambda x: native_result(workload, workload.native(x)), list(workload.native.parameters()))


def native_bf16(workload: Workload) -> Run:
    """nn.LSTM or nn.GRU in bfloat16."""
    module = NATIVE[workload.cell][0](
        workload.shape.inputs, workload.shape.units, workload.shape.layers, batch_first=True
    ).bfloat16()
    return workload.run(lambda x: native_result(workload, module(x.bfloat16())), list(module.parameters()))


def native_packed(workload: Workload) -> Run:
    """nn.LSTM or nn.GRU over a packed ragged batch: rows as long as their updates, what a skipping batch amounts to."""
    if workload.gates is None:
        return native(workload)
    lengths = workload.gates.sum(1).cpu()

    def forward(x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, _ = workload.native(packed)
        return output.data

    return workload.run(forward, list(workload.native.parameters()))


def native_result(workload: Workload, outputs: Any) -> Tensor:
    """Every step's output in sequence mode, else the last."""
    output: Tensor = outputs[0]
    return output if workload.shape.sequence else output[:, -1]


def masked_loop(workload: Workload) -> Run | None:
    """A careful Skip RNN as others write it: input products at once, every step computed, blended by its gate."""
    return _masked(workload, _lstm_step if workload.cell == "lstm" else _gru_step)


def masked_loop_compiled(workload: Workload) -> Run | None:
    """The same with its step under torch.compile."""
    torch.compiler.reset()  # every workload anew: after eight recompilations of one function torch gives up
    return _masked(workload, torch.compile(_lstm_step if workload.cell == "lstm" else _gru_step))


def _masked(workload: Workload, step: Callable[..., tuple[Tensor, ...]]) -> Run | None:
    if workload.shape.layers > 1 or workload.gates is not None or workload.model is not None:
        return None
    module: Any = workload.native
    units = workload.shape.units
    w_p = nn.Parameter(workload.x.new_zeros(units, 1))
    increment = min(0.5 / workload.interval * (1 + 1e-4), 0.999)
    b_p = nn.Parameter(workload.x.new_tensor([math.log(increment / (1 - increment))]))
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
    product: Tensor,
    h: Tensor,
    c: Tensor,
    d: Tensor,
    q: Tensor,
    updates: Tensor,
    weight: Tensor,
    bias: Tensor,
    w_p: Tensor,
    b_p: Tensor,
) -> tuple[Tensor, ...]:
    i, f, g, o = (product + torch.addmm(bias, h, weight)).chunk(4, 1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * new_c.tanh()
    u, probability = _gate(d, q)
    d = torch.lerp(d, torch.addmm(b_p, new_c, w_p).sigmoid(), u)
    return torch.lerp(h, new_h, u), torch.lerp(c, new_c, u), d, (1 - u) * probability, updates + u


def _gru_step(
    product: Tensor,
    h: Tensor,
    c: Tensor,
    d: Tensor,
    q: Tensor,
    updates: Tensor,
    weight: Tensor,
    bias: Tensor,
    w_p: Tensor,
    b_p: Tensor,
) -> tuple[Tensor, ...]:
    units = h.shape[1]
    recurrent = torch.addmm(bias, h, weight)
    r, z = (product[:, : 2 * units] + recurrent[:, : 2 * units]).sigmoid().chunk(2, 1)
    n = (product[:, 2 * units :] + r * recurrent[:, 2 * units :]).tanh()
    new_h = torch.lerp(n, h, z)
    u, probability = _gate(d, q)
    d = torch.lerp(d, torch.addmm(b_p, new_h, w_p).sigmoid(), u)
    return torch.lerp(h, new_h, u), c, d, (1 - u) * probability, updates + u


def onnxruntime(workload: Workload) -> Run | None:
    """ONNX Runtime's LSTM or GRU, inference; None where it is not installed."""
    if workload.mode == "training":
        return None
    try:
        import onnx  # noqa: F401 - torch's exporter needs it
        import onnxruntime as runtime
    except ImportError:
        return None
    file = io.BytesIO()
    module = workload.native.eval()
    torch.onnx.export(module, (workload.x,), file, dynamo=False, input_names=["x"])  # type: ignore[arg-type]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = workload.threads
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": workload.x.numpy()}
    return lambda: session.run(None, feed)


PEERS: dict[str, Callable[[Workload], Run | None]] = {
    "native": native,
    "ours": ours,
    "native_bf16": native_bf16,
    "native_packed": native_packed,
    "masked_loop": masked_loop,
    "masked_loop_compiled": masked_loop_compiled,
    "onnxruntime": onnxruntime,
}
