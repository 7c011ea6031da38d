"""The norm of queries and keys."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with the eps of model code: ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Zhang & Sennrich 2019, arXiv:1910.07467. ``GroupedQueryAttention`` gives its weight and eps to the fused projection.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square; torch's own default depends on the dtype.
        elementwise_affine: whether there is a weight, ``[dim]``.
        device: of the weight.
        dtype: of the weight.

    Example:
        >>> import torch, pyattn
        >>> norm = pyattn.nn.RMSNorm(64)
        >>> norm(torch.randn(2, 10, 64)).square().mean(-1).allclose(torch.ones(2, 10), atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, elementwise_affine, device, dtype)
