"""Any data set of texts, images, sounds or series: its columns of inputs and targets."""

from .task import OwnData

__all__ = ["OwnData"]
