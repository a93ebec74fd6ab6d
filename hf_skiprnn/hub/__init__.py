"""Model cards, checkpoint folders, and publishing to the Hugging Face Hub."""

from .upload import HubError, publish

__all__ = ["HubError", "publish"]
