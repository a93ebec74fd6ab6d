"""Any data set of texts, pictures, sounds or series: which columns are the input and the label, and how."""

from .task import OwnData

__all__ = ["OwnData"]
