"""Training: SkipRNNTrainer, its callbacks, its checkpoints, and truncated backpropagation in chunks."""

from .calibration import calibrate, set_update_rate
from .rate_controller import RateController
from .trainer import SkipRNNTrainer

__all__ = ["RateController", "SkipRNNTrainer", "calibrate", "set_update_rate"]
