"""The tasks by name."""

from .adding import Adding
from .base import Batch, GeneratedTask, ImageTask, Splits, Task
from .charades import Charades
from .digits import Digits
from .frequency import Frequency
from .fsdd import FSDD
from .imdb import IMDB
from .mnist import MNIST
from .own_data import OwnData
from .ucf101 import UCF101

TASKS: dict[str, type[Task]] = {
    "adding": Adding,
    "charades": Charades,
    "digits": Digits,
    "frequency": Frequency,
    "fsdd": FSDD,
    "imdb": IMDB,
    "mnist": MNIST,
    "own_data": OwnData,
    "ucf101": UCF101,
}

__all__ = [
    "FSDD",
    "IMDB",
    "MNIST",
    "TASKS",
    "UCF101",
    "Adding",
    "Batch",
    "Charades",
    "Digits",
    "Frequency",
    "GeneratedTask",
    "ImageTask",
    "OwnData",
    "Splits",
    "Task",
]
