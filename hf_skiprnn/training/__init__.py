"""Training: SkipRNNTrainer, its callbacks, its checkpoints, and truncated backpropagation in chunks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import SkipRNNTrainer

__all__ = ["SkipRNNTrainer"]


def __getattr__(name: str) -> Any:
    """Import the trainer when it is asked for: it needs accelerate, its neighbours do not."""
    if name == "SkipRNNTrainer":
        from .trainer import SkipRNNTrainer

        return SkipRNNTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
