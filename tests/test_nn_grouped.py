"""``pyattn.nn.GroupedQueryAttention`` against a composition of torch's operations."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyattn
from pyattn.nn import GroupedQueryAttention, RotaryEmbedding
from pyattn.testing import DTYPES, assert_close

E, D = 40, 16
by_attention = pytest.mark.parametrize("attention", ["pyattn", "naive", "torch"])


def turn(x, angles, interleaved):
    """As complex numbers."""
    R = 2 * angles.shape[-1]
    part = x[..., :R].unflatten(-1, (-1, 2)) if interleaved else x[..., :R].unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(torch.view_as_complex(part.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    turned = turned if interleaved else turned.mT
    return torch.cat((turned.flatten(-2), x[..., R:]), -1)


def composed(module, x, attn_mask=None, positions=None, residual=None):
    """What everybody would write, with a mask in full."""
    B, L, _ = x.shape
    Hq, Hkv, D = module.num_heads, module.num_kv_heads, module.head_dim
    q, k, v = module.qkv_proj(x).split((Hq * D, Hkv * D, Hkv * D), -1)
    q, k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in (q, k, v))
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.rotary is not None:
        R = module.rotary.dim
        positions = torch.arange(L).expand(B, L) if positions is None else positions.expand(B, L)
        frequencies = module.rotary.base ** -(torch.arange(0, R, 2, dtype=x.dtype) / R)
        angles = (positions[..., None].to(x.dtype) * frequencies)[:, None]
        q, k = (turn(y, angles, module.rotary.interleaved) for y in (q, k))
    k, v = (y.repeat_interleave(Hq // Hkv, 1) for y in (k, v))
    scores = q @ k.mT * (D**-0.5 if module.scale is None else module.scale)
    if module.softcap:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    distance = torch.arange(L) - torch.arange(L)[:, None]  # of the key, from the query
    left, right = module.window or (None, None)
    hidden = distance > 0 if module.is_causal else torch.zeros(L, L, dtype=torch.bool)
    hidden = hidden if left is None else hidden | (distance < -left)
    hidden = hidden if right is None else hidden | (distance > right)
    scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    out = module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out if residual is None else out + residual


@st.composite
def calls(draw, attention):
    Hkv, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    B, L = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    rotary = None
    if draw(st.booleans()):
        rotary = RotaryEmbedding(
            draw(st.sampled_from([D, 6])), 50, base=draw(st.sampled_from([1e4, 50.0])), interleaved=draw(st.booleans())
        )
    sides = st.one_of(st.none(), st.integers(0, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module = GroupedQueryAttention(
        E, Hkv * group, Hkv, head_dim=D, bias=draw(st.booleans()), rotary=rotary, qk_norm=draw(st.booleans()),
        is_causal=draw(st.booleans()), window=draw(st.one_of(st.none(), st.tuples(sides, sides))),
        softcap=draw(st.sampled_from([None, 2.0])) if attention != "torch" else None,
        scale=draw(st.sampled_from([None, 0.5])), attention=attention,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.3)
    kind = draw(st.sampled_from([None, "bool", "float"]))
    arguments = {}
    if kind:
        shape = draw(st.sampled_from([(L, L), (B, 1, 1, L), (B, Hkv * group, L, L)]))
        arguments["attn_mask"] = torch.randn(shape)
        if kind == "bool":  # a token sees itself
            arguments["attn_mask"] = (torch.rand(shape) < 0.7) | torch.eye(L, dtype=torch.bool)
            if shape[-2] == 1:
                arguments["attn_mask"] = torch.ones(shape, dtype=torch.bool)
    if draw(st.booleans()):
        arguments["residual"] = torch.randn(B, L, E)
    if rotary is not None and draw(st.booleans()):
        arguments["positions"] = torch.randint(0, 50, draw(st.sampled_from([(L,), (B, L)])))
    return module, torch.randn(B, L, E), arguments


def results(function, module, x, arguments):
    leaves = {"x": x.clone().requires_grad_()} | {
        name: y.clone().requires_grad_(y.is_floating_point()) for name, y in arguments.items()
    }
    module.zero_grad()
    out = function(**leaves)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    grads = {name: y.grad for name, y in leaves.items() if y.requires_grad}
    return {"out": out.detach()} | grads | {name: p.grad for name, p in module.named_parameters()}


@by_attention
@settings(max_examples=100)
@given(data=st.data())
def test_output_and_gradients_are_those_of_the_composition(attention, data):
    module, x, arguments = data.draw(calls(attention))
    found = results(module, module, x, arguments)
    expected = results(lambda **leaves: composed(module, **leaves), module, x, arguments)
    for name, y in expected.items():
        torch.testing.assert_close(found[name], y, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@by_attention
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [(2, 0), (2, None), (None, 1), (1, 3)], ids=str)
def test_windows(window, is_causal, attention):
    module = GroupedQueryAttention(E, 4, 2, window=window, is_causal=is_causal, attention=attention)
    x = torch.randn(2, 9, E)
    torch.testing.assert_close(module(x), composed(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_path_equals_the_composition(dtype, engine):
    """By the rule that holds kernels to the reference."""
    rotary = RotaryEmbedding(12, 100)
    module = GroupedQueryAttention(E, 4, 2, head_dim=D, rotary=rotary, qk_norm=True, window=(30, 0)).to(dtype)
    x, residual = torch.randn(2, 90, E).to(dtype), torch.randn(2, 90, E).to(dtype)

    def compose(dtype):
        w = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
        q, k, v = pyattn.qkv_projection(
            x.to(dtype), w["qkv_proj.weight"], num_heads=4, num_kv_heads=2, rotary=rotary(),
            q_norm=w["q_norm.weight"], k_norm=w["k_norm.weight"], backend="reference",
        )  # fmt: skip
        heads = pyattn.attention(q, k, v, causal=True, window=(30, 0), backend="reference")
        return pyattn.output_projection(heads, w["out_proj.weight"], residual=residual.to(dtype), backend="reference")

    with engine.at_work():
        out = module(x, residual=residual)
    assert_close(out, [compose(dtype)], compose(torch.float64))


@by_attention
def test_dynamic_rotary_follows_the_length(attention):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    rotary = RotaryEmbedding(D, 32, scaling=scaling)
    module = GroupedQueryAttention(E, 4, 2, head_dim=D, rotary=rotary, attention=attention)
    plain = GroupedQueryAttention(E, 4, 2, head_dim=D, rotary=RotaryEmbedding(D, 32), attention=attention)
    plain.load_state_dict(module.state_dict())
    short, long = torch.randn(1, 8, E), torch.randn(1, 20, E)
    assert torch.equal(module(short), plain(short))
    stretched = copy.deepcopy(plain)
    stretched.rotary = RotaryEmbedding(D, 32, base=1e4 * (2 * 20 / 8 - 1) ** (D / (D - 2)))
    torch.testing.assert_close(module(long), stretched(long), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(long), plain(long), atol=1e-3)


@by_attention
def test_dropout_only_in_training(attention):
    module, x = GroupedQueryAttention(E, 4, 2, head_dim=D, dropout=0.5, attention=attention), torch.randn(2, 9, E)
    expected = composed(module, x)
    torch.testing.assert_close(module.eval()(x), expected, rtol=1e-4, atol=1e-5)
    module.train()
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.allclose(first, second, atol=1e-3)
    draws = torch.stack([module(x).detach() for _ in range(400)])
    error = (draws.mean(0) - expected.detach()).abs() / (draws.std(0) / 400**0.5).clamp(min=1e-7)
    assert error[:, 1:].max() < 6


def test_parameters_and_copies():
    rotary = RotaryEmbedding(D, 32)
    module = GroupedQueryAttention(E, 4, 2, head_dim=D, bias=True, qk_norm=True, rotary=rotary, dtype=torch.bfloat16)
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    assert shapes == {
        "qkv_proj.weight": (8 * D, E), "qkv_proj.bias": (8 * D,), "out_proj.weight": (E, 4 * D), "out_proj.bias": (E,),
        "q_norm.weight": (D,), "k_norm.weight": (D,),
    }  # fmt: skip
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    x = torch.randn(2, 9, E, dtype=torch.bfloat16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    assert module.rotary.cos.dtype == torch.float32
    assert GroupedQueryAttention(E, 5).num_kv_heads == 5 and GroupedQueryAttention(E, 5).head_dim == 8
    assert "40, 4, 2, head_dim=16, is_causal=True, window=None, attention='pyattn'" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    module = GroupedQueryAttention(E, 4, 2, head_dim=D, qk_norm=True, rotary=RotaryEmbedding(D, 32))
    x = torch.randn(2, 9, E)
    with torch.autocast("cpu", dtype):
        out = module(x)
        wide = module(x, residual=x)
    assert out.dtype == dtype and wide.dtype == torch.float32
    torch.testing.assert_close(out.float(), composed(module, x), rtol=3e-2, atol=3e-2)
    wide.sum().backward()
    assert module.qkv_proj.weight.grad.dtype == torch.float32 and module.q_norm.weight.grad.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(dynamic):
    torch._dynamo.reset()
    module = GroupedQueryAttention(E, 4, 2, head_dim=D, qk_norm=True, rotary=RotaryEmbedding(D, 64), window=(5, 0))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (9, 17):
        x = torch.randn(2, length, E)
        expected, found = (results(m, module, x, {}) for m in (module, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shapes = {"x": {1: torch.export.Dim("length", max=64)}} if dynamic else None
    exported = torch.export.export(module, (torch.randn(2, 9, E),), dynamic_shapes=shapes)
    x = torch.randn(2, 23 if dynamic else 9, E)
    torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


BAD = [
    (TypeError, "embed_dim must be an int, got float", {"embed_dim": 40.0}),
    (ValueError, "num_heads must be at least 1, got 0", {"num_heads": 0}),
    (ValueError, "num_heads must be a multiple of num_kv_heads = 3, got 4", {"num_kv_heads": 3}),
    (ValueError, "embed_dim must be a multiple of num_heads = 3, or head_dim given, got 40",
     {"num_heads": 3, "num_kv_heads": 1}),
    (ValueError, "head_dim must be at least 1, got -1", {"head_dim": -1}),
    (TypeError, "rotary must be a pyattn.nn.RotaryEmbedding, got Rotary", {"rotary": RotaryEmbedding(4, 5)()}),
    (ValueError, "rotary must turn at most the 10 elements of a head, got 16", {"rotary": RotaryEmbedding(16, 5)}),
    (TypeError, "bias must be a bool", {"bias": None}),
    (TypeError, "qk_norm must be a bool", {"qk_norm": 1}),
    (TypeError, "is_causal must be a bool", {"is_causal": "yes"}),
    (ValueError, "window must hold sizes of at least 0", {"window": (-1, 0)}),
    (TypeError, "window must be a pair", {"window": 3}),
    (ValueError, r"dropout must lie in \[0, 1\], got 1.5", {"dropout": 1.5}),
    (ValueError, "softcap must be positive", {"softcap": -1.0}),
    (NotImplementedError, 'attention="torch" has no softcap', {"softcap": 1.0, "attention": "torch"}),
    (TypeError, "scale must be a number", {"scale": "1"}),
    (ValueError, "attention must be one of pyattn, naive, torch, got 'sdpa'", {"attention": "sdpa"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD, ids=[case[1] for case in BAD])
def test_bad_constructor(error, match, overrides):
    with pytest.raises(error, match=match):
        GroupedQueryAttention(**{"embed_dim": E, "num_heads": 4, "num_kv_heads": 2} | overrides)


z = torch.zeros
BAD_CALLS = [
    (TypeError, "x must be a tensor", {"x": None}),
    (ValueError, r"x must have shape \[B, L, E\] with E = 40, got \[2, 5, 39\]", {"x": z(2, 5, 39)}),
    (ValueError, r"x must have shape \[B, L, E\] with E = 40, got \[5, 40\]", {"x": z(5, E)}),
    (TypeError, "weight must be float64, got float32", {"x": z(2, 5, E, dtype=torch.float64)}),
    (ValueError, "length must be at most max_positions = 12, got 13", {"x": z(2, 13, E)}),
    (ValueError, r"attn_mask must be broadcastable to \[B, Hq, Lq, Lk\]", {"attn_mask": z(2, 5)}),
    (ValueError, r"positions must have shape \[L\] = \[5\]", {"positions": z(4, dtype=torch.int64)}),
    (ValueError, r"positions must lie in \[0, 11\]", {"positions": torch.full((5,), 12)}),
    (ValueError, r"residual must have shape \[B, L, E\] = \[2, 5, 40\], got \[2, 5, 1\]", {"residual": z(2, 5, 1)}),
]


@pytest.mark.parametrize(("error", "match", "overrides"), BAD_CALLS, ids=[case[1] for case in BAD_CALLS])
def test_bad_calls(error, match, overrides):
    module = GroupedQueryAttention(E, 4, 2, rotary=RotaryEmbedding(4, 12))
    with pytest.raises(error, match=match):
        module(**{"x": z(2, 5, E)} | overrides)


class Adapted(nn.Module):
    """Has the weight of a Linear, and adds to what that computes."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


