"""The forecaster: patches, scales, implementations; windows and MASE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyattn.models.forecast import Forecaster, mase, windows


def model_of(attention="pyattn", **arguments):
    torch.manual_seed(0)
    sizes = {"patch": 8, "stride": 4, "dim": 32, "heads": 4, "layers": 2, "dropout": 0.0}
    model = Forecaster(30, 7, **(sizes | arguments), attention=attention).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def series_of(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patches_end_with_the_past():
    """Of 30 values the last 28 make patches of 8, 4 apart; the first two are not looked at but for the scale."""
    model, seen = model_of(), []
    model.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    past = series_of(2, 30)
    model(past)
    standard = (past - past.mean(1, keepdim=True)) / past.std(1, keepdim=True, unbiased=False)
    assert seen[0].shape == (2, 6, 8) and model.count == 6
    for n in range(6):
        assert torch.equal(seen[0][:, n], standard[:, 2 + 4 * n : 10 + 4 * n])


def test_implementations_agree():
    past, future, results = series_of(5, 30), series_of(5, 7, seed=2), {}
    for attention in ("naive", "torch", "pyattn"):
        model = model_of(attention)
        loss = model.loss(past, future)
        loss.backward()
        results[attention] = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
        assert all(x.abs().sum() > 0 for x in results[attention].values())
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=1e-9, atol=1e-11)


def test_a_past_that_does_not_vary_teaches_nothing():
    """Nor does it make the loss of the others another one."""
    model, past, future = model_of(), series_of(3, 30), series_of(3, 7, seed=2)
    alone = model.loss(past[:2], future[:2])
    for level in (0.0, 1e4):
        past[2] = level
        torch.testing.assert_close(model.loss(past, future), alone)
        assert model(past)[2].isfinite().all() and model.loss(past[2:], future[2:]) == 0


@given(scale=st.floats(1e-6, 1e3), level=st.floats(-1, 1))
def test_a_forecast_is_on_the_scale_of_its_past(scale, level):
    model, past = model_of(), series_of(2, 30)
    made, expected = model(scale * (past + level)), scale * (model(past) + level)
    torch.testing.assert_close(made / scale, expected / scale, rtol=1e-6, atol=1e-6)


def test_a_linear_map_of_the_whole_past_is_added():
    model, past = model_of(), series_of(2, 30)
    with torch.no_grad():
        model.linear.weight.zero_()
        attended = model(past)
        model.linear.weight[3, 0] = 1  # the fourth value is to be the first of the past, too, which no patch holds
    expected = attended.clone()
    expected[:, 3] += past[:, 0] - past.mean(1)
    torch.testing.assert_close(model(past), expected)


def test_channels_are_series_of_their_own():
    model, past = model_of(), series_of(2, 3, 30)
    made = model(past)
    assert made.shape == (2, 3, 7)
    torch.testing.assert_close(made[1, 2], model(past[1, 2]))


def test_the_loss_is_in_deviations_of_the_past():
    model, past, future = model_of(), series_of(2, 30), series_of(2, 7, seed=2)
    scale = torch.tensor([[1.0], [100.0]]).double()
    errors = (model(past) - future).abs() / past.std(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(model.loss(past, future), errors.mean())
    torch.testing.assert_close(model.loss(past * scale, future * scale), model.loss(past, future), rtol=1e-4, atol=0)


def test_it_learns_a_season():
    """Of waves of one length, and of phases and heights of their own; without the linear map, which could alone."""
    torch.manual_seed(0)
    time, phase, height = torch.arange(44), 6.3 * torch.rand(200, 1), 0.5 + torch.rand(200, 1)
    waves = 20 + height * torch.sin(time / 8 * 2 * torch.pi + phase)
    past, future = waves[:, :32], waves[:, 32:]
    model = Forecaster(32, 12, patch=4, dim=32, heads=2, layers=1, dropout=0.0)
    model.linear.requires_grad_(False)
    torch.testing.assert_close(model(past), past.mean(1, keepdim=True).expand(200, 12))
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(past[:150], future[:150]).backward()
        optimizer.step()
    assert (
        model.eval().loss(past[150:], future[150:]).item()
        < 0.1
        < 0.5
        < (future - past.mean(1, keepdim=True)).abs().mean()
    )


def test_windows_are_all_of_a_series():
    past, future = windows(torch.arange(8), past=4, horizon=2)
    assert past.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    assert future.tolist() == [[4, 5], [5, 6], [6, 7]]
    with pytest.raises(ValueError, match=r"series must have at least 8 \+ 3 values, got 10"):
        windows(torch.arange(10), 8, 3)


@given(
    known=st.lists(st.integers(-50, 50), min_size=4, max_size=20),
    season=st.integers(1, 3),
    errors=st.lists(st.integers(-9, 9), min_size=1, max_size=5),
)
def test_mase_is_its_definition(known, season, errors):
    series = np.array(known, dtype=float)
    scale = np.abs(series[season:] - series[:-season]).mean()
    future = torch.arange(len(errors)).float()
    call = (future + torch.tensor(errors), future, torch.tensor(known).float(), season)
    if scale == 0:
        with pytest.raises(ValueError, match="repeats itself exactly"):
            mase(*call)
    else:
        assert mase(*call) == pytest.approx(np.abs(errors).mean() / scale)


def test_mase_of_the_worked_example():
    """Hyndman & Athanasopoulos, "Forecasting: principles and practice": the naive forecast of what is known has 1."""
    known = torch.tensor([10.0, 12.0, 11.0, 15.0])
    assert mase(known[:-1], known[1:], known, season=1) == 1
    with pytest.raises(ValueError, match=r"season must lie in \[1, 3\], got 4"):
        mase(known, known, known, season=4)


def test_errors():
    with pytest.raises(ValueError, match="past must be at least patch=16, got 10"):
        Forecaster(10, 2)
    for name in ("horizon", "patch", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Forecaster(**({"past": 10, "horizon": 2, "patch": 2} | {name: 0}))
    with pytest.raises(ValueError, match=r"past must have shape \[..., 30\], got \[2, 29\]"):
        model_of()(series_of(2, 29))
    with pytest.raises(ValueError, match=r"future must have shape .*got \[2, 6\]"):
        model_of().loss(series_of(2, 30), series_of(2, 6))
    with pytest.raises(ValueError, match="forecast must have shape"):
        mase(torch.zeros(3), torch.zeros(2), torch.arange(5.0), 1)
    with pytest.raises(TypeError, match="past must"):
        model_of()(torch.arange(30))
