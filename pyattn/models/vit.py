"""The Vision Transformer: an image is a sequence of patches (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattn import checks
from pyattn.models.blocks import Encoder, Sizes
from pyattn.models.generation import check_evaluating
from pyattn.nn.implementations import Implementation


class ViT(nn.Module):
    """Images [B, channels, height, width] -> logits [B, classes].

    Each patch becomes a vector by one matrix. Before them stands a learned one that sees them all and is classified;
    positions are learned, too.

    Args:
        classes: of images; None for a model without a classifier, whose ``features`` others read.
        image: height and width, multiples of ``patch``.
        patch: height and width of a patch.
        channels: 1 for grey, 3 for colours.
        mean: of the pixels that it is trained on.
        std: their standard deviation; what is projected are pixels less their mean over it.
        dim: of the residual stream.
        heads: a divisor of dim.
        layers: of the encoder.
        hidden: of the MLPs; None for 4 * dim.
        dropout: of what each part adds, and of the embeddings, in training.
        attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> model = ViT(10, image=(28, 28), patch=4, dim=32, heads=4, layers=2).eval()
        >>> images = torch.rand(5, 1, 28, 28)
        >>> model(images).shape, model.looks(images).shape
        (torch.Size([5, 10]), torch.Size([5, 7, 7]))
    """

    def __init__(
        self,
        classes: int | None,
        *,
        image: tuple[int, int] = (28, 28),
        patch: int = 4,
        channels: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
        dim: int = 128,
        heads: int = 4,
        layers: int = 4,
        hidden: int | None = None,
        dropout: float = 0.1,
        attention: Implementation = "pyattn",
    ) -> None:
        super().__init__()
        if not isinstance(image, (tuple, list)) or len(image) != 2:
            raise TypeError(f"image must be a height and a width, got {image!r}")
        if patch < 1 or min(image) < 1 or any(side % patch for side in image):
            raise ValueError(f"image must have sides that are multiples of patch={patch}, got {image}")
        if classes is not None and classes < 1:
            raise ValueError(f"classes must be at least 1, or None, got {classes}")
        if not std > 0:
            raise ValueError(f"std must be more than 0, got {std}")
        self.mean, self.std = mean, std
        self.image, self.patch, self.channels = (image[0], image[1]), patch, channels
        self.grid = image[0] // patch, image[1] // patch
        self.project = nn.Linear(channels * patch**2, dim)
        self.first = nn.Parameter(torch.zeros(dim))
        # Not lost beside projected patches, whose elements begin at about 0.6.
        self.positions = nn.Parameter(0.2 * torch.randn(1 + self.grid[0] * self.grid[1], dim))
        self.dropout = nn.Dropout(dropout)
        hidden = 4 * dim if hidden is None else hidden
        self.encoder = Encoder(layers, Sizes(dim, heads, hidden, dropout, attention, activation=nn.GELU))
        self.head = None if classes is None else nn.Linear(dim, classes)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)  # at first every class is as probable as the others
            nn.init.zeros_(self.head.bias)

    def patches(self, images: Tensor) -> Tensor:
        """``[B, N, channels * patch^2]``: the patches, row by row, of standardised pixels.

        Raises:
            TypeError, ValueError: images is not float ``[B, channels, height, width]`` of this model's sizes.
        """
        checks.check_tensor("images", images, checks.FLOAT_DTYPES)
        checks.check_shape("images", images, (len(images), self.channels, *self.image), "[B, channels, height, width]")
        P = self.patch
        tiles = ((images - self.mean) / self.std).unfold(2, P, P).unfold(3, P, P)  # [B, C, rows, columns, P, P]
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def embed(self, images: Tensor) -> Tensor:
        """What the encoder reads: ``[B, 1 + N, dim]``."""
        x = self.project(self.patches(images))
        x = torch.cat((self.first.expand(len(x), 1, -1), x), 1)
        return self.dropout(x + self.positions)

    def features(self, images: Tensor) -> Tensor:
        """``[B, 1 + N, dim]``: of the whole image, and of each patch."""
        return self.encoder(self.embed(images))

    def forward(self, images: Tensor) -> Tensor:
        if self.head is None:
            raise RuntimeError("the model must have been made with classes, got None: it has features alone")
        return self.head(self.features(images)[:, 0])

    def loss(self, images: Tensor, labels: Tensor, smoothing: float = 0) -> Tensor:
        """Mean cross-entropy in nats of int64 labels ``[B]``."""
        return F.cross_entropy(self(images), labels, label_smoothing=smoothing)

    @torch.no_grad()
    def looks(self, images: Tensor) -> Tensor:
        """``[B, rows, columns]``: how much the class looked at each patch, a mean over the last layer's heads.

        Raises:
            RuntimeError: the model is in training.
        """
        check_evaluating(self)
        return self.encoder.looks(self.embed(images))[:, 0, 1:].unflatten(1, self.grid)
