"""Whether the Triton engine computes on this GPU what plain PyTorch does: asked before its first use, as it is young.

Once for what the tuner tells apart (triton_tuning.py), the scan that it chose runs a small problem of its own, forward
and backward, beside the events scan: a learned gate without a mask, the last state only, which most calls compile
anyway. If they agree, that is kept beside the tuner's files. If not, "auto" takes events for the rest of the process,
with one warning; "triton" by name raises. HF_SKIPRNN_AUTOTUNE=0 does not switch it off.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from hf_skiprnn.model.cells_skip_rnn import CELLS, GateWeights, LayerWeights, state_dtype
from hf_skiprnn.model.event_scan_skip_rnn import event_scan
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

from .operators import triton_scan

# Of values and of gradients, against the largest. TF32 is judged as float16.
TOLERANCE = {
    torch.float64: (1e-9, 1e-8),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (1e-2, 5e-2),
    torch.bfloat16: (6e-2, 2e-1),
}
STEPS = 13
INCREMENTS = (1.0, 0.5, 0.2, 0.1, 0.06)  # of the rows: their first updates come at steps 1, 1, 3, 5 and 9
GATE_BIAS = -1.7  # an increment of 0.154: every fourth step, far from a tie

logger = logging.get_logger(__name__)
_verdicts: dict[tuple[str, ...], str] = {}  # "" where they agree
_lock = threading.Lock()


def auto_scan(
    inputs: Tensor, layers: Sequence[LayerWeights], *arguments: object, cell: str, **named: object
) -> ScanOutput:
    """`triton_scan`, or `event_scan` once the kernels have computed something else here."""
    if any(_verdicts.values()) or disagreement(inputs, layers, cell):
        return event_scan(inputs, layers, *arguments, cell=cell, **named)
    return triton_scan(inputs, layers, *arguments, cell=cell, **named)  # type: ignore[arg-type]


def named_scan(
    inputs: Tensor, layers: Sequence[LayerWeights], *arguments: object, cell: str, **named: object
) -> ScanOutput:
    """`triton_scan`.

    Raises:
        RuntimeError: the kernels compute something else here than plain PyTorch does.
    """
    said = disagreement(inputs, layers, cell)
    if said:
        raise RuntimeError(said)
    return triton_scan(inputs, layers, *arguments, cell=cell, **named)  # type: ignore[arg-type]


def disagreement(inputs: Tensor, layers: Sequence[LayerWeights], cell: str) -> str:
    """What differs from plain PyTorch for layers like these, and what to do; "" if nothing does, or none can tell now.

    None can while a CUDA graph is captured or torch.compile traces.
    """
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return ""
    from hf_skiprnn.kernels.triton import tuning as triton_tuning

    from .tiling import INLINE_INPUTS

    weight, width = layers[0].weight_hh, inputs.shape[2]
    tuned = "tuned" if triton_tuning.is_enabled() else "first"
    key = triton_tuning.key_of("agrees", len(layers), weight, cell, width, tuned)
    with _lock:
        if key not in _verdicts:
            if triton_tuning.agreed(key):
                _verdicts[key] = ""
            else:
                found = in_a_thread(weight, len(layers), cell, min(width, INLINE_INPUTS + 1))
                _verdicts[key] = found and _explained(found, weight, cell)
                if found:
                    logger.warning(_verdicts[key])
                else:
                    triton_tuning.write_agreement(key)
        return _verdicts[key]


def _explained(found: str, weight: Tensor, cell: str) -> str:
    return (
        f"The Triton engine does not compute on {weight.device} what plain PyTorch does ({cell}, H {weight.shape[1]}, "
        f"{weight.dtype}): {found}. 'auto' takes 'events' in this process. Please report it with the output of "
        "`python tests/triton_suite.py` and of `python -m torch.utils.collect_env`."
    )


def in_a_thread(weight: Tensor, layers: int, cell: str, width: int) -> str:
    """`compare` with none of the caller's grad modes, autocast, hooks or dispatch modes: they are the thread's."""
    said: list[str] = []

    def run() -> None:
        try:
            said.append(compare(weight.shape[1], layers, weight.dtype, weight.device, cell, width))
        except Exception as error:  # noqa: BLE001 - kernels that do not compile or run are the finding
            said.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return said[0]


def compare(units: int, layers: int, dtype: torch.dtype, device: torch.device, cell: str, width: int) -> str:
    """The first result or gradient that differs beyond the tolerance; "" where none does."""
    kept = state_dtype(torch.empty(0, dtype=dtype))
    draw = torch.Generator().manual_seed(0)
    gates, rows = CELLS[cell].num_gates * units, len(INCREMENTS)

    def random(*shape: int, scale: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=draw) * scale).to(like).to(device, kept).requires_grad_()

    leaves = {"inputs": random(rows, STEPS, width), "h": random(layers, rows, units, scale=0.5, like=kept)}
    if CELLS[cell].has_cell_state:
        leaves["c"] = random(layers, rows, units, scale=0.5, like=kept)
    for index in range(layers):
        below = units if index else width
        leaves[f"layers.{index}.weight_ih"] = random(gates, below, scale=0.8 / below**0.5)
        leaves[f"layers.{index}.weight_hh"] = random(gates, units, scale=0.8 / units**0.5)
        leaves[f"layers.{index}.bias"] = random(gates, scale=0.3)
    # So small that no update depends on it: the gates are the same in every precision.
    leaves["update_gate.weight"] = random(1, units, scale=0.01 / units, like=kept)
    leaves["update_gate.bias"] = torch.full((1,), GATE_BIAS, device=device, dtype=kept).requires_grad_()
    leaves["increment"] = torch.tensor(INCREMENTS, device=device, dtype=kept).requires_grad_()

    def run(scan: object, operand: torch.dtype) -> dict[str, Tensor]:
        stack = [
            LayerWeights(
                leaves[f"layers.{index}.weight_ih"].to(operand),
                leaves[f"layers.{index}.weight_hh"].to(operand),
                leaves[f"layers.{index}.bias"].to(operand),
                None,
            )
            for index in range(layers)
        ]
        gate = GateWeights(leaves["update_gate.weight"], leaves["update_gate.bias"])
        state = SkipRNNState(leaves["h"], leaves.get("c"), leaves["increment"], torch.zeros_like(leaves["increment"]))
        x = leaves["inputs"].to(operand)
        out = scan(x, stack, gate, state, cell=cell)  # type: ignore[operator]
        parts = {"num_updates": out.num_updates, "update_gates": out.update_gates}
        parts |= {f"state.{name}": part for name, part in out.state._asdict().items() if part is not None}
        loss = sum(
            (part.to(kept) * torch.linspace(-1, 1, part.numel(), device=device, dtype=kept).view_as(part)).sum()
            for part in parts.values()
        )
        grads = torch.autograd.grad(loss, list(leaves.values()))
        named = {f"the gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {name: part.detach() for name, part in parts.items()} | named

    from .tiling import precision

    limits = TOLERANCE[torch.float16 if precision(dtype) == "tf32" else dtype]
    want, got = run(event_scan, kept), run(triton_scan, dtype)
    for name, right in want.items():
        off = (got[name].to(kept) - right).abs().max() / right.abs().max().clamp(min=1e-6)
        limit = limits["gradient" in name]
        if not off <= limit:
            return f"{name} differs by {float(off):.1e} of its largest value; {limit:.0e} is expected at most"
    return ""
