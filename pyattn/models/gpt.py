"""A decoder-only Transformer (Radford et al. 2019) whose attention is chosen by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattn import functional

# Causal self-attention over [B, heads, L, head_dim].
CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
ATTENTION: dict[str, CausalAttention] = {
    "naive": lambda q, k, v: functional.naive_attention(q, k, v, causal=True),
    "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "pyattn": lambda q, k, v: functional.attention(q, k, v, causal=True),
}


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, dim: int, heads: int, attention: CausalAttention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        # [B, L, 3 * dim] -> three views [B, heads, L, head_dim]: no copy, the strides say it all
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Tokens [B, L] -> logits [B, L, vocabulary]; with targets [B, L], the mean cross-entropy in nats.

    Byte-level by default, with learned positions and the embedding as output layer. ``attention`` is "naive",
    "torch" or "pyattn", or a causal function of query, key and value, each [B, heads, L, dim // heads].

    >>> tokens = torch.tensor([list(b"to be or not to be")])
    >>> model = GPT(dim=32, depth=2, heads=4, max_length=64, attention="pyattn")
    >>> model(tokens).shape
    torch.Size([1, 18, 256])
    >>> loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    >>> loss.backward()
    """

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        max_length: int = 256,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        attention: str | CausalAttention = "pyattn",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and heads {heads}")
        if isinstance(attention, str):
            if attention not in ATTENTION:
                names = ", ".join(ATTENTION)
                raise ValueError(f"attention must be one of {names} or a callable, got {attention!r}")
            attention = ATTENTION[attention]
        self.max_length = max_length
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.apply(_initialise)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("project.weight", "mlp.2.weight")):  # they sum into one stream: keep its variance
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        L = tokens.shape[1]
        if self.max_length < L:
            raise ValueError(f"tokens must have at most max_length={self.max_length} positions, got {L}")
        x = self.tokens(tokens) + self.positions(torch.arange(L, device=tokens.device))
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
