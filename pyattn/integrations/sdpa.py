"""pyattn in the place of torch's ``scaled_dot_product_attention``, for the whole process.

To torch's dispatcher that function is one that is composed of others, on every device and for gradients too. So one
kernel in the place of that composition takes over all calls, eager, compiled, scripted or from C++.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyattn import sdpa

_OP = "aten::scaled_dot_product_attention"
# Where the composition is registered, and where a call finds it: as it is, and under vmap.
_KEYS = {"CompositeImplicitAutograd": "CPU", "FuncTorchVmapMode": "FuncTorchVmapMode"}
_DEVICES = ("cpu", "cuda")


class _Installation:
    """What ``install`` has changed. ``torch.nn.attention`` takes it for the handle of an implementation."""

    def __init__(self) -> None:
        torchs = {key: torch.library.get_kernel(_OP, found) for key, found in _KEYS.items()}
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
            for key, kernel in torchs.items():
                self._library.impl(_OP, _kernel(kernel), key, with_keyset=True)
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # modules would compute attention by themselves in evaluation
        self._tag = torch.compiler.config.cache_key_tag
        torch.compiler.config.cache_key_tag = f"{self._tag}+pyattn"  # or graphs compiled before would be found again

    def remove(self) -> None:
        global _installation
        if _installation is self:
            self._library._destroy()
            torch.backends.mha.set_fastpath_enabled(self._fastpath)
            torch.compiler.config.cache_key_tag = self._tag
            _installation = None


_installation: _Installation | None = None
if hasattr(torch.nn.attention, "register_flash_attention_impl"):  # torch 2.11
    torch.nn.attention.register_flash_attention_impl("pyattn", register_fn=lambda: install())


def _kernel(torchs: Any) -> Any:
    def scaled_dot_product_attention(
        keys: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if _left_to_torch(query, key, value):
            return torchs.call_boxed(keys, query, key, value, *args, **kwargs)
        return sdpa.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    return scaled_dot_product_attention


def _left_to_torch(*tensors: Tensor) -> bool:
    """Other devices, tensors made of tensors, such as DTensor, and what ``sdpa_kernel`` asks of other kernels."""
    return not torch.backends.cuda.flash_sdp_enabled() or any(
        x.device.type not in _DEVICES or x.is_nested or is_traceable_wrapper_subclass(x) for x in tensors
    )


def install() -> _Installation:
    """Puts pyattn in the place of ``torch.nn.functional.scaled_dot_product_attention``, for the whole process.

    Whatever calls it, such as ``nn.MultiheadAttention``, ``nn.Transformer``, timm or diffusers, runs on pyattn, on the
    CPU and on CUDA, forward and backward, in eager mode and in what ``torch.compile`` compiles from now on. Installed
    twice is installed once. ``torch.nn.attention.activate_flash_attention_impl("pyattn")`` does the same.

    pyattn stands for flash attention: under ``torch.nn.attention.sdpa_kernel`` without ``SDPBackend.FLASH_ATTENTION``
    torch computes, with the kernels that it names. It does so too for other devices and for tensors made of tensors
    (nested ones, DTensor).

    Example:
        >>> import torch, pyattn
        >>> q = torch.randn(1, 2, 100, 64)
        >>> torchs = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> handle = pyattn.install()
        >>> ours = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> pyattn.uninstall()
        >>> torch.testing.assert_close(ours, torchs)
    """
    global _installation
    if _installation is None:
        _installation = _Installation()
    return _installation


def is_installed() -> bool:
    return _installation is not None


def uninstall() -> None:
    """Takes back ``install``: what was there before is there again. Does nothing if pyattn is not installed."""
    if _installation is not None:
        _installation.remove()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """``install`` for the length of a ``with`` block; after it pyattn is installed if it was before.

    Example:
        >>> import torch, pyattn
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> with pyattn.installed(), pyattn.logging():
        ...     out = layer(torch.randn(2, 10, 64))
    """
    before = _installation
    install()
    try:
        yield
    finally:
        if before is None:
            uninstall()
