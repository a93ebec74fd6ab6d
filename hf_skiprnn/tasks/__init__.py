"""The tasks: data sets and what to predict from them. TASKS maps names to tasks."""

from .adding import Adding
from .base import Batch, GeneratedTask, ImageTask, Splits, Task
from .charades import Charades
from .digits import Digits
from .find_digit import FindDigit
from .frequency import Frequency
from .fsdd import FSDD
from .imdb import IMDB
from .keyword import Keyword
from .mnist import MNIST
from .own_data import OwnData
from .ucf101 import UCF101

TASKS: dict[str, type[Task]] = {
    "adding": Adding,
    "charades": Charades,
    "digits": Digits,
    "find_digit": FindDigit,
    "frequency": Frequency,
    "fsdd": FSDD,
    "imdb": IMDB,
    "keyword": Keyword,
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
    "FindDigit",
    "Frequency",
    "GeneratedTask",
    "ImageTask",
    "Keyword",
    "OwnData",
    "Splits",
    "Task",
]
