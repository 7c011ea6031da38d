"""The public functions of flash-attn, computed by pyattn: on the CPU too, in every dtype and head dim that it has.

    from pyattn.integrations.flash_attn import flash_attn_func         # version 2
    from pyattn.integrations.flash_attn.v3 import flash_attn_func      # version 3
    from pyattn.integrations.flash_attn.cute import flash_attn_func    # version 4

or, for code that is not one's own, ``install()`` and then ``import flash_attn``. The softmax lse of a row without keys
is -inf in all versions, and outputs of such rows are 0.
"""

from __future__ import annotations

import sys

from pyattn.integrations.flash_attn import bert_padding, cute, flash_attn_interface, layers, v3
from pyattn.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from pyattn.integrations.flash_attn.layers import rotary

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
__version__ = "2.8.4"  # whose functions these are

_MODULES = {
    "flash_attn": sys.modules[__name__],
    "flash_attn.flash_attn_interface": flash_attn_interface,
    "flash_attn.bert_padding": bert_padding,
    "flash_attn.layers": layers,
    "flash_attn.layers.rotary": rotary,
    "flash_attn.cute": cute,
    "flash_attn.cute.interface": cute,
    "flash_attn_interface": v3,
}
_replaced: dict[str, object] = {}


def install() -> None:
    """Makes ``import flash_attn`` (and ``flash_attn_interface``, version 3) import this, for the whole process.

    Modules that have imported flash-attn before keep what they have.

    Example:
        >>> from pyattn.integrations import flash_attn
        >>> flash_attn.install()
        >>> from flash_attn.bert_padding import unpad_input
        >>> unpad_input.__module__
        'pyattn.integrations.flash_attn.bert_padding'
        >>> flash_attn.uninstall()
    """
    for name, module in _MODULES.items():
        before = sys.modules.get(name)
        if before is not module:
            _replaced[name] = before
            sys.modules[name] = module


def uninstall() -> None:
    """Takes back ``install``: what was imported before is there again."""
    for name in list(_replaced):
        before = _replaced.pop(name)
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before  # type: ignore[assignment]
