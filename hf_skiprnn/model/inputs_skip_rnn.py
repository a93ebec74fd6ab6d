"""Checks of what a model is called with: inputs, token ids, masks, gates and states.

Each error says what came, what was expected and what to do. Checks that read values wait for the device; under
torch.compile and torch.func they are left out.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from .cells_skip_rnn import CELLS, state_dtype
from .changed_modules_skip_rnn import PLAIN_TENSORS, storage_gap
from .outputs_skip_rnn import SkipRNNState

if TYPE_CHECKING:
    from .configuration_skip_rnn import SkipRNNConfig
    from .layers_skip_rnn import SkipStack

logger = logging.get_logger(__name__)

# Name of the argument -> its shape, its number of dimensions, its type.
INPUTS = {
    "input_values": ("[B, T, input_size]", 3, "floating point"),
    "input_ids": ("[B, T]", 2, "integers (int32 or int64)"),
    "pixel_values": ("[B, C, H, W], C = input_size", 4, "floating point"),
    "inputs_embeds": ("[B, T, input_size]", 3, "floating point"),
}


def select_input(
    config: "SkipRNNConfig",
    input_values: Tensor | None,
    input_ids: Tensor | None,
    pixel_values: Tensor | None,
    inputs_embeds: Tensor | None = None,
) -> tuple[str, Tensor]:
    """Return the name and value of the one input that was given: numbers [B, T, input_size], or token ids [B, T].

    Images [B, C, H, W] become sequences of T = H*W pixels, row by row. Integers in the first place are token ids where
    the model takes tokens: `model(ids)`. T may be 0.

    Raises:
        ValueError: none or several inputs, or one of a wrong kind, shape or type.
    """
    given = {
        "input_values": input_values,
        "input_ids": input_ids,
        "pixel_values": pixel_values,
        "inputs_embeds": inputs_embeds,
    }
    present = {name: value for name, value in given.items() if value is not None}
    if len(present) != 1:
        names = " and ".join(present) or "none"
        raise ValueError(f"Give exactly one of {', '.join(given)}; got {names}.")
    ((name, inputs),) = present.items()
    if not isinstance(inputs, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(inputs).__name__}. Convert it with torch.as_tensor().")
    is_text = config.vocab_size is not None
    if is_text and name == "input_values" and not inputs.is_floating_point():
        name = "input_ids"
    if name != "inputs_embeds" and (name == "input_ids") != is_text:
        wanted = "input_ids or inputs_embeds" if is_text else "input_values or pixel_values"
        raise ValueError(f"config.vocab_size={config.vocab_size}, so the model takes {wanted}; got {name}.")
    _check_input(name, inputs, config.input_size)
    if name == "pixel_values":
        inputs = inputs.flatten(2).transpose(1, 2)
    return name, inputs.long() if name == "input_ids" and not inputs.numel() else inputs


def check_storage(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a plain tensor's storage is smaller than its shape says."""
    is_plain = type(tensor) in PLAIN_TENSORS and tensor.layout == torch.strided
    if is_plain and can_read_values() and (gap := storage_gap(tensor)):
        raise ValueError(f"{name} {gap}")


def _check_input(name: str, inputs: Tensor, input_size: int) -> None:
    """Raise ValueError if an input is of another shape or type than INPUTS says."""
    legend, dims, kind = INPUTS[name]
    shape = tuple(inputs.shape)
    if inputs.dim() != dims:
        raise ValueError(f"{name} must be {legend}; got {shape}.")
    is_integer = inputs.dtype in (torch.int32, torch.int64)
    is_empty_text = name == "input_ids" and not inputs.numel()  # tokenizers return floating point for empty texts
    if not (is_integer or is_empty_text if name == "input_ids" else inputs.is_floating_point()):
        raise ValueError(f"{name} must be {kind}; got {inputs.dtype}.")
    if not shape[0]:
        raise ValueError(f"{name} must have at least one row; got {shape}.")
    check_storage(name, inputs)
    width = {"input_ids": input_size, "pixel_values": shape[1]}.get(name, shape[-1])
    if width != input_size:
        raise ValueError(f"{name} must be {legend} with {input_size} inputs a step; got {shape}.")


def warn_of_budget() -> None:
    """Warn once that no budget is in a loss that is computed outside of the model."""
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "A training step has no labels, so the model computes no loss. If a loss is computed elsewhere (as with "
            "compute_loss_func or label_smoothing_factor of a plain Trainer), add out.budget_loss to it: without the "
            "budget, the gate does not learn to skip. SkipRNNTrainer adds it."
        )


