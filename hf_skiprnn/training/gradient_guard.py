"""Gradients that have exploded: made fit for clipping, or the update left out.

Through many updates a gradient may exceed 1e19, where its squares overflow: the norm is infinite, clipping divides all
of it by infinity, and nothing is learned until the weights happen to change. So what is that large is scaled down
before the norm is taken; its direction stays.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

LARGEST = 1e12  # of an element; clipping follows, and squares of a billion such elements can be summed in float32
SKIPS = 10  # updates in succession without a finite gradient, after which training stops


class GradientGuard:
    """Looks at gradients after the backward pass and before they are clipped."""

    def __init__(self) -> None:
        self.skipped = 0  # in succession

    def apply(self, parameters: Iterable[nn.Parameter], step: int, largest: float) -> None:
        """Scale gradients down whose largest element is above 1e12; drop them where it is not finite.

        An optimizer leaves parameters alone that have no gradient, and their moments too.

        Args:
            parameters: of the model.
            step: number of the update, for messages.
            largest: magnitude over all parameters and processes, as `largest_element` finds it.

        Raises:
            FloatingPointError: it was not finite ten times in succession.
        """
        if largest <= LARGEST:
            self.skipped = 0
            return
        if largest < float("inf"):
            self.skipped = 0
            torch._foreach_mul_(
                [parameter.grad for parameter in parameters if parameter.grad is not None], LARGEST / largest
            )
            return
        self.skipped += 1
        if self.skipped >= SKIPS:
            raise FloatingPointError(
                f"The gradient was not finite in {SKIPS} steps in succession, up to step {step}; nothing was updated "
                "by them. Lower the learning rate, or begin with fewer updates (a lower update_bias)."
            )
        logger.warning("The gradient at step %d is not finite: this update is left out.", step)
        for parameter in parameters:
            parameter.grad = None


def largest_element(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Largest magnitude in the gradients of this process, a scalar: NaN where there is one, 0 where there are none."""
    held = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in held]
    parts = [shard.abs().max().to(device) for shard in shards if shard.numel()]
    nothing = torch.zeros((), device=device, dtype=held[0].dtype if held else None)
    return torch.stack([nothing, *parts]).max()
