"""The task `own_data`: find the input and label columns of any data set of texts, pictures, sounds or series."""

from .task import OwnData

__all__ = ["OwnData"]
