"""Speech recognition: an encoder hears log-mel frames, CTC and a decoder write what was said.

The Speech-Transformer (Dong et al. 2018, doi:10.1109/ICASSP.2018.8462506) under the joint objective of Kim et al. 2017,
arXiv:1609.06773: CTC (Graves et al. 2006) holds the alignment to the order of time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattn import checks
from pyattn.models.blocks import Decoder, Encoded, Encoder, Sizes, sinusoids
from pyattn.models.generation import check_evaluating
from pyattn.nn.implementations import Implementation

BLANK = 0  # of CTC: the token that pads texts, which no text has


# ---- from waves to frames ----------------------------------------------------------------------------------


@functools.cache
def mel_filters(mels: int, bins: int, rate: int) -> Tensor:
    """``[bins, mels]``: triangles that are even in mel (O'Shaughnessy 1987), from 0 to half the sampling rate."""
    to_mel = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, to_mel, mels + 2, dtype=torch.float64) / 2595) - 1)
    hertz = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[:, None]
    rising, falling = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(wave: Tensor, rate: int, mels: int = 64) -> Tensor:
    """Log-mel energies of a wave, with mean 0 and variance 1 over all of them: windows of 25 ms every 10 ms.

    Args:
        wave: float ``[N]``, of at least a window.
        rate: samples a second.
        mels: bands.

    Returns:
        float32 ``[frames, mels]``.

    Raises:
        ValueError: the wave is shorter than a window.

    Example:
        >>> import torch
        >>> log_mel(torch.sin(torch.arange(8000) * 0.5), rate=8000).shape
        torch.Size([98, 64])
    """
    window, hop = rate // 40, rate // 100
    if wave.dim() != 1 or len(wave) < window:
        raise ValueError(f"wave must be [N] with at least 25 ms, N = {window}, got {list(wave.shape)}")
    size = 2 ** math.ceil(math.log2(window))
    frames = wave.float().unfold(0, window, hop) * torch.hann_window(window)
    power = torch.fft.rfft(frames, size).abs().square()
    energies = (power @ mel_filters(mels, size // 2 + 1, rate) + 1e-6).log()
    return (energies - energies.mean()) / (energies.std() + 1e-2)  # of silence nothing but rounding is left


def padded(features: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """``[B, T, mels]`` with zeros after the frames of each, and how many those are."""
    return nn.utils.rnn.pad_sequence(list(features), batch_first=True), [len(x) for x in features]


def masked(features: Tensor, lengths: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """The frames with two bands and two spans of time set to 0, so that no cue alone is relied on: SpecAugment.

    Park et al. 2019, arXiv:1904.08779. A band has at most a quarter of the mels, a span at most a tenth of the time.
    """
    features = features.clone()
    for x, length in zip(features, lengths, strict=True):
        for axis, size, most in ((0, length, length // 10), (1, x.shape[1], x.shape[1] // 4)):
            for _ in range(2):
                width, place = torch.rand(2, generator=generator).tolist()
                width = round(width * most)
                x.narrow(axis, round(place * (size - width)), width).zero_()
    return features


# ---- the model ---------------------------------------------------------------------------------------------


class Subsample(nn.Module):
    """Frames [B, T, mels] -> [B, ceil(T / 4), dim]: two convolutions with strides of 2, and a matrix.

    ``lengths`` says how many frames count, and what is returned beside how many are left of them. The rest is 0 before
    each convolution, as beyond the ends, so that padding changes nothing.
    """

    def __init__(self, mels: int, channels: int, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(c, channels, 3, stride=2, padding=1) for c in (1, channels))
        self.project = nn.Linear(channels * halved(halved(mels)), dim)

    def forward(self, features: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        x = features[:, None]
        for convolution in self.convolutions:
            inside = torch.arange(x.shape[2], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
            x = F.gelu(convolution(x * inside[:, None, :, None]))
            lengths = [halved(length) for length in lengths]
        return self.project(x.transpose(1, 2).flatten(2)), lengths


def halved(length: int) -> int:
    """What a convolution of 3 with stride 2 and padding 1 leaves."""
    return (length + 1) // 2


class SpeechTransformer(nn.Module):
    """Frames [B, T, mels] and texts [B, L] -> logits of the next tokens [B, L, vocabulary].

    Args:
        vocabulary: of tokens; 0 pads texts and is CTC's blank.
        mels: bands of a frame.
        dim: of the residual streams.
        heads: a divisor of dim.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        hidden: of the MLPs; None for 4 * dim.
        channels: of the convolutions.
        dropout: of what each part adds, and of the embeddings, in training.
        attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> model = SpeechTransformer(13, dim=32, heads=4, encoder_layers=1, decoder_layers=1).eval()
        >>> frames, lengths = padded([torch.randn(98, 64), torch.randn(60, 64)])
        >>> model(frames, lengths, torch.randint(3, 13, (2, 7))).shape
        torch.Size([2, 7, 13])
        >>> [len(text) <= 5 for text in model.transcribe(frames, lengths, 5)]
        [True, True]
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        mels: int = 64,
        dim: int = 144,
        heads: int = 4,
        encoder_layers: int = 4,
        decoder_layers: int = 2,
        hidden: int | None = None,
        channels: int = 16,
        dropout: float = 0.1,
        attention: Implementation = "pyattn",
    ) -> None:
        super().__init__()
        sizes = Sizes(dim, heads, 4 * dim if hidden is None else hidden, dropout, attention)
        self.mels = mels
        self.subsample = Subsample(mels, channels, dim)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(encoder_layers, sizes)
        self.ctc = nn.Linear(dim, vocabulary)
        self.decoder = Decoder(vocabulary, decoder_layers, sizes)

    def hear(self, features: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """The encoder's ``[B, ceil(T / 4), dim]``, and how many of these count."""
        checks.check_tensor("features", features, checks.FLOAT_DTYPES)
        if features.dim() != 3 or features.shape[-1] != self.mels:
            raise ValueError(f"features must have shape [B, T, {self.mels}], got {list(features.shape)}")
        lengths = checks.check_numbers("lengths", lengths, len(features))
        if any(not 1 <= length <= features.shape[1] for length in lengths):
            raise ValueError(f"lengths must lie in [1, {features.shape[1]}], got {lengths}")
        x, lengths = self.subsample(features, lengths)
        return self.encoder(self.dropout(x + sinusoids(range(x.shape[1]), x)), lengths), lengths

    def encode(self, features: Tensor, lengths: list[int]) -> Encoded:
        return self.decoder.read(*self.hear(features, lengths))

    def forward(self, features: Tensor, lengths: list[int], texts: Tensor) -> Tensor:
        return self.decoder(texts, self.encode(features, lengths))

    def loss(
        self, features: Tensor, lengths: list[int], texts: Tensor, text_lengths: list[int], ctc: float = 0.3
    ) -> Tensor:
        """In nats a token: a part ``ctc`` of CTC's, the rest of the decoder's.

        Args:
            features: ``[B, T, mels]``.
            lengths: frames of each.
            texts: int64 ``[B, L]``: a start, the tokens of each text, an end, padding.
            text_lengths: tokens of each text, with its end.
            ctc: between 0 and 1.
        """
        memory, left = self.hear(features, lengths)
        spelled = [length - 1 for length in text_lengths]  # CTC has neither start nor end
        log_probabilities = self.ctc(memory).float().log_softmax(-1).transpose(0, 1)
        # Frames too few for a text have no path, and infinite loss: they teach nothing, and count as 0.
        heard = F.ctc_loss(
            log_probabilities,
            texts[:, 1:],
            torch.tensor(left),
            torch.tensor(spelled),
            BLANK,
            reduction="sum",
            zero_infinity=True,
        ) / max(1, sum(spelled))
        return ctc * heard + (1 - ctc) * self.decoder.loss(texts, self.decoder.read(memory, left))

    @torch.no_grad()
    def transcribe(self, features: Tensor, lengths: list[int], max_length: int, **options: Any) -> list[list[int]]:
        """The tokens of each text by the decoder, as ``Decoder.write`` with its ``options``.

        Raises:
            RuntimeError: the model is in training.
        """
        check_evaluating(self)
        return self.decoder.write(self.encode(features, lengths), max_length, **options)

    @torch.no_grad()
    def spell(self, features: Tensor, lengths: list[int]) -> list[list[int]]:
        """The tokens of each text by CTC alone: the most probable of each frame, repetitions and blanks left out."""
        check_evaluating(self)
        memory, left = self.hear(features, lengths)
        rows = [row[:n] for row, n in zip(self.ctc(memory).argmax(-1), left, strict=True)]
        return [[token for token in row.unique_consecutive().tolist() if token != BLANK] for row in rows]

    @torch.no_grad()
    def alignments(self, features: Tensor, lengths: list[int], texts: Tensor) -> Tensor:
        """``[B, L, ceil(T / 4)]``: where in time each token looked, a mean over the last layer's heads."""
        check_evaluating(self)
        return self.decoder.alignments(texts, self.encode(features, lengths))
