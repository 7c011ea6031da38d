"""pyattn: exact attention that never materialises the score matrix, as drop-in PyTorch ops."""

from importlib.metadata import PackageNotFoundError, version

from pyattn.dispatch import SlowPathWarning
from pyattn.functional import (
    attention,
    attention_varlen,
    explain,
    naive_attention,
    scaled_dot_product_attention,
)
from pyattn.log import logging

try:
    __version__ = version("pyattn")
except PackageNotFoundError:  # a clone on sys.path, never installed
    __version__ = "0+unknown"

__all__ = [
    "SlowPathWarning",
    "attention",
    "attention_varlen",
    "explain",
    "logging",
    "naive_attention",
    "scaled_dot_product_attention",
]
