"""pyattn: exact attention that never materialises the score matrix, as drop-in PyTorch ops."""

from importlib.metadata import PackageNotFoundError, version

from pyattn import flops, nn
from pyattn.decoding import attention_with_kv_cache
from pyattn.dispatch import SlowPathWarning
from pyattn.functional import attention, attention_varlen, explain, naive_attention
from pyattn.integrations import environment
from pyattn.integrations.sdpa import install, installed, uninstall
from pyattn.kv_cache import KVCache
from pyattn.log import logging
from pyattn.merging import merge_attention
from pyattn.projection import Rotary, apply_rotary, explain_projection, output_projection, qkv_projection
from pyattn.sdpa import scaled_dot_product_attention

flops.register()
try:
    __version__ = version("pyattn")
except PackageNotFoundError:  # a clone on sys.path, never installed
    __version__ = "0+unknown"
environment.obey()

__all__ = [
    "KVCache",
    "Rotary",
    "SlowPathWarning",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "explain",
    "explain_projection",
    "install",
    "installed",
    "logging",
    "merge_attention",
    "naive_attention",
    "nn",
    "output_projection",
    "qkv_projection",
    "scaled_dot_product_attention",
    "uninstall",
]
