"""Attention over parts of the keys, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyattn import checks
from pyattn.spec import lse_dtype


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(parts).__name__}")
    if not outs:
        raise ValueError("outs must hold at least one part, got none")
    if len(lses) != len(outs):
        raise ValueError(f"lses must hold a part for each of the {len(outs)} outs, got {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        checks.check_tensor(f"outs[{i}]", out, checks.FLOAT_DTYPES if i == 0 else (outs[0].dtype,), outs[0], "outs[0]")
        if out.dim() != 4:
            raise ValueError(f"outs[{i}] must have shape [B, Hq, Lq, Dv], got {list(out.shape)}")
        checks.check_shape(f"outs[{i}]", out, tuple(outs[0].shape), "that of outs[0]")
        checks.check_tensor(f"lses[{i}]", lse, (lse_dtype(out.dtype),), outs[0], "outs[0]")
        checks.check_shape(f"lses[{i}]", lse, tuple(out.shape[:3]), "[B, Hq, Lq]")


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over parts of them, which no key may be in twice.

    ``lse = log(sum_p exp(lse_p))``, ``out = sum_p exp(lse_p - lse) out_p`` (Rabe & Staats 2021, arXiv:2112.05682), in
    float32 (float64 for float64). A part whose lse is -inf, which saw no key, counts nothing, whatever its out holds.
    With sinks, exactly one part must have had them.

    Args:
        outs: of the parts, ``[B, Hq, Lq, Dv]`` each, float32, bfloat16, float16 or float64.
        lses: of the parts, ``[B, Hq, Lq]`` each, float32 (float64 with float64 outs), as ``pyattn.attention`` returns
            them.

    Returns:
        ``(out, lse)`` as of ``pyattn.attention``, in the dtypes of the parts; where no part saw a key 0 and -inf.
        Differentiable in all parts, as often as one likes.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch, pyattn
        >>> q, k, v = torch.randn(2, 8, 10, 64), torch.randn(2, 2, 90, 64), torch.randn(2, 2, 90, 64)
        >>> parts = [pyattn.attention(q, k[:, :, p], v[:, :, p], return_lse=True) for p in (slice(70), slice(70, 90))]
        >>> out, lse = pyattn.merge_attention(*zip(*parts))
        >>> torch.testing.assert_close(out, pyattn.attention(q, k, v))
    """
    _check(outs, lses)
    compute = lse_dtype(outs[0].dtype)
    # The maximum only guards against overflow: it cancels, and so would its gradient.
    largest = torch.stack([lse.detach() for lse in lses]).amax(0)
    largest = torch.where(largest == -torch.inf, 0, largest)
    weights = [torch.exp(lse - largest) for lse in lses]  # [B, Hq, Lq]
    total = sum(weights[1:], weights[0])
    nothing = total == 0
    total = torch.where(nothing, 1, total)
    merged = torch.zeros_like(outs[0], dtype=compute)
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        seen = torch.where((lse == -torch.inf)[..., None], 0, out.to(compute))  # 0 times NaN would be NaN
        merged = merged + (weight / total)[..., None] * seen
    return merged.to(outs[0].dtype), torch.where(nothing, -torch.inf, largest + torch.log(total))