def test_parts_that_compute_something_else_are_refused():
    """They are not called, so what they add would be missing."""
    x = torch.randn(2, 5, E)
    for name in ("qkv_proj", "out_proj"):
        module = GroupedQueryAttention(E, 4, 2)
        setattr(module, name, Adapted(getattr(module, name)))
        with pytest.raises(TypeError, match=f"{name} must be a torch.nn.Linear: its weight is read, got Adapted"):
            module(x)
    for norm in (nn.LayerNorm(10), pyattn.nn.RMSNorm(10, elementwise_affine=False)):
        module = GroupedQueryAttention(E, 4, 2, qk_norm=True)
        module.k_norm = norm
        with pytest.raises(TypeError, match="k_norm must be an RMSNorm with a weight, which is read, got"):
            module(x)
    module = GroupedQueryAttention(E, 4, 2, qk_norm=True)
    module.q_norm.eps = module.k_norm.eps = None
    torch.testing.assert_close(module(1e-3 * x), composed(module, 1e-3 * x), rtol=1e-4, atol=1e-6)
    module.q_norm.eps = module.k_norm.eps = 0.5
    torch.testing.assert_close(module(x), composed(module, x), rtol=1e-4, atol=1e-5)
    module.k_norm.eps = 1.0
    with pytest.raises(ValueError, match=r"k_norm must have the eps of q_norm, 0.5, got 1.0"):
        module(x)
    weighted = nn.utils.parametrizations.weight_norm(GroupedQueryAttention(E, 4, 2).qkv_proj)
    module.k_norm.eps, module.qkv_proj = 0.5, weighted  # a parametrized Linear is one
    torch.testing.assert_close(module(x), composed(module, x), rtol=1e-4, atol=1e-5)


