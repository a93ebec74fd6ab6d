"""The tasks by name."""

from .adding import Adding
from .base import Batch, GeneratedTask, ImageTask, Splits, Task
from .digits import Digits
from .frequency import Frequency
from .mnist import MNIST

TASKS: dict[str, type[Task]] = {"adding": Adding, "digits": Digits, "frequency": Frequency, "mnist": MNIST}

__all__ = ["MNIST", "TASKS", "Adding", "Batch", "Digits", "Frequency", "GeneratedTask", "ImageTask", "Splits", "Task"]
