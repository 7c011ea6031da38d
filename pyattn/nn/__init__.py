"""The modules people import: attention in place of torch's, attention of decoders, rotary positions, norms."""

from pyattn.nn.conversion import Conversion, convert
from pyattn.nn.cross import CrossAttention
from pyattn.nn.grouped import GroupedQueryAttention
from pyattn.nn.multihead import MultiheadAttention
from pyattn.nn.norm import RMSNorm
from pyattn.nn.prepacking import prepack, unpack
from pyattn.nn.rotary import RotaryEmbedding

__all__ = [
    "Conversion",
    "CrossAttention",
    "GroupedQueryAttention",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "convert",
    "prepack",
    "unpack",
]
