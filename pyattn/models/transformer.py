"""The Transformer: an encoder reads a text, a decoder writes another (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyattn.models.blocks import Decoder, Encoded, Encoder, Norm, Sizes
from pyattn.models.generation import check_evaluating
from pyattn.nn.implementations import Implementation


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
        sizes = Sizes(dim, heads, 4 * dim if hidden is None else hidden, dropout, attention, norm)
        self.encoder = Encoder(encoder_layers, sizes)
        self.decoder = Decoder(vocabulary, decoder_layers, sizes)

    def encode(self, source: Tensor, lengths: list[int]) -> Encoded:
        """Reads int64 ``[B, S]``, of which the first ``lengths`` tokens count."""
        return self.decoder.read(self.encoder(self.decoder.embed(source), lengths), lengths)

    def forward(self, source: Tensor, lengths: list[int], target: Tensor) -> Tensor:
        return self.decoder(target, self.encode(source, lengths))

    def loss(
        self, source: Tensor, lengths: list[int], target: Tensor, padding: int = 0, smoothing: float = 0
    ) -> Tensor:
        """Mean cross-entropy in nats of the tokens of ``target`` ``[B, T]`` after its first that are no padding."""
        return self.decoder.loss(target, self.encode(source, lengths), padding, smoothing)

    @torch.no_grad()
    def translate(self, source: Tensor, lengths: list[int], max_length: int, **options: Any) -> list[list[int]]:
        """The tokens of a text for each source, as ``Decoder.write`` with its ``options``.

        Args:
            source: int64 ``[B, S]``.
            lengths: tokens of each source.
            max_length: tokens of a text at most.

        Raises:
            RuntimeError: the model is in training.
        """
        check_evaluating(self)
        return self.decoder.write(self.encode(source, lengths), max_length, **options)

    @torch.no_grad()
    def alignments(self, source: Tensor, lengths: list[int], target: Tensor) -> Tensor:
        """``[B, T, S]``: what each target token looked at in the source, a mean over the last layer's heads."""
        check_evaluating(self)
        return self.decoder.alignments(target, self.encode(source, lengths))