def test_positions_need_rotary():
    with pytest.raises(ValueError, match="positions must come with rotary"):
        GroupedQueryAttention(E, 4)(z(2, 5, E), positions=torch.arange(5))


def test_torchs_own_attention_is_called_without_a_mask_where_it_can_be():
    module = GroupedQueryAttention(E, 4, 2, attention="torch")
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        module(torch.randn(2, 5, E))
    _, _, _, mask, _, is_causal = attention.call_args.args
    assert mask is None and is_causal


@by_attention
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths_are_padding(attention, is_causal):
    """Each sample of a padded batch gives what it gives alone, gradients included, whatever the padding holds."""
    module = GroupedQueryAttention(E, 4, 2, is_causal=is_causal, attention=attention, dtype=torch.float64)
    x, lengths = torch.randn(3, 9, E).double().requires_grad_(), [9, 4, 1]
    for numbers in (lengths, torch.tensor(lengths)):
        out = module(x, lengths=numbers)
        (gradient,) = torch.autograd.grad(sum(out[b, :n].square().sum() for b, n in enumerate(lengths)), x)
        for b, n in enumerate(lengths):
            alone = x[b : b + 1, :n].detach().requires_grad_()
            expected = module(alone)
            torch.testing.assert_close(out[b, :n], expected[0])
            (of_alone,) = torch.autograd.grad(expected.square().sum(), alone)
            torch.testing.assert_close(gradient[b, :n], of_alone[0])
            assert not gradient[b, n:].any()


