"""Models whose attention can be chosen by name."""

from pyattn.models.gpt import GPT
from pyattn.models.seq2seq import Seq2Seq

__all__ = ["GPT", "Seq2Seq"]
