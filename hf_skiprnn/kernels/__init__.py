"""Fast scans with the signature of `scan_skip_rnn`, and the choice among them. Nothing is built or loaded at import."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging

from hf_skiprnn.model.outputs_skip_rnn import ScanOutput

logger = logging.get_logger(__name__)


# "auto" takes the native engine on the CPU but for so few steps of so many weights, which every call packs anew: there
# plain PyTorch is up to twice as fast in inference and four times in training. Measured on one Zen 5 core with LSTMs of
# 0.06 to 8.4 million weights, T 1 to 16, B 1 and 16: with fewer weights the engine wins at every length.
MANY_WEIGHTS = 1 << 20
FEW_READS = 3  # inference: rows times steps
FEW_STEPS = 8  # training: steps


def select(backend: str, inputs: Tensor, weights: int) -> Callable[..., ScanOutput] | None:
    """The fast scan for these inputs; None where "auto" finds plain PyTorch best.

    Args:
        backend: "auto", "cpu" or "triton".
        inputs: [B, T, I], or [B, T] tokens.
        weights: how many numbers the layers' matrices hold.

    Raises:
        RuntimeError: a named engine cannot run these inputs here; the message says why and what to do.
    """
    device = inputs.device.type
    if backend == "cpu" and device != "cpu":
        raise RuntimeError(f"Scan backend 'cpu' needs inputs on the CPU; they are on {inputs.device}. Use 'events'.")
    if backend == "triton" and device != "cuda":
        raise RuntimeError(
            f"Scan backend 'triton' needs inputs on a CUDA GPU; they are on {inputs.device}. Use 'events' or 'auto'."
        )
    if device == "cuda":
        return _select_on_gpu(backend, inputs)
    return _select_on_cpu(backend, inputs, weights) if device == "cpu" else None


def _select_on_gpu(backend: str, inputs: Tensor) -> Callable[..., ScanOutput] | None:
    reason = _triton_missing(inputs.device.index or 0)
    if reason is None:
        from hf_skiprnn.kernels.triton.trust import auto_scan, named_scan

        return named_scan if backend == "triton" else auto_scan
    if backend == "triton":
        raise RuntimeError(reason)
    return None


def _select_on_cpu(backend: str, inputs: Tensor, weights: int) -> Callable[..., ScanOutput] | None:
    if backend == "auto" and weights > MANY_WEIGHTS and _is_short(inputs):
        return None
    reason = _cpu_engine_missing()
    if reason is None:
        from hf_skiprnn.kernels.cpu.operators import cpu_scan

        return cpu_scan
    if backend == "cpu":
        raise RuntimeError(reason)
    return None


def _is_short(inputs: Tensor) -> bool:
    """Too short for the packing of many weights to pay; a call under autograd counts as training."""
    batch, steps = inputs.shape[:2]
    return steps < FEW_STEPS if torch.is_grad_enabled() else batch * steps < FEW_READS


def of_tokens(scan: Callable[..., ScanOutput]) -> Callable[..., ScanOutput] | None:
    """The form of a scan from `select` that takes tokens [B, T] and a table [V, I], and looks up what is read.

    None for a scan that has no such form.
    """
    from hf_skiprnn.kernels.cpu.operators import cpu_scan, cpu_scan_tokens

    return cpu_scan_tokens if scan is cpu_scan else None


# Looked up while a model is traced, not traced itself.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_missing(device: int) -> str | None:
    """Why the Triton engine cannot run on that CUDA device, or None."""
    return _look_for_triton(device)


@functools.cache
def _look_for_triton(device: int) -> str | None:
    """`_triton_missing`, said once."""
    from hf_skiprnn.kernels.triton.operators import unavailable_reason

    reason = unavailable_reason(device)
    if reason is None:
        logger.info("Scans on CUDA device %d run in Triton kernels.", device)
    else:
        logger.warning("Scans on CUDA device %d run in plain PyTorch ('events'), more slowly. %s", device, reason)
    return reason


# Looked up while a model is traced, not traced itself.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cpu_engine_missing() -> str | None:
    """Why the native CPU engine cannot run, or None."""
    return _look_for_cpu_engine()


@functools.cache
def _look_for_cpu_engine() -> str | None:
    """`_cpu_engine_missing`, said once."""
    from hf_skiprnn.kernels.cpu.operators import unavailable_reason

    reason = unavailable_reason()
    if reason is None:
        logger.info("Scans on the CPU run in the native engine.")
    else:
        logger.warning("Scans on the CPU run in plain PyTorch ('events'), several times slower. %s", reason)
    return reason
