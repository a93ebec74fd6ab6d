"""Training: SkipRNNTrainer, its callbacks, its checkpoints, and truncated backpropagation in chunks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import calibrate, set_update_rate
    from .rate_controller import RateController
    from .trainer import SkipRNNTrainer

__all__ = ["RateController", "SkipRNNTrainer", "calibrate", "set_update_rate"]

MODULES = {
    "RateController": "rate_controller",
    "SkipRNNTrainer": "trainer",
    "calibrate": "calibration",
    "set_update_rate": "calibration",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use: most modules need accelerate, but `provenance` must work without (`make gpu`)."""
    if name in MODULES:
        return getattr(import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
