"""The choice of the engine that runs a scan. Importing this package builds and loads nothing."""

import torch
from torch import Tensor
from transformers.utils import logging

from hf_skiprnn.model.dense_scan_skip_rnn import Engine
from hf_skiprnn.model.event_scan_skip_rnn import EVENTS

logger = logging.get_logger(__name__)

# Every scan of the native CPU engine packs the weights anew. For few steps of many weights this costs more than the
# engine saves: plain PyTorch then is up to twice as fast in inference and four times in training. Measured on one Zen 5
# core with LSTMs of 0.06 to 8.4 million weights, T 1 to 16, B 1 and 16; with fewer weights the engine always wins.
MANY_WEIGHTS = 1 << 20
FEW_READS = 3  # inference: rows times steps
FEW_STEPS = 8  # training: steps

_reasons: dict[tuple[str, int], str | None] = {}


def choose_engine(backend: str, inputs: Tensor, num_weights: int) -> Engine:
    """Return the engine that runs a scan.

    Args:
        backend: "cpu" or "triton" names an engine. "auto" takes the native engine for inputs on the CPU, and plain
            PyTorch ("events") on other devices, where the engine cannot run, and for scans that are too short for it.
        inputs: [B, T, I], or token ids [B, T].
        num_weights: how many numbers the layers' matrices hold.

    Raises:
        RuntimeError: the named engine cannot run these inputs; the message says why and what to do.
    """
    device = inputs.device
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
    from hf_skiprnn.kernels.cpu.operators import cpu_scan, cpu_scan_tokens

    return Engine("cpu", cpu_scan, cpu_scan_tokens, follows_autocast=False)


def _is_too_short(inputs: Tensor, num_weights: int) -> bool:
    """Whether packing the weights costs more than the native engine saves; under autograd a call is training."""
    if num_weights <= MANY_WEIGHTS:
        return False
    batch, steps = inputs.shape[:2]
    return steps < FEW_STEPS if torch.is_grad_enabled() else batch * steps < FEW_READS


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _why_not(name: str, device: int) -> str | None:
    """Return why an engine cannot run here, or None. Asked once a process; a compiler takes the answer as constant."""
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
