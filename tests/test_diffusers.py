"""``set_attention_backend("pyattn")`` against diffusers' own native attention."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch

from pyattn.integrations import diffusers as integration

integration.register()


@pytest.fixture
def ours(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return integration.attention(*args, **kwargs)

    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, attention_dispatch.AttentionBackendName("pyattn"), counted)
    return calls


def test_the_name_is_a_member():
    before = len(attention_dispatch.AttentionBackendName)
    integration.register()
    names = attention_dispatch.AttentionBackendName
    assert len(names) == before and names("pyattn") is names.PYATTN and names.PYATTN.value == "pyattn"
    assert names.PYATTN in list(names) and names.NATIVE == "native"


@pytest.mark.parametrize(
    "mask",
    [None, torch.rand(2, 7) < 0.7, torch.rand(2, 1, 1, 7) < 0.7, torch.randn(2, 4, 5, 7)],
    ids=["none", "keys", "bool", "float"],
)
def test_dispatch(mask, ours):
    q, k, v = (torch.randn(2, n, 4, 16) for n in (5, 7, 7))
    results = []
    for backend in ("native", "pyattn"):
        with attention_dispatch.attention_backend(backend):
            results.append(attention_dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask, scale=0.3))
    torch.testing.assert_close(results[1], results[0])
    assert len(ours) == 1


def test_a_model(ours):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(6, 3),
    }
    with torch.no_grad():
        expected = model(**inputs).sample
        model.set_attention_backend("pyattn")
        torch.testing.assert_close(model(**inputs).sample, expected)
    assert len(ours) == 2
