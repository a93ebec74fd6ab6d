"""Arguments and results of a scan in the form that the operators of the `cpu` and `triton` engines use.

Weights are a flat list, four tensors a layer: W_ih [G*H, I], W_hh [G*H, H], the bias [G*H] and b_hn [H] of a GRU with
the reset gate after the product; the last two are empty where a layer has none. The gate is [weight, bias], or
[weight, bias, shift of each row], or empty. The state is (h, c, increment, steps_since_update).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from hf_skiprnn.model.cells_skip_rnn import CELLS
from hf_skiprnn.model.changed_modules_skip_rnn import storage_gap
from hf_skiprnn.model.dense_scan_skip_rnn import NO_FORWARD_MODE
from hf_skiprnn.model.outputs_skip_rnn import ScanOutput, SkipRNNState

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
ABSENT = (0,)  # the shape of the tensor that stands for "none" in a list of weights; no weight has it
NO_VALUES = (
    " A tensor on 'meta' has no values: it is offloaded, or was never loaded. accelerate's cpu_offload and "
    "dispatch_model bring the weights back if they are given preload_module_classes=['SkipRNNModel']."
)
USE_DENSE = "Use the 'dense' backend: model.set_scan_backend('dense')."


def check_memory(name: str, tensor: Tensor) -> None:
    """Check that a tensor's elements lie in memory of its own, where native code can read them.

    Wrappers (torchao, DTensor) and sparse tensors have no such memory, and a storage can be smaller than the shape says
    (`untyped_storage().resize_(0)`).

    Raises:
        ValueError: they do not; the message names the tensor.
    """
    if type(tensor) not in PLAIN_TYPES or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be a plain dense tensor; got {type(tensor).__name__} of layout {tensor.layout}. "
            "Use the 'events' or 'dense' backend, which compute with torch's operators."
        )
    if not tensor.numel():
        return
    try:
        gap = storage_gap(tensor)
    except NotImplementedError as error:  # many tensors in one, from torch.autograd.grad(is_grads_batched=True)
        raise ValueError(f"{name} is a batch of tensors of a vectorized derivative. {USE_DENSE}") from error
    if gap:
        raise ValueError(f"{name} {gap} (FSDP frees weights outside their module's forward)")


def refuse_transforms(backend: str) -> None:
    """Raise RuntimeError under what an engine cannot follow: transforms of torch.func, forward-mode derivatives."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(NO_FORWARD_MODE)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"The {backend!r} backend does not run under transforms of torch.func (vmap, grad, vjp). {USE_DENSE}"
        )


