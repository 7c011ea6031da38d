"""Attention of one sequence over another, such as a decoder's over what an encoder made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyattn import checks, functional
from pyattn.kv_cache import Ints
from pyattn.nn import implementations, masks
from pyattn.nn.implementations import Implementation
from pyattn.nn.prepacking import Prepackable
from pyattn.nn.weights import attention_weights

Memory = tuple[Tensor, Tensor]  # keys and values, each [B, H, S, D]


class CrossAttention(Prepackable):
    """Multi-head attention whose keys and values come from a memory, once for all steps of a decoder.

    Vaswani et al. 2017, arXiv:1706.03762. ``project`` makes keys and values, ``forward`` attends over them. Parameters:
    ``q_proj.weight`` ``[E, E]``, ``kv_proj.weight`` ``[2 * E, M]``, rows of k and v in this order, ``out_proj.weight``
    ``[E, E]``, and with ``bias`` theirs.

    Args:
        embed_dim: E, of input and output.
        num_heads: H, a divisor of E.
        memory_dim: M, features of the memory; None for E.
        bias: of the projections.
        dropout: probability of dropping a weight, in training.
        attention: "pyattn" for the fused kernels; "naive" for F.linear, matmul and softmax, where a token that sees
            none gives NaN; "torch" for F.linear and torch's scaled_dot_product_attention.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch, pyattn
        >>> module = pyattn.nn.CrossAttention(64, 4, memory_dim=32)
        >>> memory = module.project(torch.randn(2, 50, 32))
        >>> module(torch.randn(2, 7, 64), memory, lengths=[50, 30]).shape
        torch.Size([2, 7, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        memory_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        attention: Implementation = "pyattn",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        memory_dim = embed_dim if memory_dim is None else memory_dim
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("memory_dim", memory_dim)):
            if checks.check_int(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}")
        checks.check_bool("bias", bias)
        if not 0 <= checks.check_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.attention = implementations.check(attention)
        self.embed_dim, self.num_heads, self.memory_dim, self.dropout = embed_dim, num_heads, memory_dim, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.kv_proj = nn.Linear(memory_dim, 2 * embed_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)

    def _weights_to_pack(self) -> tuple[str, ...]:
        return "q_proj.weight", "kv_proj.weight", "out_proj.weight"

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, memory_dim={self.memory_dim}, attention={self.attention!r}"

    def _heads(self, name: str, x: Tensor, num_heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        part = getattr(self, name)
        implementations.check_linear(**{name: part, "out_proj": self.out_proj})
        packed = self._packed(f"{name}.weight", x)
        return implementations.project(self.attention, x, part.weight, part.bias, num_heads, packed=packed)

    def project(self, memory: Tensor) -> Memory:
        """Keys and values of a memory.

        Args:
            memory: ``[B, S, M]``, of the parameters' dtype.

        Returns:
            ``(key, value)``, each ``[B, H, S, E / H]``.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        checks.check_tensor("memory", memory, checks.FLOAT_DTYPES)
        if memory.dim() != 3 or memory.shape[-1] != self.memory_dim:
            raise ValueError(f"memory must have shape [B, S, M] with M = {self.memory_dim}, got {list(memory.shape)}")
        _, key, value = self._heads("kv_proj", memory, (0, self.num_heads, self.num_heads))
        return key, value

    def _queries(self, x: Tensor, memory: Memory) -> Tensor:
        """``[B, H, n * L, D]``: the n samples of one memory are queries of one sample, which read its keys once."""
        checks.check_tensor("x", x, checks.FLOAT_DTYPES)
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have shape [N, L, E] with E = {self.embed_dim}, got {list(x.shape)}")
        if not isinstance(memory, tuple) or len(memory) != 2 or not all(isinstance(part, Tensor) for part in memory):
            raise TypeError(f"memory must be the pair that project returns, got {type(memory).__name__}")
        B = memory[0].shape[0]
        if B == 0 or x.shape[0] % B:
            raise ValueError(f"x must have a multiple of the memory's {B} samples, got {x.shape[0]}")
        together = x.reshape(B, x.shape[0] // B * x.shape[1], self.embed_dim)
        return self._heads("q_proj", together, (self.num_heads, 0, 0))[0]

    def forward(
        self,
        x: Tensor,
        memory: Memory,
        *,
        lengths: Ints | None = None,
        attn_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token over the memory of its sample.

        Args:
            x: ``[N, L, E]``, where N is a multiple of the memory's B: samples n, n + 1, ... of one memory follow each
                other, as the hypotheses of a beam search do.
            memory: of ``project``.
            lengths: how many of the S tokens of each memory are seen, the first ones: a list, or int32 or int64
                ``[B]``; None for all.
            attn_mask: as of ``pyattn.attention``, broadcastable to ``[B, H, N / B * L, S]``.
            residual: ``[N, L, E]``, added to the output.

        Returns:
            ``[N, L, E]`` in the dtype of x.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        q = self._queries(x, memory)
        dropout_p = float(self.dropout) if self.training else 0.0
        seen = masks.live_keys(lengths, memory[0].transpose(1, 2))
        out = implementations.attend(self.attention, q, *memory, attn_mask=attn_mask, dropout_p=dropout_p, **seen)
        weight, bias, packed = self.out_proj.weight, self.out_proj.bias, self._packed("out_proj.weight", x)
        if residual is not None:
            checks.check_shape("residual", residual, tuple(x.shape), "[N, L, E]")
            residual = residual.reshape(out.shape[0], out.shape[2], self.embed_dim)
        return implementations.output(self.attention, out, weight, bias, residual, packed).view(x.shape)

    def weights(self, x: Tensor, memory: Memory, *, lengths: Ints | None = None) -> Tensor:
        """The weights of ``forward`` without dropout, averaged over heads: who looked at what.

        Args:
            x: as of ``forward``.
            memory: as of ``forward``.
            lengths: as of ``forward``.

        Returns:
            ``[N, L, S]``.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        seen = masks.live_keys(lengths, memory[0].transpose(1, 2))
        spec, t = functional.dense(self._queries(x, memory), *memory, **seen)
        return attention_weights(spec, t, True, x.dtype).view(*x.shape[:2], -1)
