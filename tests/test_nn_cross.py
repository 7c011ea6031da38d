"""``CrossAttention``: torch's multi-head attention over a memory that is projected once."""

from __future__ import annotations

import pytest
import torch

from pyattn.nn import CrossAttention

E, M, H = 24, 20, 3
by_attention = pytest.mark.parametrize("attention", ["pyattn", "naive", "torch"])


def pair_of(attention="pyattn", bias=True):
    """The module, and torch's with the same weights."""
    module = CrossAttention(E, H, memory_dim=M, bias=bias, attention=attention, dtype=torch.float64)
    peer = torch.nn.MultiheadAttention(E, H, bias=bias, kdim=M, vdim=M, batch_first=True, dtype=torch.float64)
    key, value = module.kv_proj.weight.detach().chunk(2)
    weights = {"q_proj_weight": module.q_proj.weight, "k_proj_weight": key, "v_proj_weight": value}
    weights["out_proj.weight"] = module.out_proj.weight
    if bias:
        with torch.no_grad():
            for part in (module.q_proj, module.kv_proj, module.out_proj):
                part.bias.normal_()
        weights["in_proj_bias"] = torch.cat((module.q_proj.bias, module.kv_proj.bias))
        weights["out_proj.bias"] = module.out_proj.bias
    peer.load_state_dict({name: x.detach() for name, x in weights.items()})
    return module, peer


@by_attention
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_module(attention, bias):
    module, peer = pair_of(attention, bias)
    x, memory = torch.randn(2, 5, E).double(), torch.randn(2, 7, M).double()
    lengths = torch.tensor([7, 3])
    for given in (None, lengths, [7, 3]):
        padding = None if given is None else torch.arange(7) >= lengths[:, None]
        inputs = [t.clone().requires_grad_() for t in (x, memory)]
        out = module(inputs[0], module.project(inputs[1]), lengths=given, residual=x)
        expected, weights = peer(inputs[0], inputs[1], inputs[1], padding)
        torch.testing.assert_close(out, expected + x)
        ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected + x))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(module.weights(x, module.project(memory), lengths=given), weights)


@by_attention
def test_samples_of_one_memory(attention):
    """Hypotheses 0 to 2 read memory 0, and 3 to 5 memory 1."""
    module, _ = pair_of(attention)
    x, memory = torch.randn(6, 4, E).double(), torch.randn(2, 7, M).double()
    together = module(x, module.project(memory), lengths=[7, 2], residual=x)
    weights = module.weights(x, module.project(memory), lengths=[7, 2])
    for n in range(6):
        b, length = n // 3, (7, 2)[n // 3]
        alone = module.project(memory[b : b + 1, :length])
        torch.testing.assert_close(together[n], module(x[n : n + 1], alone)[0] + x[n])
        torch.testing.assert_close(weights[n, :, :length], module.weights(x[n : n + 1], alone)[0])
        assert not weights[n, :, length:].any()


def test_a_mask():
    module, peer = pair_of()
    x, memory = torch.randn(2, 5, E).double(), torch.randn(2, 7, M).double()
    mask = torch.rand(5, 7) < 0.7
    mask[:, 0] = True
    out = module(x, module.project(memory), attn_mask=mask)
    torch.testing.assert_close(out, peer(x, memory, memory, attn_mask=~mask)[0])


def test_dropout_is_for_training():
    module = CrossAttention(E, H, dropout=0.5)
    x, memory = torch.randn(2, 5, E), module.project(torch.randn(2, 7, E))
    assert not torch.equal(module(x, memory), module(x, memory))
    module.eval()
    assert torch.equal(module(x, memory), module(x, memory))


def test_names_of_parameters():
    names = [f"{part}.{kind}" for part in ("q_proj", "kv_proj", "out_proj") for kind in ("weight", "bias")]
    assert list(CrossAttention(E, H).state_dict()) == names


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "embed_dim must be an int", {"embed_dim": 1.5}),
        (ValueError, "num_heads must be at least 1, got 0", {"num_heads": 0}),
        (ValueError, "embed_dim must be a multiple of num_heads = 5, got 24", {"num_heads": 5}),
        (ValueError, "memory_dim must be at least 1", {"memory_dim": 0}),
        (TypeError, "bias must be a bool", {"bias": 1}),
        (ValueError, r"dropout must lie in \[0, 1\], got 2", {"dropout": 2}),
        (ValueError, "attention must be one of", {"attention": "sdpa"}),
    ],
)
def test_construction_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        CrossAttention(**({"embed_dim": E, "num_heads": H} | arguments))


@pytest.mark.parametrize("name", ["q_proj", "kv_proj", "out_proj"])
def test_a_part_that_is_no_linear(name):
    """Its weight would be read, and what it adds left out."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    module = CrossAttention(E, H)
    setattr(module, name, Adapted(E, 2 * E if name == "kv_proj" else E))
    x = torch.randn(2, 5, E)
    with pytest.raises(TypeError, match=f"{name} must be a torch.nn.Linear: its weight is read, got Adapted"):
        module(x, module.project(x))


def test_call_errors():
    module = CrossAttention(E, H, memory_dim=M)
    x, memory = torch.randn(2, 5, E), module.project(torch.randn(2, 7, M))
    for error, message, call in (
        (ValueError, r"memory must have shape \[B, S, M\] with M = 20", lambda: module.project(x)),
        (TypeError, "memory must be torch.Tensor|memory must be a", lambda: module.project([1])),
        (ValueError, r"x must have shape \[N, L, E\] with E = 24", lambda: module(x[0], memory)),
        (TypeError, "memory must be the pair that project returns, got Tensor", lambda: module(x, memory[0])),
        (ValueError, "x must have a multiple of the memory's 2 samples, got 3", lambda: module(x[[0, 0, 1]], memory)),
        (ValueError, r"lengths must lie in \[0, 7\], got \[8, 1\]", lambda: module(x, memory, lengths=[8, 1])),
        (TypeError, "lengths must be int32 or int64", lambda: module(x, memory, lengths=torch.ones(2))),
        (ValueError, r"lengths must have shape \[B\]", lambda: module(x, memory, lengths=torch.ones(3).int())),
        (ValueError, r"residual must have shape \[N, L, E\]", lambda: module(x, memory, residual=x[:, :1])),
    ):
        with pytest.raises(error, match=message):
            call()