def check_operands(
    inputs: Tensor,
    weights: Sequence[Tensor],
    gate: Sequence[Tensor],
    state: Sequence[Tensor | None],
    mask: Tensor | None,
    forced: Tensor | None,
    cell: str,
    *,
    kept: torch.dtype,
    ids: Tensor | None = None,
) -> None:
    """Check every shape, dtype and device that an engine relies on.

    Args:
        inputs: [B, T, I], or the table [V, I] that `ids` index.
        weights: four a layer; their dtype is that of inputs.
        gate: the update gate's weight [1, H] and bias [1], then each row's shift [B] if there is one; or nothing.
        state: h [L, B, H], c likewise or None, increment [B] and steps_since_update [B].
        mask: [B, T] bool, or None.
        forced: [B, T] bool, or None.
        cell: its name.
        kept: dtype of the gate and of the state.
        ids: [B, T] int64, or None.

    Raises:
        ValueError: something does not fit; the message says what came and what was expected.
    """
    has_memory = not isinstance(inputs, FakeTensor)  # a tracer asks for shapes alone
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {cell!r}.")
    if inputs.dim() != (3 if ids is None else 2) or inputs.shape[-1] < 1:
        raise ValueError(f"inputs must be [B, T, I] with I >= 1; got {tuple(inputs.shape)}.")
    if not weights or len(weights) % 4 or weights[1].dim() != 2 or weights[1].shape[1] < 1:
        raise ValueError(f"Four weights a layer, H >= 1, are needed; got {[tuple(w.shape) for w in weights]}.")
    if ids is not None and (ids.dim() != 2 or ids.dtype != torch.int64):
        raise ValueError(f"ids must be int64 [B, T]; got {ids.dtype} of shape {tuple(ids.shape)}.")
    (batch, steps), units, layers = (inputs if ids is None else ids).shape[:2], weights[1].shape[1], len(weights) // 4
    outputs, has_c = CELLS[cell].num_gates * units, CELLS[cell].has_cell_state

    def expect(name: str, tensor: Tensor, *shape: int, dtype: torch.dtype = inputs.dtype) -> None:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != inputs.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape} on {inputs.device}; "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}."
                + (NO_VALUES if tensor.is_meta else "")
            )
        if has_memory:
            check_memory(name, tensor)

    if has_memory:
        check_memory("inputs", inputs)
        if ids is not None:
            check_memory("ids", ids)

    for i in range(layers):
        input_weight, recurrent_weight, bias, bias_hh_n = weights[4 * i : 4 * i + 4]
        expect(f"layer {i}: weight_ih", input_weight, outputs, units if i else inputs.shape[-1])
        expect(f"layer {i}: weight_hh", recurrent_weight, outputs, units)
        if bias.shape != ABSENT:
            expect(f"layer {i}: bias", bias, outputs)
        if bias_hh_n.shape != ABSENT:
            expect(f"layer {i}: bias_hh_n", bias_hh_n, units)
            if cell != "gru_reset_after":
                raise ValueError(f"layer {i}: bias_hh_n is only for 'gru_reset_after'; the cell is {cell!r}.")
    if gate:
        expect("the gate's weight", gate[0], 1, units, dtype=kept)
        expect("the gate's bias", gate[1], 1, dtype=kept)
    if len(gate) > 2:
        expect("the gate's shift", gate[2], batch, dtype=kept)
    h, c, increment, steps_since_update = state
    if h is None or increment is None or steps_since_update is None or (c is not None) != has_c:
        raise ValueError(f"The state of a {cell!r} has h{', c' * has_c}, increment, steps_since_update.")
    expect("state.h", h, layers, batch, units, dtype=kept)
    if c is not None:
        expect("state.c", c, layers, batch, units, dtype=kept)
    expect("state.increment", increment, batch, dtype=kept)
    expect("state.steps_since_update", steps_since_update, batch, dtype=kept)
    for name, part in (("mask", mask), ("forced_gates", forced)):
        if part is not None:
            expect(name, part, batch, steps, dtype=torch.bool)


def scan_output(results: Sequence[Tensor], has_c: bool, sequence: bool, learned: bool) -> ScanOutput:
    """Return the scan's output from an operator's first seven results.

    Without a learned gate nothing was chosen, so updates, gates and steps_since_update have no gradient, as in the
    dense scan.
    """
    held, h, c, increment, steps_since_update, num_updates, update_gates = results[:7]
    if not learned:
        steps_since_update, num_updates = steps_since_update.detach(), num_updates.detach()
        update_gates = update_gates.detach()
    last = SkipRNNState(h, c if has_c else None, increment, steps_since_update)
    return ScanOutput(held if sequence else None, last, num_updates, update_gates)


def unpack_saved(
    ctx: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None], Tensor | None, list[Tensor]]:
    """Return inputs, weights, gate, state, mask and records, as they were saved for the backward pass."""
    inputs, *rest = ctx.saved_tensors
    weights, rest = rest[: ctx.num_weights], rest[ctx.num_weights :]
    gate, rest = rest[: ctx.num_gate], rest[ctx.num_gate :]
    return inputs, weights, gate, rest[:4], rest[4], rest[5:]


def cotangents(grads: Sequence[Tensor | None], has_c: bool, sequence: bool) -> list[Tensor | None]:
    """Return the cotangents of an operator's first seven results; None for an empty result."""
    of_sequence, of_h, of_c, *others = grads[:7]
    return [of_sequence if sequence else None, of_h, of_c if has_c else None, *others]


def split_gradients(
    gradients: Sequence[Tensor], state: Sequence[Tensor | None], num_gate: int, grad_inputs: bool
) -> tuple[Any, ...]:
    """Return the gradients of inputs, weights, gate, h, c, increment, steps_since_update, in this order.

    A backward operator returns those of inputs, state, gate and weights; an empty tensor for each that is absent.
    """
    of_state = [None if part is None else grad for part, grad in zip(state, gradients[1:5], strict=True)]
    of_gate, of_weights = gradients[5 : 5 + num_gate], gradients[5 + num_gate :]
    return gradients[0] if grad_inputs else None, of_weights, of_gate, *of_state


def no_second_derivative(backend: str) -> RuntimeError:
    """Return the error of a backward pass through a backward pass."""
    return RuntimeError(
        f"The {backend!r} backend has no second derivative (backward was called with create_graph=True). {USE_DENSE}"
    )
