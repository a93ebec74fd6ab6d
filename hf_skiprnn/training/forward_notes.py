"""Record the updates and budget loss of every Skip RNN inside a model during a forward pass, with forward hooks.

A user's own loss (an overridden `compute_loss` or a `compute_loss_func`) sees only the logits, and a user's own model
that contains a Skip RNN may not return its updates. Forward hooks work in both cases.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_skiprnn.model.inputs_skip_rnn import real_lengths


class ForwardNotes(NamedTuple):
    """Budget losses, updates and lengths, one entry for each forward pass of a Skip RNN; usually there is one."""

    budget_losses: list[Tensor]  # scalars
    updates: list[Tensor]  # [B] each
    lengths: list[Tensor]  # [B] each, real steps
    noise: list[Tensor | None]  # [B] each, the gates' noise

    @property
    def budget_loss(self) -> Tensor:
        """The sum over forward passes; under DataParallel, where each pass has a part of the batch, the mean."""
        devices = {part.device for part in self.budget_losses}
        first = self.budget_losses[0]
        return torch.stack([part.mean().to(first.device) for part in self.budget_losses]).sum() / len(devices)

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return updates, real steps and gate noise of all rows, [B] each; no noise: None."""
        device = self.updates[0].device
        updates, lengths = (torch.cat([part.to(device) for part in parts]) for parts in (self.updates, self.lengths))
        drawn = [part.to(device) for part in self.noise if part is not None]
        return updates.detach(), lengths, torch.cat(drawn) if len(drawn) == len(self.updates) else None


def skip_rnns(model: nn.Module) -> list[Any]:
    """Return the SkipRNNModels in a model, found by class name: remote code of a checkpoint defines its own class."""
    return [module for module in model.modules() if "SkipRNNModel" in {base.__name__ for base in type(module).__mro__}]


@contextmanager
def noted_forwards(model: nn.Module) -> Iterator[ForwardNotes]:
    """Context manager: yield notes that forward hooks fill while the model runs."""
    notes = ForwardNotes([], [], [], [])

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, Mapping):
            notes.budget_losses.append(out["budget_loss"])
            notes.updates.append(out["num_updates"])
            notes.noise.append(out.get("gate_noise"))  # remote code of an older checkpoint has none
            if args:
                names = inspect.signature(module.forward).parameters  # may be more than the positional arguments
                kwargs = dict(zip(names, args, strict=False)) | kwargs
            notes.lengths.append(real_lengths(kwargs))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in skip_rnns(model)]
    try:
        yield notes
    finally:
        for hook in hooks:
            hook.remove()


def depends_on(loss: Tensor, part: Tensor) -> bool | None:
    """Return whether `part` is in the autograd graph of `loss`; None if one of them has no graph."""
    if loss.grad_fn is None or part.grad_fn is None:
        return None
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        if (node := waiting.pop()) is part.grad_fn:
            return True
        following = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= following
        waiting += following
    return False
