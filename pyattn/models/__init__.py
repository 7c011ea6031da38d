"""Models whose attention can be chosen by name."""

from pyattn.models.gpt import GPT

__all__ = ["GPT"]
