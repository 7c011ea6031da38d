"""The Transformer: an encoder reads a text, a decoder writes another (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattn.kv_cache import KVCache
from pyattn.models.generation import beam_search, check_evaluating
from pyattn.nn import CrossAttention, GroupedQueryAttention
from pyattn.nn.cross import Memory
from pyattn.nn.implementations import Implementation

Norm = Literal["pre", "post"]


class Encoded(NamedTuple):
    """What the decoder reads: of each of its layers the keys and values of the source."""

    memories: list[Memory]
    lengths: list[int]


def sinusoids(positions: range, dim: int) -> Tensor:
    """``[L, dim]``: element 2 i of a position is ``sin(position / 10000^(2 i / dim))``, 2 i + 1 its cosine."""
    frequencies = 10000 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(positions.start, positions.stop, dtype=torch.float64), frequencies)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dim].float()


class Layer(nn.Module):
    """Attention of a text over itself, in a decoder over the source, and an MLP: [B, L, dim] -> [B, L, dim].

    Each adds to the stream: ``x + part(norm(x))``, or, as in the paper, ``norm(x + part(x))``.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, dropout: float, norm: Norm, attention: Implementation, decodes: bool
    ) -> None:
        super().__init__()
        self.pre, self.dropout = norm == "pre", nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = GroupedQueryAttention(dim, heads, bias=True, is_causal=decodes, attention=attention)
        if decodes:
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_attention = CrossAttention(dim, heads, attention=attention)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def _add(self, x: Tensor, norm: nn.LayerNorm, part: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        if self.pre:
            return x + self.dropout(part(norm(x), *inputs, **options))
        return norm(x + self.dropout(part(x, *inputs, **options)))

    def encode(self, x: Tensor, lengths: list[int]) -> Tensor:
        x = self._add(x, self.attention_norm, self.attention, lengths=lengths)
        return self._add(x, self.mlp_norm, self.mlp)

    def decode(self, x: Tensor, memory: Memory, lengths: list[int], cache: KVCache | None) -> Tensor:
        x = self._add(x, self.attention_norm, self.attention, cache=cache)
        x = self._add(x, self.cross_norm, self.cross_attention, memory, lengths=lengths)
        return self._add(x, self.mlp_norm, self.mlp)

    def alignments(self, x: Tensor, memory: Memory, lengths: list[int]) -> Tensor:
        """``[B, T, S]``: what each token looks at in the source."""
        x = self._add(x, self.attention_norm, self.attention)
        return self.cross_attention.weights(self.cross_norm(x) if self.pre else x, memory, lengths=lengths)


class Transformer(nn.Module):
    """Source tokens [B, S] and target tokens [B, T] -> logits of the next target tokens [B, T, vocabulary].

    Both languages share a vocabulary, and its embedding is the output layer, too. Positions are sinusoids, so that a
    text may be of any length. Padding follows the tokens of a text, and nothing depends on it.

    Args:
        vocabulary: of tokens.
        dim: of the residual stream.
        heads: a divisor of dim.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        hidden: of the MLPs; None for 4 * dim.
        dropout: of what each part adds, and of the embeddings, in training.
        norm: "pre": before each part, which trains without warming up (Xiong et al. 2020, arXiv:2002.04745); "post":
            after each, as in the paper.
        attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> model = Transformer(100, dim=32, heads=4, encoder_layers=1, decoder_layers=1).eval()
        >>> source, target = torch.randint(3, 100, (2, 9)), torch.randint(3, 100, (2, 7))
        >>> model(source, [9, 4], target).shape
        torch.Size([2, 7, 100])
        >>> [len(text) <= 5 for text in model.translate(source, [9, 4], 5, beams=2)]
        [True, True]
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 256,
        heads: int = 4,
        encoder_layers: int = 3,
        decoder_layers: int = 3,
        hidden: int | None = None,
        dropout: float = 0.1,
        norm: Norm = "pre",
        attention: Implementation = "pyattn",
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        hidden = 4 * dim if hidden is None else hidden
        self.tokens = nn.Embedding(vocabulary, dim)
        self.dropout = nn.Dropout(dropout)
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(dim, heads, hidden, dropout, norm, attention, decodes) for _ in range(count))
            for count, decodes in ((encoder_layers, False), (decoder_layers, True))
        )
        # After the last layer of a stream that is not normed yet.
        self.encoder_norm, self.decoder_norm = (nn.LayerNorm(dim) if norm == "pre" else nn.Identity() for _ in range(2))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)

    @property
    def _decoder(self) -> list[Layer]:
        return cast("list[Layer]", self.decoder)

    def _embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        dim = self.tokens.embedding_dim
        positions = sinusoids(range(first, first + tokens.shape[1]), dim)
        return self.dropout(self.tokens(tokens) * math.sqrt(dim) + positions.to(self.tokens.weight))

    def encode(self, source: Tensor, lengths: list[int]) -> Encoded:
        """Reads int64 ``[B, S]``, of which the first ``lengths`` tokens count."""
        x = self._embed(source)
        for layer in cast("list[Layer]", self.encoder):
            x = layer.encode(x, lengths)
        x = self.encoder_norm(x)
        return Encoded([layer.cross_attention.project(x) for layer in self._decoder], lengths)

    def decode(self, target: Tensor, encoded: Encoded, caches: list[KVCache] | None = None) -> Tensor:
        """Logits ``[N, T, vocabulary]`` after each token of int64 ``[N, T]``.

        N is a multiple of the sources' B: texts of one source follow each other. With caches, one a layer, the tokens
        follow those in there.
        """
        x = self._embed(target, 0 if caches is None else caches[0].span.seen[0])
        for i, (layer, memory) in enumerate(zip(self._decoder, encoded.memories, strict=True)):
            x = layer.decode(x, memory, encoded.lengths, None if caches is None else caches[i])
        return F.linear(self.decoder_norm(x), self.tokens.weight)

    def forward(self, source: Tensor, lengths: list[int], target: Tensor) -> Tensor:
        return self.decode(target, self.encode(source, lengths))

    def loss(
        self, source: Tensor, lengths: list[int], target: Tensor, padding: int = 0, smoothing: float = 0
    ) -> Tensor:
        """Mean cross-entropy in nats of the tokens of ``target`` ``[B, T]`` after its first that are no padding."""
        logits = self(source, lengths, target[:, :-1])
        expected = target[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1), expected, ignore_index=padding, label_smoothing=smoothing)

    def caches(self, batch: int, max_length: int) -> list[KVCache]:
        """An empty cache for each layer of the decoder."""
        return [layer.attention.make_cache(batch, max_length) for layer in self._decoder]

    @torch.no_grad()
    def translate(
        self,
        source: Tensor,
        lengths: list[int],
        max_length: int,
        *,
        beams: int = 1,
        start: int = 1,
        end: int = 2,
        length_penalty: float = 0.6,
    ) -> list[list[int]]:
        """Writes a text for each source: the most probable token after the other, or the best that a beam search finds.

        Args:
            source: int64 ``[B, S]``.
            lengths: tokens of each source.
            max_length: tokens of a text at most.
            beams: hypotheses of each text that are followed; 1 is greedy.
            start: the token before a text.
            end: the token after a text.
            length_penalty: of ``pyattn.models.generation.beam_search``.

        Returns:
            The tokens of each text, without the end.

        Raises:
            RuntimeError: the model is in training.
        """
        check_evaluating(self)
        encoded = self.encode(source, lengths)
        caches = self.caches(source.shape[0] * beams, max_length)

        def step(tokens: Tensor) -> Tensor:
            return self.decode(tokens[:, None], encoded, caches)[:, -1]

        def reorder(indices: list[int]) -> None:
            for cache in caches:
                cache.reorder(indices)

        first = source.new_full((source.shape[0],), start)
        found = beam_search(
            step, reorder, first, beams=beams, max_length=max_length, end=end, length_penalty=length_penalty
        )
        return [hypothesis.tokens for hypothesis in found]

    @torch.no_grad()
    def alignments(self, source: Tensor, lengths: list[int], target: Tensor) -> Tensor:
        """``[B, T, S]``: what each target token looked at in the source, a mean over the last layer's heads."""
        check_evaluating(self)
        encoded = self.encode(source, lengths)
        x = self._embed(target)
        for layer, memory in zip(self._decoder[:-1], encoded.memories[:-1], strict=True):
            x = layer.decode(x, memory, lengths, None)
        return self._decoder[-1].alignments(x, encoded.memories[-1], lengths)