@by_attention
@pytest.mark.parametrize("is_causal", [True, False])
def test_weights_are_those_of_the_output(attention, is_causal):
    """With each head's own values put together by them, they give the output."""
    torch.manual_seed(0)
    rotary = RotaryEmbedding(8, max_positions=9)
    module = GroupedQueryAttention(
        E, 4, 2, head_dim=D, rotary=rotary, qk_norm=True, is_causal=is_causal, window=(3, 3), attention=attention
    ).double()
    x, lengths = torch.randn(2, 9, E, dtype=torch.float64), [9, 5]
    more = {"lengths": lengths, "positions": torch.tensor([3, 0, 7, 1, 8, 2, 5, 4, 6])}
    more["attn_mask"] = torch.eye(9, dtype=torch.bool) | (torch.rand(9, 9) < 0.7)
    weights = module.weights(x, **more)
    assert weights.shape == (2, 9, 9) and not weights[1, :, 5:].any()
    torch.testing.assert_close(weights[:, :5].sum(-1), torch.ones(2, 5).double())
    if is_causal:
        assert not weights.triu(1).any()
    assert not weights.tril(-4).any() and not weights.triu(4).any() and not weights[:, ~more["attn_mask"]].any()
    # One value for all heads, which the output hands on: what is left is the mean of the heads' weights.
    with torch.no_grad():
        v = module.qkv_proj.weight[(4 + 2) * D :]
        v.copy_(torch.randn(D, E).repeat(2, 1))
        module.out_proj.weight.zero_()
        for head in range(4):
            module.out_proj.weight[:D, head * D : (head + 1) * D] = torch.eye(D) / 4
    values = x @ module.qkv_proj.weight[(4 + 2) * D : (4 + 3) * D].T
    torch.testing.assert_close((weights @ values)[0], module(x, **more)[0, :, :D])
    torch.testing.assert_close((weights @ values)[1, :5], module(x, **more)[1, :5, :D])
    with pytest.raises(ValueError, match=f"x must have shape .* E = {E}, got"):
        module.weights(x[..., :-1])