def can_read_values() -> bool:
    """Return whether code may depend on values: not under torch.compile, nor under torch.func (vmap, grad)."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a token id [B, T] is not in [0, vocab_size)."""
    if can_read_values() and bool(((input_ids < 0) | (input_ids >= vocab_size)).any()):
        low, high = int(input_ids.min()), int(input_ids.max())
        raise ValueError(f"input_ids must be in [0, vocab_size = {vocab_size}); got values from {low} to {high}.")


def warn_of_padding(input_ids: Tensor, pad_token_id: int | None) -> None:
    """Warn if rows of tokens [B, T] begin or end with padding; call it where there is no attention_mask.

    transformers' own warning reads fields that only the config of a generating model has.
    """
    if pad_token_id is None or torch.compiler.is_compiling() or not input_ids.numel():
        return
    if can_read_values() and bool((input_ids[:, [0, -1]] == pad_token_id).any()):
        logger.warning_once(
            f"input_ids begin or end with pad_token_id = {pad_token_id}, and there is no attention_mask: padding is "
            "read like any token. Pass the tokenizer's attention_mask."
        )


def check_flags(name: str, flags: Tensor | None, batch: int, steps: int) -> Tensor | None:
    """Return a mask or gates as [B, T] bool; None stays None.

    Raises:
        ValueError: another shape, or values other than 0 and 1.
    """
    if flags is None:
        return None
    if flags.shape != (batch, steps):
        hint = " Flatten the image's mask row by row." if flags.dim() > 2 else ""
        raise ValueError(f"{name} must be [B, T] = {(batch, steps)}; got {tuple(flags.shape)}.{hint}")
    check_storage(name, flags)
    if flags.dtype == torch.bool:
        return flags
    if can_read_values() and bool(((flags != 0) & (flags != 1)).any()):
        raise ValueError(f"{name} must hold 0 and 1; got values from {flags.min().item()} to {flags.max().item()}.")
    return flags != 0


def check_finite(inputs: Tensor, mask: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ValueError if a real step of inputs [B, T, I] is NaN or infinite in `dtype`, the weights' precision."""
    wrong = ~inputs.to(dtype).isfinite()
    if mask is not None:
        wrong = wrong & mask.unsqueeze(-1)
    if bool(wrong.any()):
        row, step, column = wrong.nonzero()[0].tolist()
        value = inputs[row, step, column].item()
        shown = f"{value}" if not math.isfinite(value) else f"inf ({value:g} in {str(dtype).split('.')[1]})"
        raise ValueError(
            f"Input holds {shown} at row {row}, step {step}, column {column} "
            f"({int(wrong.sum())} such values in all). Clean the data, or mask the step with attention_mask."
        )


def check_state(stack: "SkipStack", state: SkipRNNState, batch: int) -> SkipRNNState:
    """Return the state in the scan's precision.

    Raises:
        ValueError: a part is missing or has another shape than this stack's states of `batch` rows.
    """
    shape = (len(stack.layers), batch, stack.hidden_size)
    wanted = {"h": shape, "increment": (batch,), "steps_since_update": (batch,)}
    if CELLS[stack.cell].has_cell_state:
        wanted["c"] = shape
    got = {name: tuple(part.shape) for name, part in state._asdict().items() if part is not None}
    if got != wanted:
        raise ValueError(f"state must have shapes {wanted}; got {got}. Pass the state that this model returned.")
    dtype = state_dtype(stack.current_weight())
    return state.map(lambda part: part.to(dtype))


def real_lengths(inputs: Mapping[str, Tensor]) -> Tensor:
    """Count the real steps of each row of a batch of model inputs.

    Without `attention_mask` every step is real: T steps in `input_values` [B, T, I], `inputs_embeds` [B, T, I] or
    `input_ids` [B, T], and H * W in `pixel_values` [B, C, H, W].

    Returns:
        [B] integer, on the device of the inputs.

    Raises:
        ValueError: the batch has none of these inputs.
    """
    mask = inputs.get("attention_mask")
    if mask is not None:
        return (mask != 0).sum(dim=1)
    for name in ("input_values", "inputs_embeds", "input_ids", "pixel_values"):
        if (value := inputs.get(name)) is not None:
            steps = value.shape[2] * value.shape[3] if name == "pixel_values" else value.shape[1]
            return torch.full((value.shape[0],), steps, dtype=torch.long, device=value.device)
    raise ValueError(f"A batch needs input_values, input_ids or pixel_values; got {sorted(inputs)}.")
