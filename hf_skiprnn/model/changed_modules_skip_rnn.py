"""Detect modules that other tools changed (hooks, wrappers, adapters, parametrisations), and get their current weights.

A scan reads the weights of its modules and does not call them. This is fast, and correct for the modules that this
package makes. But peft, pruning, offloading, FSDP, quantisation and interpretation tools put hooks on a module, wrap it
or replace it. Only a call then shows what the module computes.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

# Tensors of other classes (quantised, sharded) need not have memory of their own.
PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module has exactly this class, no hooks, and the `forward` of its class.

    A parametrised or sharded module has another class; accelerate replaces `forward` of the instance. Profilers and
    FLOP counters hook all modules at once.
    """
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def storage_gap(tensor: Tensor) -> str:
    """Return what is wrong if a tensor's storage is smaller than its shape says, else "".

    torch's own operators read beyond such a storage. It comes from `untyped_storage().resize_()`.
    """
    last = tensor.numel() - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    held = tensor.untyped_storage().nbytes()
    if held >= needed:
        return ""
    shape = tuple(tensor.shape)
    return (
        f"of shape {shape} needs {needed} bytes; its storage holds {held}. Something has freed or shrunk the storage."
    )


def is_table(embeddings: nn.Module) -> bool:
    """Whether embeddings are the rows of a plain tensor: those of an nn.Embedding that no tool has changed."""
    is_unchanged = is_plain(embeddings, nn.Embedding) and embeddings.max_norm is None
    return is_unchanged and type(embeddings._parameters.get("weight")) in PLAIN_TENSORS  # quicker than the attribute


def linear_map(
    name: str, module: nn.Module, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Call a module that computes weight @ x + bias, and return the weight [1, width] and bias [1].

    The bias is the output for zeros. A column of the weight is the output for a unit vector minus the bias. Both have
    gradients, so adapters inside the module are trained. Dropout inside uses one mask for all rows and steps.

    Args:
        name: name of the module, for the message.
        module: maps [N, width] to [N, 1].
        width: number of inputs.
        device: device of the inputs.
        dtype: dtype of the results, float32 or float64.

    Raises:
        ValueError: the module returns another shape, or is not linear, which is tested with one more input.
    """
    inner = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
    probe = torch.arange(1, width + 1, device=device, dtype=dtype).sin().unsqueeze(0)
    zero_and_units = torch.eye(width + 1, width, device=device, dtype=dtype).roll(1, 0)
    out = module(torch.cat((zero_and_units, probe)).to(inner))
    if not isinstance(out, Tensor) or out.shape != (width + 2, 1):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} is now a {type(module).__name__}, which returns {got} for [{width + 2}, {width}]. "
            f"It must return [N, 1] for [N, {width}], as nn.Linear({width}, 1) does."
        )
    values = out.to(dtype).squeeze(1)
    bias, weight = values[:1], (values[1:-1] - values[0]).unsqueeze(0)
    if not torch.compiler.is_compiling() and not _drops(module):
        _check_linear(name, module, values[-1], weight, bias, probe, 1e-3 if inner.itemsize > 2 else 3e-2)
    return weight, bias


def _drops(module: nn.Module) -> bool:
    """Return whether dropout is active in the module: then two inputs in one call get different masks."""
    return any(isinstance(part, _DropoutNd) and part.training and part.p for part in module.modules())


@torch.no_grad()
def _check_linear(
    name: str, module: nn.Module, got: Tensor, weight: Tensor, bias: Tensor, probe: Tensor, tolerance: float
) -> None:
    """Raise ValueError if the module's output for the probe is not weight @ probe + bias."""
    scale = (weight * probe).abs().sum() + bias.abs().sum()
    wanted = (weight * probe).sum() + bias
    if bool((got - wanted).abs() > tolerance * scale):  # a NaN passes, and shows in the logits
        raise ValueError(
            f"{name} is now a {type(module).__name__} that is not linear: a scan takes its weight and bias from a few "
            "calls. Replace it by linear modules, or leave it out of what is adapted (peft: exclude_modules)."
        )
