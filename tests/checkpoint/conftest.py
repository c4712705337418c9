"""Saved tiny models, made once, and one thread for them."""

from models import folders, one_thread

__all__ = ["folders", "one_thread"]
