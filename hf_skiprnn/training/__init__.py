"""Training: the Trainer with a budget, its callbacks, and checkpoints that survive a kill."""

from .trainer import SkipRNNTrainer

__all__ = ["SkipRNNTrainer"]
