"""The tasks by name."""

from .adding import Adding
from .base import Batch, GeneratedTask, ImageTask, Splits, Task
from .digits import Digits
from .frequency import Frequency
from .fsdd import FSDD
from .imdb import IMDB
from .mnist import MNIST
from .own_data import OwnData

TASKS: dict[str, type[Task]] = {
    "adding": Adding,
    "digits": Digits,
    "frequency": Frequency,
    "fsdd": FSDD,
    "imdb": IMDB,
    "mnist": MNIST,
    "own_data": OwnData,
}

__all__ = [
    "FSDD",
    "IMDB",
    "MNIST",
    "TASKS",
    "Adding",
    "Batch",
    "Digits",
    "Frequency",
    "GeneratedTask",
    "ImageTask",
    "OwnData",
    "Splits",
    "Task",
]
