"""Handle exploded gradients: scale them down so that clipping works, or skip the optimizer update.

Backpropagation through many updates can make an element of a gradient exceed 1e19. Its square then overflows in
float32, the norm is infinite, and clipping divides every gradient by infinity, so that nothing is learned. Therefore
such gradients are scaled down before the norm is computed. Their direction does not change.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

LARGEST = 1e12  # largest element that is not scaled: the squares of a billion such elements can be summed in float32
SKIPS = 10  # training stops after so many skipped updates in a row


class GradientGuard:
    """Checks gradients after the backward pass, before they are clipped."""

    def __init__(self) -> None:
        self.skipped = 0  # number of skipped updates in a row

    def apply(self, parameters: Iterable[nn.Parameter], step: int, largest: float) -> None:
        """Scale all gradients down if their largest element exceeds 1e12; delete them if it is not finite.

        An optimizer skips parameters without a gradient, and does not change their moments either.

        Args:
            parameters: the model's parameters.
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
                f"The gradient was not finite in {SKIPS} steps in a row, up to step {step}; these steps changed no "
                "weights. Lower the learning rate, or start with fewer updates (a lower update_bias)."
            )
        logger.warning("The gradient at step %d is not finite: this update is skipped.", step)
        for parameter in parameters:
            parameter.grad = None


def largest_element(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return the largest magnitude in this process's gradients, a scalar on `device`.

    The result is NaN if a gradient holds NaN, and 0 without gradients. The call does not wait for the device.
    """
    held = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in held]
    parts = [torch.linalg.vector_norm(shard, float("inf")).to(device) for shard in shards if shard.numel()]
    nothing = torch.zeros((), device=device, dtype=held[0].dtype if held else None)
    return torch.stack([nothing, *parts]).max()
