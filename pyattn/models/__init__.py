"""Models whose attention can be chosen by name."""

from pyattn.models.gpt import GPT
from pyattn.models.seq2seq import Seq2Seq
from pyattn.models.transformer import Transformer

__all__ = ["GPT", "Seq2Seq", "Transformer"]
