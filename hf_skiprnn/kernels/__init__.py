"""Choose the engine that runs a scan. Importing this package builds and loads nothing."""

import sys

import torch
from torch import Tensor
from transformers.utils import logging

from hf_skiprnn.model.dense_scan_skip_rnn import DENSE, Engine, Scan
from hf_skiprnn.model.event_scan_skip_rnn import EVENTS
from hf_skiprnn.model.inputs_skip_rnn import can_read_values

logger = logging.get_logger(__name__)

# Every scan of the native CPU engine packs the weights again. With few steps and many weights this takes longer than
# the engine saves: plain PyTorch is then up to twice as fast in inference and four times in training. Measured on one
# Zen 5 core with LSTMs of 0.06 to 8.4 million weights, T 1 to 16, B 1 and 16. With fewer weights the engine is faster.
MANY_WEIGHTS = 1 << 20
FEW_READS = 3  # inference: rows times steps
FEW_STEPS = 8  # training: steps

NO_ONNX = (
    "torch.onnx.export cannot trace the model itself, since ONNX has no such scan. Use scripts/export.py, or "
    "hf_skiprnn.inference.export.save_onnx(UpdateLoop(model), path)."
)

_reasons: dict[tuple[str, int], str | None] = {}


def choose_engine(backend: str, inputs: Tensor, num_weights: int) -> Engine:
    """Return the engine that runs a scan.

    Args:
        backend: "cpu" or "triton" names an engine. "auto" takes the native engine for inputs on the CPU, and plain
            PyTorch ("events") on other devices, where the engine cannot run, for weights that are wrappers (torchao),
            and for scans that are too short for it. Under a transform of torch.func it takes "dense".
        inputs: [B, T, I], or token ids [B, T].
        num_weights: how many numbers the layers' matrices hold.

    Raises:
        RuntimeError: the named engine cannot run these inputs, or torch.onnx.export is tracing the model; the message
            says why and what to do.
    """
    if _is_in_onnx_export():
        raise RuntimeError(NO_ONNX)
    device = inputs.device
    if backend == "auto" and not can_read_values() and not torch.compiler.is_compiling():
        return DENSE
    if backend == "auto" and (device.type != "cpu" or _is_too_short(inputs, num_weights)):
        return EVENTS
    name, wanted, place = ("triton", "cuda", "a CUDA GPU") if backend == "triton" else ("cpu", "cpu", "the CPU")
    if device.type != wanted:
        raise RuntimeError(f"Scan backend {name!r} needs inputs on {place}; they are on {device}. Use 'events'.")
    reason = _why_not(name, device.index or 0)
    if reason is not None:
        if backend == "auto":
            return EVENTS
        raise RuntimeError(reason)
    if name == "triton":
        from hf_skiprnn.kernels.triton.operators import triton_scan

        return Engine("triton", triton_scan)
    from hf_skiprnn.kernels.cpu.operators import CPU, CPU_OR_EVENTS

    return CPU_OR_EVENTS if backend == "auto" else CPU


def select(backend: str, inputs: Tensor, weights: int) -> Scan | None:
    """Return `choose_engine`'s scan; None for plain PyTorch. The code in checkpoints of version 0.1.0 calls this."""
    engine = choose_engine(backend, inputs, weights)
    return None if engine is EVENTS else engine.scan


def of_tokens(scan: Scan) -> Scan | None:
    """Return the form of a scan from `select` that takes token ids; None if it has none. For version 0.1.0, as well."""
    from hf_skiprnn.kernels.cpu.operators import CPU, CPU_OR_EVENTS

    return next((engine.scan_tokens for engine in (CPU, CPU_OR_EVENTS) if engine.scan is scan), None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _is_in_onnx_export() -> bool:
    """Return whether torch.onnx.export is at work. To import torch.onnx for this would take a tenth of a second."""
    return "torch.onnx" in sys.modules and bool(torch.onnx.is_in_onnx_export())


def _is_too_short(inputs: Tensor, num_weights: int) -> bool:
    """Return whether packing the weights takes longer than the engine saves. A call with autograd is training."""
    if num_weights <= MANY_WEIGHTS:
        return False
    batch, steps = inputs.shape[:2]
    return steps < FEW_STEPS if torch.is_grad_enabled() else batch * steps < FEW_READS


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _why_not(name: str, device: int) -> str | None:
    """Return why an engine cannot run here, or None. The answer is constant in a process, also for a compiler."""
    key = (name, device)
    if key not in _reasons:
        if name == "triton":
            from hf_skiprnn.kernels.triton.operators import unavailable_reason as why_not_triton

            _reasons[key] = why_not_triton(device)
        else:
            from hf_skiprnn.kernels.cpu.operators import unavailable_reason as why_not_cpu

            _reasons[key] = why_not_cpu()
            if _reasons[key] is None:
                logger.info("Scans on the CPU run in the native engine.")
            else:
                slower = "Scans on the CPU run in plain PyTorch ('events'), several times slower. %s"
                logger.warning(slower, _reasons[key])
    return _reasons[key]
