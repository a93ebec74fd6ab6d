"""Training: SkipRNNTrainer, its callbacks, its checkpoints, and truncated backpropagation in chunks."""

from .trainer import SkipRNNTrainer

__all__ = ["SkipRNNTrainer"]
