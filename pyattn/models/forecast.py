"""Time series: a past is a sequence of patches, from which the values to come are read (Nie et al. 2023: PatchTST).

arXiv:2211.14730. Series are normalised one by one, and what is forecast is brought back to their scale (Kim et al.
2022, "Reversible instance normalization"), so that one model serves series of any level. A linear map goes from the
past to what follows, beside the Transformer (Das et al. 2023: TiDE, arXiv:2304.08424): it is what a short series
teaches well, and what it misses is left to attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyattn import checks
from pyattn.models.blocks import Encoder, Sizes
from pyattn.nn.implementations import Implementation


class Forecaster(nn.Module):
    """The past of series [..., past] -> what follows [..., horizon].

    Several series of one event, such as [B, channels, past], are forecast each for itself by the same weights.

    Args:
        past: values that are looked at.
        horizon: values that are forecast.
        patch: values of a patch.
        stride: values between the starts of patches; None for ``patch``. The last patch ends with the past, the first
            begins a whole number of strides before it.
        dim: of the residual stream.
        heads: a divisor of dim.
        layers: of the encoder.
        hidden: of the MLPs; None for 2 * dim.
        dropout: of what each part adds, and of the embeddings, in training.
        attention: "naive", "torch" or "pyattn", as of ``pyattn.nn.GroupedQueryAttention``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> model = Forecaster(96, 24, patch=8, dim=32, heads=4, layers=2).eval()
        >>> past = torch.sin(torch.arange(96) / 5).expand(3, 96)
        >>> model(past).shape
        torch.Size([3, 24])
        >>> torch.testing.assert_close(model(20 * past + 7), 20 * model(past) + 7, rtol=1e-4, atol=1e-3)
    """

    def __init__(
        self,
        past: int,
        horizon: int,
        *,
        patch: int = 16,
        stride: int | None = None,
        dim: int = 128,
        heads: int = 4,
        layers: int = 3,
        hidden: int | None = None,
        dropout: float = 0.2,
        attention: Implementation = "pyattn",
    ) -> None:
        super().__init__()
        stride = patch if stride is None else stride
        for name, number in (("horizon", horizon), ("patch", patch), ("stride", stride)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if past < patch:
            raise ValueError(f"past must be at least patch={patch}, got {past}")
        self.past, self.horizon, self.patch, self.stride = past, horizon, patch, stride
        self.count = (past - patch) // stride + 1
        self.project = nn.Linear(patch, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(self.count, dim))
        self.dropout = nn.Dropout(dropout)
        sizes = Sizes(dim, heads, 2 * dim if hidden is None else hidden, dropout, attention, activation=nn.GELU)
        self.encoder = Encoder(layers, sizes)
        self.head = nn.Linear(self.count * dim, horizon)
        self.linear = nn.Linear(past, horizon, bias=False)
        for parameter in (*self.head.parameters(), *self.linear.parameters()):
            nn.init.zeros_(parameter)  # at first the mean of the past is forecast

    def forward(self, past: Tensor) -> Tensor:
        checks.check_tensor("past", past, checks.FLOAT_DTYPES)
        if past.dim() < 1 or past.shape[-1] != self.past:
            raise ValueError(f"past must have shape [..., {self.past}], got {list(past.shape)}")
        series = past.reshape(-1, self.past)
        mean, scale, _ = _level(series)
        level = (series - mean) / scale
        used = self.patch + (self.count - 1) * self.stride
        patches = level[:, -used:].unfold(-1, self.patch, self.stride)
        x = self.encoder(self.dropout(self.project(patches) + self.positions))
        forecast = self.head(x.flatten(1)) + self.linear(level)
        return (forecast * scale + mean).view(*past.shape[:-1], self.horizon)

    def loss(self, past: Tensor, future: Tensor) -> Tensor:
        """Mean absolute error, each series in standard deviations of its past: ``[..., past]``, ``[..., horizon]``.

        Series whose past does not vary have no such unit, and teach nothing.
        """
        forecast = self(past)
        checks.check_shape("future", future, tuple(forecast.shape), "[..., horizon]")
        _, scale, varies = _level(past)
        return ((forecast - future).abs() / scale * varies).sum() / (varies.sum() * self.horizon).clamp(min=1)


def _level(series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each series ``[..., 1]``: its mean, its standard deviation, 1 if it does not vary, and whether it does."""
    mean, deviation = series.mean(-1, keepdim=True), series.std(-1, keepdim=True, unbiased=False)
    varies = deviation > 1e-6 * mean.abs()
    return mean, torch.where(varies, deviation, 1), varies


def windows(series: Tensor, past: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All pasts ``[n, past]`` of a series ``[N]`` with what follows each ``[n, horizon]``, from the start on.

    Raises:
        ValueError: the series is too short for one.

    Example:
        >>> import torch
        >>> windows(torch.arange(5), past=3, horizon=1)
        (tensor([[0, 1, 2],
                [1, 2, 3]]), tensor([[3],
                [4]]))
    """
    if len(series) < past + horizon:
        raise ValueError(f"series must have at least {past} + {horizon} values, got {len(series)}")
    both = series.unfold(0, past + horizon, 1)
    return both[:, :past], both[:, past:]


def mase(forecast: Tensor, future: Tensor, known: Tensor, season: int) -> float:
    """Mean absolute scaled error (Hyndman & Koehler 2006, doi:10.1016/j.ijforecast.2006.03.001).

    1 is how far, on average, the values of the series that are known lie from those a season before.

    Args:
        forecast: ``[..., horizon]``.
        future: what came, in the same shape.
        known: ``[N]``, the series up to what is forecast.
        season: values that the naive forecast goes back, less than N.

    Raises:
        ValueError: the known series repeats itself exactly, or is no longer than a season.

    Example:
        >>> import torch
        >>> known = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> mase(torch.tensor([5.0, 5.0]), torch.tensor([5.0, 6.0]), known, season=1)
        0.5
    """
    checks.check_shape("forecast", forecast, tuple(future.shape), "[..., horizon] of future")
    if not 1 <= season < len(known):
        raise ValueError(f"season must lie in [1, {len(known) - 1}], got {season}")
    scale = (known[season:] - known[:-season]).abs().double().mean().item()
    if scale == 0:
        raise ValueError("known must differ from itself a season before, got a series that repeats itself exactly")
    return (forecast - future).abs().double().mean().item() / scale
