"""Self-attention of decoder blocks: grouped heads, rotary positions, norms of queries and keys, windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyattn import checks, functional
from pyattn.functional import Window
from pyattn.kv_cache import Ints, KVCache
from pyattn.nn import implementations, masks
from pyattn.nn.implementations import Implementation
from pyattn.nn.norm import RMSNorm
from pyattn.nn.prepacking import Prepackable
from pyattn.nn.rotary import RotaryEmbedding
from pyattn.nn.weights import attention_weights


class GroupedQueryAttention(Prepackable):
    """Self-attention whose query heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245).

    Three ops: ``pyattn.qkv_projection`` with norms and rotary, ``pyattn.attention``, ``pyattn.output_projection``.
    Parameters: ``qkv_proj.weight`` ``[(Hq + 2 Hkv) * D, E]``, rows of q, k, v in this order, ``out_proj.weight``
    ``[E, Hq * D]``, with ``bias`` those of both, with ``qk_norm`` ``q_norm.weight`` and ``k_norm.weight`` ``[D]``.

    Args:
        embed_dim: E, of input and output.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq; None for Hq.
        head_dim: D; None for ``E / Hq``.
        bias: of both projections.
        rotary: turns queries and keys by their positions; None for none. May be shared between modules.
        qk_norm: RMSNorm of each head of q and of k, before rotary.
        eps: of these norms.
        is_causal: whether a token sees only itself and those before it.
        window: ``(left, right)`` of ``pyattn.attention``: how many tokens before and after itself a token sees.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for none.
        scale: of the scores; None for ``1 / sqrt(D)``.
        dropout: probability of dropping a weight, in training.
        attention: "pyattn" for the fused kernels; "naive" for F.linear, eager norm and rotary, matmul and softmax,
            where a token that sees none gives NaN; "torch" for the same around torch's scaled_dot_product_attention.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: a softcap with ``attention="torch"``.

    Example:
        >>> import torch, pyattn
        >>> rotary = pyattn.nn.RotaryEmbedding(32, max_positions=1000)
        >>> module = pyattn.nn.GroupedQueryAttention(256, 8, 2, rotary=rotary, qk_norm=True, window=(127, 0))
        >>> x = torch.randn(2, 100, 256)
        >>> module(x, residual=x).shape
        torch.Size([2, 100, 256])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        rotary: RotaryEmbedding | None = None,
        qk_norm: bool = False,
        eps: float = 1e-6,
        is_causal: bool = True,
        window: Window | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        attention: Implementation = "pyattn",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        for name, size in sizes.items():
            if checks.check_int(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads = {num_heads}, or head_dim given, got {embed_dim}"
                )
            head_dim = embed_dim // num_heads
        elif checks.check_int("head_dim", head_dim) < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        if rotary is not None:
            if not isinstance(rotary, RotaryEmbedding):
                raise TypeError(f"rotary must be a pyattn.nn.RotaryEmbedding, got {type(rotary).__name__}")
            if rotary.dim > head_dim:
                raise ValueError(f"rotary must turn at most the {head_dim} elements of a head, got {rotary.dim}")
        for name, flag in (("bias", bias), ("qk_norm", qk_norm), ("is_causal", is_causal)):
            checks.check_bool(name, flag)
        checks.check_window(is_causal, window)
        if not 0 <= checks.check_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
        self.attention = implementations.check(attention)
        if softcap is not None and checks.check_number("softcap", softcap) < 0:
            raise ValueError(f"softcap must be positive, or 0 or None for none, got {softcap}")
        if softcap and attention == "torch":
            raise NotImplementedError('attention="torch" has no softcap, got one')
        if scale is not None:
            checks.check_number("scale", scale)
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.is_causal, self.window, self.softcap, self.scale, self.dropout = is_causal, window, softcap, scale, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(embed_dim, (num_heads + 2 * num_kv_heads) * head_dim, bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, **factory)
        self.rotary = rotary
        self.q_norm = RMSNorm(head_dim, eps, **factory) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps, **factory) if qk_norm else None

    def _weights_to_pack(self) -> tuple[str, ...]:
        return "qkv_proj.weight", "out_proj.weight"

    def _check_parts(self) -> None:
        """That the parts whose weights are read, and which are not called, would compute what is computed."""
        implementations.check_linear(qkv_proj=self.qkv_proj, out_proj=self.out_proj)
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None and (type(norm).forward is not nn.RMSNorm.forward or norm.weight is None):
                raise TypeError(f"{name} must be an RMSNorm with a weight, which is read, got {norm}")
        if self.q_norm is not None and self.k_norm is not None and self.k_norm.eps != self.q_norm.eps:
            raise ValueError(f"k_norm must have the eps of q_norm, {self.q_norm.eps}, got {self.k_norm.eps}")

    def _eps(self, dtype: torch.dtype) -> float:
        norm = self.k_norm if self.q_norm is None else self.q_norm
        eps = None if norm is None else norm.eps
        return torch.finfo(dtype).eps if eps is None else eps  # torch's default

    def _check_cache(self, cache: Any, x: Tensor, residual: Any, dropout_p: float) -> None:
        """What would be refused after the cache has changed, and what no cache goes with."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a pyattn.KVCache, got {type(cache).__name__}")
        if dropout_p:
            raise NotImplementedError(f"cache must come without dropout, got {dropout_p} in training")
        sizes = (cache.batch, cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
        if sizes != (x.shape[0], self.num_kv_heads, self.head_dim, self.head_dim):
            raise ValueError(
                f"cache must have {x.shape[0]} samples, {self.num_kv_heads} heads and the head dim {self.head_dim}, "
                f"got {cache}"
            )
        if residual is not None:
            dtypes = checks.FLOAT_DTYPES if checks.autocasts(x) else (x.dtype,)
            checks.check_tensor("residual", residual, dtypes, x, "x")
            checks.check_shape("residual", residual, tuple(x.shape), "[B, L, E]")

    def make_cache(self, batch: int, max_length: int, page_size: int | None = None) -> KVCache:
        """An empty cache for this module, of the dtype and on the device of its parameters."""
        weight = self.qkv_proj.weight
        return KVCache(
            batch,
            self.num_kv_heads,
            self.head_dim,
            max_length,
            dtype=weight.dtype,
            device=weight.device,
            page_size=page_size,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}, "
            f"is_causal={self.is_causal}, window={self.window}, attention={self.attention!r}"
        )

    def _check_input(self, x: Any) -> None:
        checks.check_tensor("x", x, checks.FLOAT_DTYPES)
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have shape [B, L, E] with E = {self.embed_dim}, got {list(x.shape)}")
        self._check_parts()

    def _heads(self, x: Tensor, positions: Tensor | None, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of tokens, of texts of up to so many."""
        return implementations.project(
            self.attention,
            x,
            self.qkv_proj.weight,
            self.qkv_proj.bias,
            (self.num_heads, self.num_kv_heads, self.num_kv_heads),
            None if self.rotary is None else self.rotary(length),
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self._eps(x.dtype),
            positions,
            self._packed("qkv_proj.weight", x),
        )

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        residual: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Ints | None = None,
    ) -> Tensor:
        """Attention of each token over those that it may see.

        With a cache x is what follows the tokens in it, and is added to them: ``pyattn.attention_with_kv_cache``. That
        needs ``torch.no_grad``, and evaluation if there is dropout. Keys stay turned as they were when they came, which
        dynamic rotary scaling would have otherwise once a text is longer than the original length.

        Args:
            x: ``[B, L, E]``, of the parameters' dtype.
            attn_mask: as of ``pyattn.attention``, broadcastable to ``[B, Hq, L, L]``: bool (True: attend) or float
                (added; differentiable). Combines with ``is_causal`` and ``window``. With a cache its columns are the
                cache's buffer indices.
            positions: int32 or int64 ``[L]`` or ``[B, L]``, the tokens' positions for rotary; None for 0 to L - 1, or
                with a cache for those that follow what it has ``seen``.
            residual: ``[B, L, E]``, added to the output.
            cache: this module's own ``pyattn.KVCache``, of B samples, Hkv heads and head dim D; changed in place.
            lengths: how many tokens of x count in each sample, the first ones; None for all. The others are seen by
                none, do not enter the cache, and what comes out of them means nothing.

        Returns:
            ``[B, L, E]`` in the dtype of x.

        Raises:
            TypeError, ValueError: naming the argument; the cache is full.
            NotImplementedError: a cache with gradients or dropout, or one with pages and an ``attention`` other than
                "pyattn".
        """
        self._check_input(x)
        dropout_p = float(self.dropout) if self.training else 0.0
        length = x.shape[1]
        if cache is not None:
            self._check_cache(cache, x, residual, dropout_p)
            if self.rotary is not None:
                length = cache.text_length(length, lengths)
                positions = cache.positions(x.shape[1], lengths) if positions is None else positions
        q, k, v = self._heads(x, positions, length)
        shared = self._shared(attn_mask)
        if cache is None:
            shared |= {"dropout_p": dropout_p} | masks.live_keys(lengths, x)
            out = implementations.attend(self.attention, q, k, v, **shared)
        else:
            out = implementations.attend_with_cache(self.attention, q, cache, k, v, lengths, **shared)
        packed = self._packed("out_proj.weight", x)
        return implementations.output(self.attention, out, self.out_proj.weight, self.out_proj.bias, residual, packed)

    def _shared(self, attn_mask: Tensor | None) -> dict[str, Any]:
        """The arguments of attention that do not depend on whether there is a cache."""
        family: dict[str, Any] = {"causal": self.is_causal, "window": self.window, "softcap": self.softcap}
        return family | {"scale": self.scale, "attn_mask": attn_mask}

    def weights(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        lengths: Ints | None = None,
    ) -> Tensor:
        """The weights of ``forward`` without cache and dropout, averaged over heads: who looked at what.

        Args:
            x, attn_mask, positions, lengths: as of ``forward``.

        Returns:
            ``[B, L, L]``.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        self._check_input(x)
        q, k, v = self._heads(x, positions, x.shape[1])
        groups = self.num_heads // self.num_kv_heads
        k, v = (heads.repeat_interleave(groups, 1) for heads in (k, v))
        spec, t = functional.dense(q, k, v, **self._shared(attn_mask), **masks.live_keys(lengths, x))
        return attention_weights(spec, t, True, x.dtype)
