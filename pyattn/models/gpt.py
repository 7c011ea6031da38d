"""A decoder-only Transformer, as language models are built today.

Radford et al. 2019, with what Llama made common: RMSNorm before each part (arXiv:1910.07467), rotary positions
(arXiv:2104.09864), query heads that share keys (arXiv:2305.13245) and a gated MLP (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattn import checks
from pyattn.kv_cache import KVCache
from pyattn.models.generation import sample
from pyattn.nn import GroupedQueryAttention, RMSNorm, RotaryEmbedding
from pyattn.nn.implementations import Implementation


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, attention: GroupedQueryAttention, dim: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim), attention
        self.mlp_norm, self.mlp = RMSNorm(dim), MLP(dim, 8 * dim // 3)

    def forward(self, x: Tensor, cache: KVCache | None, lengths: list[int] | None) -> Tensor:
        x = self.attention(self.attention_norm(x), residual=x, cache=cache, lengths=lengths)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Tokens [B, L] -> logits [B, L, vocabulary]; with targets [B, L], the mean cross-entropy in nats.

    The embedding is the output layer, too.

    Args:
        vocabulary: of tokens; 256 for bytes.
        max_length: tokens of a text at most.
        dim: of the residual stream.
        depth: blocks.
        heads: query heads, a divisor of dim.
        kv_heads: key heads, a divisor of heads; None for as many.
        window: how many tokens before itself a token sees; None for all.
        attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([list(b"to be or not to be")])
        >>> model = GPT(dim=32, depth=2, heads=4, kv_heads=2, max_length=64, attention="pyattn")
        >>> model(tokens).shape
        torch.Size([1, 18, 256])
        >>> loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        >>> loss.backward()
        >>> model.generate(tokens, 5).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        max_length: int = 256,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        window: int | None = None,
        attention: Implementation = "pyattn",
    ) -> None:
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise ValueError(f"dim must be an even multiple of heads, got dim {dim} and heads {heads}")
        self.max_length = max_length
        self.tokens = nn.Embedding(vocabulary, dim)
        rotary = RotaryEmbedding(dim // heads, max_length)
        sees = None if window is None else (window, 0)
        attentions = (
            GroupedQueryAttention(dim, heads, kv_heads, rotary=rotary, window=sees, attention=attention)
            for _ in range(depth)
        )
        self.blocks = nn.ModuleList(Block(module, dim) for module in attentions)
        self.norm = RMSNorm(dim)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what is added to one stream keeps its variance
                into_stream = name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if into_stream else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.max_length < tokens.shape[1]:
            raise ValueError(f"tokens must have at most max_length={self.max_length} positions, got {tokens.shape[1]}")
        logits = self._logits(self._stream(tokens))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _stream(self, tokens: Tensor, caches: list[KVCache] | None = None, lengths: list[int] | None = None) -> Tensor:
        x = self.tokens(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], lengths)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.tokens.weight)

    def caches(self, batch: int, max_length: int | None = None, page_size: int | None = None) -> list[KVCache]:
        """An empty cache for each block, for so many texts of ``max_length`` tokens; None for the model's own."""
        length = self.max_length if max_length is None else max_length
        return [block.attention.make_cache(batch, length, page_size) for block in cast("list[Block]", self.blocks)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor,
        new_tokens: int,
        *,
        lengths: list[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Goes on with texts, each token by what is cached of those before.

        Args:
            prompts: int64 ``[B, L]``.
            new_tokens: of each text.
            lengths: tokens of each prompt, where they differ; the others of its row do not count.
            temperature, top_k, top_p, generator: of ``pyattn.models.generation.sample``; temperature 0 is greedy.
            caches: of ``caches``, empty, or with the texts before these prompts; None for new ones.

        Returns:
            int64 ``[B, new_tokens]``.

        Raises:
            TypeError, ValueError: naming the argument; a text would exceed ``max_length``.
        """
        if prompts.dim() != 2 or prompts.shape[1] < 1:
            raise ValueError(f"prompts must have shape [B, L] with at least one token, got {list(prompts.shape)}")
        B, L = prompts.shape
        ends = [L] * B if lengths is None else checks.check_numbers("lengths", lengths, B)
        if any(not 1 <= end <= L for end in ends):
            raise ValueError(f"lengths must lie in [1, {L}], got {ends}")
        caches = self.caches(B, L + new_tokens) if caches is None else caches
        last = torch.tensor(ends, device=prompts.device) - 1
        x = self._stream(prompts, caches, lengths)[torch.arange(B, device=prompts.device), last]
        chosen: list[Tensor] = []
        for i in range(new_tokens):
            if i > 0:
                x = self._stream(chosen[-1][:, None], caches)[:, 0]
            logits = self._logits(x)
            chosen.append(sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
        return torch.stack(chosen, 1) if chosen else prompts[:, :0]


class GPTClassifier(nn.Module):
    """Texts [B, L] -> logits [B, classes]: a GPT, and a matrix on the mean of what it made of the tokens of each.

    Radford et al. 2018, "Improving language understanding by generative pre-training": the GPT may have been trained on
    texts without labels before, and goes on learning to predict them beside the labels. They take what it made of the
    last token; the mean of all got more definitions right in ``examples/classify.py``.

    Args:
        gpt: becomes part of the model.
        classes: of texts.
        dropout: before the matrix, in training.

    Example:
        >>> import torch
        >>> model = GPTClassifier(GPT(dim=32, depth=1, heads=4, max_length=16), classes=3).eval()
        >>> model(torch.randint(256, (2, 9)), [9, 4]).shape
        torch.Size([2, 3])
    """

    def __init__(self, gpt: GPT, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.gpt, self.dropout = gpt, nn.Dropout(dropout)
        self.head = nn.Linear(gpt.tokens.embedding_dim, classes)
        nn.init.zeros_(self.head.weight)  # at first every class is as probable as the others
        nn.init.zeros_(self.head.bias)

    def _stream(self, tokens: Tensor) -> Tensor:
        return self.gpt.norm(self.gpt._stream(tokens))

    def _classify(self, x: Tensor, lengths: list[int]) -> Tensor:
        ends = checks.check_numbers("lengths", lengths, len(x))
        if any(not 1 <= end <= x.shape[1] for end in ends):
            raise ValueError(f"lengths must lie in [1, {x.shape[1]}], got {ends}")
        inside = _inside(x, lengths)
        return self.head(self.dropout((x * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)))

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        return self._classify(self._stream(tokens), lengths)

    def loss(self, tokens: Tensor, lengths: list[int], labels: Tensor, language: float = 0.5) -> Tensor:
        """Cross-entropy of int64 labels ``[B]``, and ``language`` times that of the texts' own tokens, in nats."""
        x = self._stream(tokens)
        loss = F.cross_entropy(self._classify(x, lengths), labels)
        if not language:
            return loss
        followed = _inside(x, lengths)[:, 1:]
        logits = F.linear(x[:, :-1][followed], self.gpt.tokens.weight)
        return loss + language * F.cross_entropy(logits, tokens[:, 1:][followed])


def _inside(x: Tensor, lengths: list[int]) -> Tensor:
    """Whether a position of ``x`` [B, L, dim] belongs to a text: [B, L]."""
    return torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
