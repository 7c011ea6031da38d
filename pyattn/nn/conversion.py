"""Models of ``torch.nn.MultiheadAttention`` turned into models of ``pyattn.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyattn.nn import implementations
from pyattn.nn.implementations import Implementation
from pyattn.nn.multihead import MultiheadAttention


class Conversion(NamedTuple):
    """What ``convert`` did. Print it.

    Attributes:
        converted: names of the modules that were swapped, as ``named_modules`` gives them; "" is the model itself.
        skipped: why not, by the names of the modules that were not.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} not"]
        lines += [f"  {name or '(the model itself)'}: converted" for name in self.converted]
        lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _why_not(module: nn.Module) -> str | None:
    """Why a module that is, or was, a ``torch.nn.MultiheadAttention`` stays what it is."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript: convert the model before it is scripted"
    if kind is not nn.MultiheadAttention:
        return f"its class is {kind.__module__}.{kind.__qualname__}, which may compute something else"
    if "forward" in vars(module):
        return "its forward has been replaced"
    weight = getattr(module.out_proj, "weight", None)
    if not isinstance(weight, Tensor):
        return f"its out_proj is a {type(module.out_proj).__name__}, whose weight is no tensor"
    return None


def _is_multihead(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) == nn.MultiheadAttention.__name__
    return isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention)


def convert(model: nn.Module, *, attention: Implementation = "pyattn") -> Conversion:
    """Turns every ``torch.nn.MultiheadAttention`` of a model into a ``pyattn.nn.MultiheadAttention``, in place.

    Modules stay the same objects with the same parameters, buffers, hooks and state dict: only their class changes, the
    model's own too if it is one. ``torch.nn.TransformerEncoder`` is told to make no nested tensors for them.
    Subclasses of ``torch.nn.MultiheadAttention``, quantizable ones among them, are left alone.

    Args:
        model: any module.
        attention: as of ``pyattn.nn.MultiheadAttention``.

    Returns:
        A ``Conversion``, which says what was swapped, and what was not and why.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``attention`` is none of the names.

    Example:
        >>> import torch, pyattn
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> print(pyattn.nn.convert(layer))
        1 converted, 0 not
          self_attn: converted
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    implementations.check(attention)
    converted, skipped = [], {}
    for name, module in model.named_modules():
        if not _is_multihead(module):
            continue
        if (reason := _why_not(module)) is not None:
            skipped[name] = reason
            continue
        module.__class__ = MultiheadAttention
        module.adopt(attention)
        converted.append(name)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, MultiheadAttention) for part in module.modules()
        ):
            module.use_nested_tensor = False
    return Conversion(tuple(converted), skipped)
