"""Captions: a Vision Transformer looks at an image, a decoder writes about it.

Vinyals et al. 2015, arXiv:1411.4555, had a recurrent decoder, Xu et al. 2015, arXiv:1502.03044, gave it attention over
places of the image; here both sides are Transformers, as in Liu et al. 2021, arXiv:2101.10804.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyattn.models.blocks import Decoder, Encoded, Sizes
from pyattn.models.generation import check_evaluating
from pyattn.models.vit import ViT
from pyattn.nn.implementations import Implementation


class Captioner(nn.Module):
    """Images [B, channels, height, width] and texts [B, T] -> logits of the next tokens [B, T, vocabulary].

    Args:
        vocabulary: of tokens.
        image: height and width, multiples of ``patch``.
        patch: height and width of a patch.
        channels: 1 for grey, 3 for colours.
        mean: of the pixels that it is trained on.
        std: their standard deviation.
        dim: of the residual streams.
        heads: a divisor of dim.
        encoder_layers: of the ViT.
        decoder_layers: of the decoder.
        hidden: of the MLPs; None for 4 * dim.
        dropout: of what each part adds, and of the embeddings, in training.
        attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> model = Captioner(100, image=(32, 32), patch=8, dim=32, heads=4, encoder_layers=1, decoder_layers=1).eval()
        >>> images, texts = torch.rand(2, 3, 32, 32), torch.randint(3, 100, (2, 7))
        >>> model(images, texts).shape
        torch.Size([2, 7, 100])
        >>> [len(text) <= 5 for text in model.write(images, 5, beams=2)]
        [True, True]
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        image: tuple[int, int] = (32, 32),
        patch: int = 4,
        channels: int = 3,
        mean: float = 0.0,
        std: float = 1.0,
        dim: int = 192,
        heads: int = 4,
        encoder_layers: int = 3,
        decoder_layers: int = 2,
        hidden: int | None = None,
        dropout: float = 0.1,
        attention: Implementation = "pyattn",
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        shared: dict[str, Any] = {"dim": dim, "heads": heads, "hidden": hidden, "dropout": dropout}
        shared["attention"] = attention
        pixels: dict[str, Any] = {"image": image, "patch": patch, "channels": channels, "mean": mean, "std": std}
        self.images = ViT(None, layers=encoder_layers, **pixels, **shared)
        self.decoder = Decoder(vocabulary, decoder_layers, Sizes(**shared))

    def encode(self, images: Tensor) -> Encoded:
        """What the decoder looks back at: the whole image, and its patches."""
        return self.decoder.read(self.images.features(images), None)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.decoder(texts, self.encode(images))

    def loss(self, images: Tensor, texts: Tensor, padding: int = 0, smoothing: float = 0) -> Tensor:
        """Mean cross-entropy in nats of the tokens of ``texts`` ``[B, T]`` after its first that are no padding."""
        return self.decoder.loss(texts, self.encode(images), padding, smoothing)

    @torch.no_grad()
    def write(self, images: Tensor, max_length: int, **options: Any) -> list[list[int]]:
        """The tokens of a text about each image, as ``Decoder.write`` with its ``options``.

        Raises:
            RuntimeError: the model is in training.
        """
        check_evaluating(self)
        return self.decoder.write(self.encode(images), max_length, **options)

    @torch.no_grad()
    def looks(self, images: Tensor, texts: Tensor) -> Tensor:
        """``[B, T, rows, columns]``: how much each token looked at each patch, a mean over the last layer's heads.

        What is left to 1 of a token's patches is what it looked at the whole image.
        """
        check_evaluating(self)
        return self.decoder.alignments(texts, self.encode(images))[..., 1:].unflatten(-1, self.images.grid)
