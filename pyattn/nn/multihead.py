"""``torch.nn.MultiheadAttention`` on pyattn's projections and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyattn import checks, functional
from pyattn.nn import implementations, masks
from pyattn.nn.implementations import Implementation
from pyattn.nn.prepacking import Prepackable
from pyattn.nn.weights import attention_weights

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class MultiheadAttention(Prepackable, torch.nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762), in place of ``torch.nn.MultiheadAttention``.

    It is one, with the same constructor, parameters and state dict, and gives the same outputs, but for this:

    * A query that sees no key gives 0, and weights of 0, where torch's gives NaN.
    * Dropout drops other entries, those of ``pyattn.attention``, in the weights that it returns, too.
    * It computes the same in training and evaluation, without grad and with: there is no other fast path, neither
      its own nor that of ``torch.nn.TransformerEncoderLayer`` around it, and nested tensors are refused.
    * With ``is_causal=True`` and ``add_bias_kv`` or ``add_zero_attn`` every query sees the added keys, as it does with
      the mask alone; torch's hides them where ``need_weights=False``.

    Without ``need_weights`` no matrix of scores is made. A ``key_padding_mask`` that hides the ends of sequences
    becomes their lengths; any other is merged with ``attn_mask``, sample by sample, if there are both.

    Args:
        embed_dim: E, of queries and outputs.
        num_heads: H, a divisor of E.
        dropout: probability of dropping a weight, in training.
        bias: of the input and output projections.
        add_bias_kv: adds a learned key and value to those of each sample.
        add_zero_attn: adds a key and value of zeros.
        kdim: features of keys; None for E.
        vdim: features of values; None for E.
        batch_first: whether tensors are ``[N, L, E]``, not ``[L, N, E]``.
        device: of the parameters.
        dtype: of the parameters.
        attention: "pyattn" for the fused kernels; "naive" for F.linear, matmul and softmax, where a query without keys
            gives NaN; "torch" for F.linear and torch's scaled_dot_product_attention, with ``need_weights`` as "naive".

    Example:
        >>> import torch, pyattn
        >>> ours = pyattn.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> torchs = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> torchs.load_state_dict(ours.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 10, 64)
        >>> out, weights = ours(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
        >>> torch.testing.assert_close(out, torchs(x, x, x)[0])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        attention: Implementation = "pyattn",
    ) -> None:
        name = implementations.check(attention)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.adopt(name)

    def adopt(self, attention: Implementation) -> None:
        """Completes what ``torch.nn.MultiheadAttention`` has constructed."""
        self.attention = attention
        # TransformerEncoderLayer asks for it before it computes attention itself, from our weights.
        self._qkv_same_embed_dim = False

    def _weights_to_pack(self) -> tuple[str, ...]:
        return (*(_SEPARATE if self.in_proj_weight is None else ("in_proj_weight",)), "out_proj.weight")

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, attention={self.attention!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries over keys and values.

        Args:
            query: ``[N, L, E]`` if ``batch_first``, else ``[L, N, E]``; without a batch ``[L, E]``.
            key: ``[N, S, kdim]``, ``[S, N, kdim]`` or ``[S, kdim]``. Where query, key and value, or key and value, are
                one tensor, they are projected in one product.
            value: ``[N, S, vdim]``, ``[S, N, vdim]`` or ``[S, vdim]``.
            key_padding_mask: ``[N, S]`` or ``[S]``, bool (True: not seen) or float (added to the scores).
            need_weights: also return the weights. They are computed head by head, after the output.
            attn_mask: ``[L, S]`` or ``[N * H, L, S]`` (``[H, L, S]``), bool (True: not seen) or float (added).
            average_attn_weights: return the mean over heads instead of each head's weights.
            is_causal: a promise that ``attn_mask``, which must be given, is the causal mask. Where torch's module does
                not look at the mask, this one does not either: with ``need_weights=False`` and no ``key_padding_mask``.

        Returns:
            ``(out, weights)``: out as query, in its dtype; weights ``[N, L, S]``, or ``[N, H, L, S]`` if not averaged
            (without N for input without a batch), where S counts the keys added by ``add_bias_kv`` and
            ``add_zero_attn``; None unless asked for. Both are differentiable.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        batched = self._check(query, key, value, need_weights, average_attn_weights, is_causal)
        if not batched:
            query, key, value = _map(lambda x: x.unsqueeze(0), query, key, value)
        elif not self.batch_first:
            query, key, value = _map(lambda x: x.transpose(0, 1), query, key, value)
        self._check_sizes(query, key, value)
        (N, L), S = query.shape[:2], key.shape[1]
        masks.check(attn_mask, key_padding_mask, query, N if batched else None, self.num_heads, L, S)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, which only says that it is causal, got None")
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)

        q, k, v = self._project(query, key, value)
        k, v = self._with_added_keys(k, v)
        added = k.shape[2] - S
        arguments: dict[str, Any] = {"dropout_p": float(self.dropout) if self.training else 0.0}
        if is_causal and key_padding_mask is None and not need_weights and not added:
            arguments |= {"causal": True, "q_offset": 0}
        else:
            arguments |= masks.convert(attn_mask, key_padding_mask, self.num_heads, added, q.dtype).given
        weights = None
        if need_weights:
            spec, t = functional.dense(q, k, v, **arguments)
            heads = implementations.attend_as(self.attention, spec, t)
            # Autocast has softmax in float32 on GPUs, and not on CPUs.
            wide = q.device.type == "cuda" and torch.is_autocast_enabled("cuda")
            dtype = torch.float32 if wide else q.dtype
            weights = attention_weights(spec, t, average_attn_weights, dtype)
        else:
            heads = implementations.attend(self.attention, q, k, v, **arguments)
        if batched and not self.batch_first:
            heads = heads.transpose(0, 2)  # [L, H, N, D], so that the output is contiguous
        packed = self._packed("out_proj.weight", query)
        out = implementations.output(self.attention, heads, self.out_proj.weight, self.out_proj.bias, packed=packed)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _check(self, query: Any, key: Any, value: Any, *flags: Any) -> bool:
        """Whether the input has a batch."""
        parameter = self.out_proj.weight
        autocast = checks.autocasts(parameter)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if isinstance(x, Tensor) and x.is_nested:
                raise TypeError(
                    f"{name} must be a dense tensor, got a nested one (torch.nn.TransformerEncoder makes them: "
                    "construct it with enable_nested_tensor=False, or let pyattn.nn.convert convert it)"
                )
            checks.check_tensor(
                name, x, checks.FLOAT_DTYPES if autocast else (parameter.dtype,), parameter, "the parameters"
            )
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                batch_first = "[N, L, E]" if self.batch_first else "[L, N, E]"
                layout = (
                    f"the {query.dim()} dimensions of query" if x is not query else f"shape {batch_first} or [L, E]"
                )
                raise ValueError(f"{name} must have {layout}, got {list(x.shape)}")
        for name, flag in zip(("need_weights", "average_attn_weights", "is_causal"), flags, strict=True):
            checks.check_bool(name, flag)
        return query.dim() == 3

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, features in sizes:
            if x.shape[-1] != features:
                raise ValueError(f"{name} must have {features} features, got {x.shape[-1]}")
        if key.shape[0] != query.shape[0]:
            raise ValueError(f"key must have the batch size of query ({query.shape[0]}), got {key.shape[0]}")
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"value must have the batch size and length of key {list(key.shape[:2])}, got {list(value.shape[:2])}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, ``[N, H, L, D]``, in as few products as the tensors allow."""
        E, H = self.embed_dim, self.num_heads
        inputs: tuple[Tensor, ...] = (query, key, value)
        if self.in_proj_weight is not None and key is value:
            inputs = (query,) if query is key else (query, key)
        counts = {1: (3,), 2: (1, 2), 3: (1, 1, 1)}[len(inputs)]  # how many of q, k and v each input becomes
        sizes = [n * E for n in counts]
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(sizes) if len(sizes) > 1 else (self.in_proj_weight,)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        made: list[Tensor] = []
        for x, weight, bias, n in zip(inputs, weights, biases, counts, strict=False):
            first = len(made)
            num_heads = tuple(H if first <= part < first + n else 0 for part in range(3))
            if self.in_proj_weight is None:
                packed = self._packed(_SEPARATE[first], x)
            else:
                packed = self._packed("in_proj_weight", x, first * E, (first + n) * E)
            q_k_v = implementations.project(self.attention, x, weight, bias, num_heads, packed=packed)  # type: ignore[arg-type]
            made += q_k_v[first : first + n]
        q, k, v = made
        return q, k, v

    def _with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Followed by ``bias_k`` and ``bias_v``, and by zeros, if there are to be."""
        N, H, _, D = k.shape
        more: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            more.append((k.new_zeros(H * D), v.new_zeros(H * D)))
        if not more:
            return k, v
        keys, values = (
            [x.to(k.dtype).view(1, H, 1, D).expand(N, -1, -1, -1) for x in xs] for xs in zip(*more, strict=True)
        )
        return torch.cat([k, *keys], 2), torch.cat([v, *values], 2)


def _map(function: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``function`` of each, the same object of the same."""
    new_query = function(query)
    new_key = new_query if key is query else function(key)
    new_value = new_key if value is key else new_query if value is query else function(value)
    return new_query, new_key, new_value
