"""What encoders and decoders are made of: layers of attention and MLPs, a stack that reads and one that writes.

Vaswani et al. 2017, arXiv:1706.03762. ``transformer.py`` puts them together for texts, ``vit.py``, ``speech.py``,
``caption.py`` and ``forecast.py`` for what else can be made a sequence.
"""

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


class Sizes(NamedTuple):
    """Of a layer.

    norm: "pre": before each part, which trains without warming up (Xiong et al. 2020, arXiv:2002.04745); "post": after
    each, as in the paper. attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.
    """

    dim: int
    heads: int
    hidden: int  # of the MLP
    dropout: float = 0.0
    attention: Implementation = "pyattn"
    norm: Norm = "pre"
    activation: type[nn.Module] = nn.ReLU

    def stack(self, layers: int, decodes: bool) -> nn.ModuleList:
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        return nn.ModuleList(Layer(self, decodes) for _ in range(layers))

    def last_norm(self) -> nn.Module:
        """After the last layer, whose stream is not normed yet where norms come before."""
        return nn.LayerNorm(self.dim) if self.norm == "pre" else nn.Identity()


class Layer(nn.Module):
    """Attention of a sequence over itself, in a decoder over a memory, and an MLP: [B, L, dim] -> [B, L, dim].

    Each adds to the stream: ``x + part(norm(x))``, or, as in the paper, ``norm(x + part(x))``.
    """

    def __init__(self, sizes: Sizes, decodes: bool) -> None:
        super().__init__()
        dim, heads, hidden, dropout, attention, norm, activation = sizes
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        self.pre, self.dropout = norm == "pre", nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = GroupedQueryAttention(dim, heads, bias=True, is_causal=decodes, attention=attention)
        if decodes:
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_attention = CrossAttention(dim, heads, attention=attention)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim))

    def _add(self, x: Tensor, norm: nn.LayerNorm, part: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        if self.pre:
            return x + self.dropout(part(norm(x), *inputs, **options))
        return norm(x + self.dropout(part(x, *inputs, **options)))

    def encode(self, x: Tensor, lengths: list[int] | None) -> Tensor:
        x = self._add(x, self.attention_norm, self.attention, lengths=lengths)
        return self._add(x, self.mlp_norm, self.mlp)

    def decode(self, x: Tensor, memory: Memory, lengths: list[int] | None, cache: KVCache | None) -> Tensor:
        x = self._add(x, self.attention_norm, self.attention, cache=cache)
        x = self._add(x, self.cross_norm, self.cross_attention, memory, lengths=lengths)
        return self._add(x, self.mlp_norm, self.mlp)

    def looks(self, x: Tensor, lengths: list[int] | None) -> Tensor:
        """``[B, L, L]``: what each place of an encoder looks at."""
        return self.attention.weights(self.attention_norm(x) if self.pre else x, lengths=lengths)

    def alignments(self, x: Tensor, memory: Memory, lengths: list[int] | None) -> Tensor:
        """``[B, T, S]``: what each token of a decoder looks at in the memory."""
        x = self._add(x, self.attention_norm, self.attention)
        return self.cross_attention.weights(self.cross_norm(x) if self.pre else x, memory, lengths=lengths)


class Encoder(nn.Module):
    """Reads sequences ``[B, L, dim]``, of each of which the first ``lengths`` places count, None for all.

    Example:
        >>> import torch
        >>> encoder = Encoder(2, Sizes(dim=32, heads=4, hidden=64))
        >>> encoder(torch.randn(2, 9, 32), [9, 4]).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, layers: int, sizes: Sizes) -> None:
        super().__init__()
        self.layers = sizes.stack(layers, decodes=False)
        self.norm = sizes.last_norm()
        spread(self)

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        for layer in cast("list[Layer]", self.layers):
            x = layer.encode(x, lengths)
        return self.norm(x)

    def looks(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        """``[B, L, L]``: what each place looked at, a mean over the last layer's heads."""
        *layers, last = cast("list[Layer]", self.layers)
        for layer in layers:
            x = layer.encode(x, lengths)
        return last.looks(x, lengths)


class Encoded(NamedTuple):
    """What a decoder looks back at: for each of its layers the keys and values of B memories."""

    memories: list[Memory]
    lengths: list[int] | None


class Decoder(nn.Module):
    """Writes texts about memories ``[B, S, dim]``. The embedding is the output layer, too.

    Example:
        >>> import torch
        >>> decoder = Decoder(100, 2, Sizes(dim=32, heads=4, hidden=64)).eval()
        >>> encoded = decoder.read(torch.randn(2, 9, 32), [9, 4])
        >>> decoder(torch.randint(3, 100, (2, 7)), encoded).shape
        torch.Size([2, 7, 100])
        >>> [len(text) <= 5 for text in decoder.write(encoded, 5)]
        [True, True]
    """

    def __init__(self, vocabulary: int, layers: int, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, sizes.dim)
        self.dropout = nn.Dropout(sizes.dropout)
        self.layers = sizes.stack(layers, decodes=True)
        self.norm = sizes.last_norm()
        spread(self)
        nn.init.normal_(self.tokens.weight, std=sizes.dim**-0.5)

    @property
    def _layers(self) -> list[Layer]:
        return cast("list[Layer]", self.layers)

    def embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens ``[B, L]`` with their positions, of which there may be any number: ``[B, L, dim]``."""
        x = self.tokens(tokens) * math.sqrt(self.tokens.embedding_dim)
        return self.dropout(x + sinusoids(range(first, first + tokens.shape[1]), x))

    def read(self, memory: Tensor, lengths: list[int] | None) -> Encoded:
        """Projects memories ``[B, S, dim]``, of which the first ``lengths`` places count, once for all steps."""
        return Encoded([layer.cross_attention.project(memory) for layer in self._layers], lengths)

    def forward(self, target: Tensor, encoded: Encoded, caches: list[KVCache] | None = None) -> Tensor:
        """Logits ``[N, T, vocabulary]`` after each token of int64 ``[N, T]``.

        N is a multiple of the memories' B: texts about one memory follow each other. With caches, one a layer, the
        tokens follow those in there.
        """
        x = self.embed(target, 0 if caches is None else caches[0].span.seen[0])
        for i, (layer, memory) in enumerate(zip(self._layers, encoded.memories, strict=True)):
            x = layer.decode(x, memory, encoded.lengths, None if caches is None else caches[i])
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, target: Tensor, encoded: Encoded, padding: int = 0, smoothing: float = 0) -> Tensor:
        """Mean cross-entropy in nats of the tokens of ``target`` ``[B, T]`` after its first that are no padding."""
        logits = self(target[:, :-1], encoded)
        expected = target[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1), expected, ignore_index=padding, label_smoothing=smoothing)

    def caches(self, batch: int, max_length: int) -> list[KVCache]:
        """An empty cache for each layer."""
        return [layer.attention.make_cache(batch, max_length) for layer in self._layers]

    @torch.no_grad()
    def write(
        self,
        encoded: Encoded,
        max_length: int,
        *,
        beams: int = 1,
        start: int = 1,
        end: int = 2,
        length_penalty: float = 0.6,
    ) -> list[list[int]]:
        """Writes a text about each memory: one most probable token after the other, or the best that a search finds.

        Args:
            encoded: of ``read``.
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
        B = encoded.memories[0][0].shape[0]
        caches = self.caches(B * beams, max_length)

        def step(tokens: Tensor) -> Tensor:
            return self(tokens[:, None], encoded, caches)[:, -1]

        def reorder(indices: list[int]) -> None:
            for cache in caches:
                cache.reorder(indices)

        first = torch.full((B,), start, device=self.tokens.weight.device)
        found = beam_search(
            step, reorder, first, beams=beams, max_length=max_length, end=end, length_penalty=length_penalty
        )
        return [hypothesis.tokens for hypothesis in found]

    @torch.no_grad()
    def alignments(self, target: Tensor, encoded: Encoded) -> Tensor:
        """``[B, T, S]``: what each token of ``target`` looked at, a mean over the last layer's heads."""
        check_evaluating(self)
        x = self.embed(target)
        for layer, memory in zip(self._layers[:-1], encoded.memories[:-1], strict=True):
            x = layer.decode(x, memory, encoded.lengths, None)
        return self._layers[-1].alignments(x, encoded.memories[-1], encoded.lengths)


def sinusoids(positions: range, like: Tensor) -> Tensor:
    """``[L, dim]``: element 2 i of a position is ``sin(position / 10000^(2 i / dim))``, 2 i + 1 its cosine.

    ``like`` is ``[..., dim]``; the table is of its dtype, and where it is.
    """
    dim = like.shape[-1]
    frequencies = 10000 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(positions.start, positions.stop, dtype=torch.float64), frequencies)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :dim].float().to(like)


def spread(model: nn.Module) -> None:
    """Draws matrices so that what they make has the variance of what they are given (Glorot & Bengio 2010)."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
