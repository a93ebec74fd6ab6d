"""Gradients that have exploded: scale them down so that clipping works, or leave the update out.

Through many updates an element of a gradient may exceed 1e19. Then its square overflows in float32, the norm is
infinite, and clipping divides every gradient by infinity: nothing is learned. So such gradients are scaled down before
the norm is taken; their direction stays.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

LARGEST = 1e12  # of an element: the squares of a billion such elements can still be summed in float32
SKIPS = 10  # updates in a row without a finite gradient, after which training stops


class GradientGuard:
    """Check gradients after the backward pass and before they are clipped."""

    def __init__(self) -> None:
        self.skipped = 0  # updates in a row

    def apply(self, parameters: Iterable[nn.Parameter], step: int, largest: float) -> None:
        """Scale all gradients down if their largest element is above 1e12; delete them if it is not finite.

        An optimizer skips parameters without a gradient, and leaves their moments alone too.

        Args:
            parameters: of the model.
            step: number of the optimizer step, for messages.
            largest: magnitude of the largest element over all parameters and processes; see `largest_element`.

        Raises:
            FloatingPointError: the gradient was not finite ten times in a row.
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
                f"The gradient was not finite in {SKIPS} steps in a row, up to step {step}; nothing was updated by "
                "them. Lower the learning rate, or start with fewer updates (a lower update_bias)."
            )
        logger.warning("The gradient at step %d is not finite: this update is left out.", step)
        for parameter in parameters:
            parameter.grad = None


def largest_element(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return the largest magnitude in this process's gradients, a scalar on `device`.

    NaN if a gradient holds NaN, 0 without gradients. The device is not waited for.
    """
    held = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in held]
    parts = [shard.abs().max().to(device) for shard in shards if shard.numel()]
    nothing = torch.zeros((), device=device, dtype=held[0].dtype if held else None)
    return torch.stack([nothing, *parts]).max()
