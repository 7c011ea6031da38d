"""``pyattn.nn.MultiheadAttention`` against torch's, which is the oracle for all but rows that see no key."""

from __future__ import annotations

import copy
import ctypes
import io
import itertools
import pickle
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pyattn
from pyattn import measure, projection_ops
from pyattn.nn import MultiheadAttention
from pyattn.testing import DTYPES, assert_close

E, H = 24, 4
by_attention = pytest.mark.parametrize("attention", ["pyattn", "naive", "torch"])
by_layout = pytest.mark.parametrize("batch_first", [False, True])


class Call(NamedTuple):
    """A pair of modules with equal parameters, and what they are called with."""

    torchs: torch.nn.MultiheadAttention
    ours: MultiheadAttention
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    arguments: dict[str, Any]


def pair(dtype=torch.float32, attention="pyattn", **constructor):
    """The two modules, in training, with biases that are not 0."""
    torchs = torch.nn.MultiheadAttention(E, H, **constructor, dtype=dtype)
    with torch.no_grad():
        for name, x in torchs.named_parameters():
            if "bias" in name:
                x.normal_()
    ours = MultiheadAttention(E, H, **constructor, dtype=dtype, attention=attention)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def results(module, inputs, arguments):
    """Outputs, and the gradients of everything that has one, through all outputs."""
    query, key, value = inputs
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}
    given = {
        name: x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    module.zero_grad()
    out, weights = module(leaves[id(query)], leaves[id(key)], leaves[id(value)], **given)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in (out, weights) if x is not None
    )
    loss.backward()
    found = {"out": out.detach(), "weights": None if weights is None else weights.detach()}
    named = [*zip(("query", "key", "value"), (leaves[id(x)] for x in inputs), strict=True), *given.items()]
    named += module.named_parameters()
    return found | {f"grad of {name}": x.grad for name, x in named if isinstance(x, torch.Tensor)}


def check_same(call):
    torchs, ours = (results(module, call.inputs, call.arguments) for module in (call.torchs, call.ours))
    assert torchs.keys() == ours.keys()
    for name, x in torchs.items():
        if name in ("grad of attn_mask", "grad of key_padding_mask") and ours[name] is None:
            assert x is None or not call.arguments[name.removeprefix("grad of ")].is_floating_point()
            continue
        torch.testing.assert_close(ours[name], x, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-5, atol=1e-5)


def sequences(shape_q, shape_k, shape_v, batch_first, batched):
    """Random tensors ``[N, L, E]`` in the layout of the module."""
    made = [torch.randn(shape) for shape in (shape_q, shape_k, shape_v)]
    if not batched:
        return [x[0] for x in made]
    return made if batch_first else [x.transpose(0, 1).contiguous() for x in made]


@st.composite
def calls(draw, attention="pyattn"):
    """Every kind of call that torch's module answers without NaN: each query sees one of the keys."""
    N, L, S = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    batched, batch_first = draw(st.booleans()), draw(st.booleans())
    N = N if batched else 1
    same = draw(st.sampled_from(["all", "key and value", "query and value", "query and key", "none"]))
    S = L if same in ("all", "query and value", "query and key") else S
    constructor = {"bias": draw(st.booleans()), "batch_first": batch_first}
    constructor |= {"add_bias_kv": draw(st.booleans()), "add_zero_attn": draw(st.booleans())}
    kdim = vdim = E
    if draw(st.booleans()):
        kdim = E if same in ("all", "query and key") else draw(st.sampled_from([E, 7]))
        vdim = {"all": E, "key and value": kdim, "query and value": E}.get(same, draw(st.sampled_from([E, 10])))
        constructor |= {"kdim": kdim, "vdim": vdim}
    torch.manual_seed(draw(st.integers(0, 2**31)))
    query, key, value = sequences((N, L, E), (N, S, kdim), (N, S, vdim), batch_first, batched)
    if same == "all":
        key = value = query
    elif same == "key and value":
        value = key
    elif same == "query and value":
        value = query
    elif same == "query and key":
        key = query

    arguments: dict[str, Any] = {}
    visible = draw(st.integers(0, S - 1))
    kind = draw(st.sampled_from([None, "bool", "float", "float, -inf", "causal", "causal, bool"]))
    shape = draw(st.sampled_from([(L, S), (N * H, L, S)]))
    if kind in ("bool", "float, -inf"):
        hidden = torch.rand(shape) < 0.5
        hidden[..., visible] = False
        arguments["attn_mask"] = hidden if kind == "bool" else torch.randn(shape).masked_fill(hidden, -torch.inf)
    elif kind == "float":
        arguments["attn_mask"] = torch.randn(shape)
    elif kind:
        visible = 0
        hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
        float_mask = torch.zeros(L, S).masked_fill(hidden, -torch.inf)
        arguments["attn_mask"] = hidden if kind == "causal, bool" else float_mask
        # With added keys torch's two ways of computing differ: test_the_hint_of_causal.
        added = constructor["add_bias_kv"] or constructor["add_zero_attn"]
        arguments["is_causal"] = not added and draw(st.booleans())
    kind = draw(st.sampled_from([None, "bool", "float", "float, -inf", "right", "left"]))
    if kind:
        padding = torch.rand(N, S) < 0.5
        if kind in ("right", "left"):
            lengths = torch.randint(1, S + 1, (N, 1))
            padding = torch.arange(S) >= lengths if kind == "right" else torch.arange(S) < S - lengths
            visible_to_all = 0 if kind == "right" else S - 1
            if "attn_mask" in arguments and visible_to_all != visible:
                padding = torch.zeros(N, S, dtype=torch.bool)
        padding[:, visible] = False
        if kind in ("float", "float, -inf"):
            padding = torch.randn(N, S).masked_fill(padding & (kind != "float"), -torch.inf)
        arguments["key_padding_mask"] = padding if batched else padding[0]
    arguments["need_weights"] = draw(st.booleans())
    arguments["average_attn_weights"] = draw(st.booleans())
    return Call(*pair(attention=attention, **constructor), (query, key, value), arguments)


# Torch warns of masks of two dtypes, which it adds up as we do.
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=300)
@given(call=calls())
def test_outputs_weights_and_gradients_are_torchs(call):
    check_same(call)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("attention", ["naive", "torch"])
@given(data=st.data())
def test_what_it_is_compared_to_computes_the_same(attention, data):
    check_same(data.draw(calls(attention)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_training_and_evaluation(training, grad):
    """In evaluation torch takes a fast path of its own, which must not be another result."""
    torchs, ours = (module.train(training) for module in pair(batch_first=True))
    x = torch.randn(2, 9, E)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    for arguments in ({}, {"key_padding_mask": padding}, {"need_weights": False}, {"average_attn_weights": False}):
        with torch.set_grad_enabled(grad):
            expected, found = torchs(x, x, x, **arguments), ours(x, x, x, **arguments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found[0].requires_grad == grad


@pytest.mark.parametrize("dtype", DTYPES)
@by_layout
def test_dtypes(dtype, batch_first, engine):
    """As near to torch's answer in float64 as torch's in this dtype is, whatever the order of the features."""
    torchs, ours = pair(batch_first=batch_first, dtype=dtype)
    double = copy.deepcopy(torchs).double()
    x, context = torch.randn(3, 40, E).to(dtype), torch.randn(3, 40, E).to(dtype)

    def emulate(key, order):
        module = copy.deepcopy(torchs)
        with torch.no_grad():
            module.in_proj_weight.copy_(torchs.in_proj_weight[:, order])
        key = key[..., order]
        return module(x[..., order], key, key, average_attn_weights=False)

    for key in (x, context):
        with engine.at_work():
            out, weights = ours(x, key, key, average_attn_weights=False)
        emulated = [emulate(key, order) for order in (torch.arange(E), torch.randperm(E), torch.randperm(E))]
        truth = double(x.double(), key.double(), key.double(), average_attn_weights=False)
        assert_close(out, [e[0] for e in emulated], truth[0])
        assert_close(weights, [e[1] for e in emulated], truth[1], "weights")


@pytest.mark.parametrize("dtype", DTYPES)
def test_projecting_and_attending_equals_the_composition(dtype, engine):
    """The fused path by the rule that holds kernels to the reference."""
    _, ours = pair(batch_first=True, dtype=dtype)
    x, mask = torch.randn(2, 90, E).to(dtype), torch.randn(90, 90).to(dtype)

    def compose(dtype):
        w = {name: p.detach().to(dtype) for name, p in ours.named_parameters()}
        q, k, v = pyattn.qkv_projection(
            x.to(dtype), w["in_proj_weight"], w["in_proj_bias"], num_heads=H, backend="reference"
        )
        heads = pyattn.attention(q, k, v, attn_mask=mask.to(dtype), backend="reference")
        return pyattn.output_projection(heads, w["out_proj.weight"], w["out_proj.bias"], backend="reference")

    with engine.at_work():
        out, _ = ours(x, x, x, need_weights=False, attn_mask=mask)
    assert_close(out, [compose(dtype)], compose(torch.float64))


# ---- rows that see no key ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@by_layout
def test_a_query_without_keys_gives_0(batch_first, need_weights):
    torchs, ours = pair(batch_first=batch_first)
    x = torch.randn(2, 5, E) if batch_first else torch.randn(5, 2, E)
    padding = torch.tensor([[True] * 5, [False] * 4 + [True]])
    arguments = {"key_padding_mask": padding, "need_weights": need_weights, "average_attn_weights": False}
    found = results(ours, (x, x, x), arguments)
    batches = found["out"] if batch_first else found["out"].transpose(0, 1)
    torch.testing.assert_close(batches[0], ours.out_proj.bias.detach().expand(5, E))
    assert all(g.isfinite().all() for name, g in found.items() if g is not None), found.keys()
    if need_weights:
        expected = torchs(x, x, x, **arguments)
        assert not found["weights"][0].any() and expected[1][0].isnan().all()
        torch.testing.assert_close(found["weights"][1], expected[1][1])


def test_single_rows_without_keys():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    hidden = torch.rand(5, 5) < 0.3
    hidden[2] = True
    for mask in (hidden, torch.zeros(5, 5).masked_fill(hidden, -torch.inf)):
        out, weights = ours(x, x, x, attn_mask=mask)
        torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(2, E))
        assert not weights[:, 2].any() and weights[:, 1].sum() > 0


# ---- the hint of causal -----------------------------------------------------------------------------------------


def test_the_hint_of_causal():
    torchs, ours = pair(batch_first=True)
    x, wrong = torch.randn(2, 6, E), torch.randn(6, 6)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    padding = {torch.bool: padding, torch.float32: torch.zeros(2, 6).masked_fill(padding, -torch.inf), None: None}
    for need_weights, padded in itertools.product((False, True), repeat=2):
        arguments = {"need_weights": need_weights, "is_causal": True}
        for mask in (hidden, torch.zeros(6, 6).masked_fill(hidden, -torch.inf)):
            arguments["key_padding_mask"] = padding[mask.dtype if padded else None]
            check_same(Call(torchs, ours, (x, x, x), arguments | {"attn_mask": mask}))
        # A promise that is not kept: the mask is not looked at in the same one case as in torch's module.
        check_same(Call(torchs, ours, (x, x, x), arguments | {"attn_mask": wrong}))
    longer, mask = torch.randn(2, 9, E), torch.ones(6, 9, dtype=torch.bool).triu(1)  # aligned top-left
    check_same(Call(torchs, ours, (x, longer, longer), {"attn_mask": mask, "is_causal": True, "need_weights": False}))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        torchs(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True"):
        ours(x, x, x, is_causal=True)


def test_the_hint_spares_the_mask():
    _, ours = pair(batch_first=True)
    x, hidden = torch.randn(2, 6, E), torch.ones(6, 6, dtype=torch.bool).triu(1)
    with mock.patch("pyattn.functional.attention", wraps=pyattn.functional.attention) as attention:
        ours(x, x, x, need_weights=False, is_causal=True, attn_mask=hidden)
    assert attention.call_args.kwargs == {"dropout_p": 0.0, "causal": True, "q_offset": 0}


def test_added_keys_are_seen_by_all_with_the_hint_too():
    """As with the mask alone; in torch's module the last of them is behind the causal mask without weights."""
    torchs, ours = pair(batch_first=True, add_bias_kv=True)
    x, hidden = torch.randn(2, 6, E), torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected, _ = torchs(x, x, x, attn_mask=hidden)
    for need_weights in (False, True):
        out, _ = ours(x, x, x, attn_mask=hidden, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(torchs(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0], expected)


# ---- dropout ----------------------------------------------------------------------------------------------------


def bare(attention, p, heads=4):
    """A module that returns the values, each head its part, times the weights that it applied."""
    module = MultiheadAttention(E, heads, dropout=p, bias=False, batch_first=True, attention=attention)
    with torch.no_grad():
        module.in_proj_weight[2 * E :] = torch.eye(E)
        module.out_proj.weight.copy_(torch.eye(E))
    return module


@pytest.mark.parametrize("attention", ["pyattn", "naive", "torch"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_returned_weights_are_those_applied(attention, padded):
    module, x = bare(attention, 0.4), torch.randn(3, 20, E)
    padding = torch.arange(20) >= torch.tensor([20, 20, 7])[:, None] if padded else None
    out, weights = module(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    values = x.unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(out, (weights @ values).transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
    visible = weights[:2] if padded else weights
    assert 0.3 < (visible == 0).float().mean() < 0.5
    heads = weights[0] != 0
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(weights[0] != 0, weights[1] != 0)


def test_averaged_weights_are_the_mean_of_those_of_the_heads():
    module, x = bare("pyattn", 0.4), torch.randn(3, 20, E)
    found = []
    for average in (True, False):
        torch.manual_seed(5)
        found.append(module(x, x, x, average_attn_weights=average))
    torch.testing.assert_close(found[0][1], found[1][1].mean(1))
    assert torch.equal(found[0][0], found[1][0])


def test_the_gradient_goes_through_the_weights_that_were_kept():
    module, x = bare("pyattn", 0.5), torch.randn(2, 9, E)
    torch.manual_seed(3)
    out, weights = module(x, x, x, average_attn_weights=False)
    leaf = module.in_proj_weight
    (through_weights,) = torch.autograd.grad(
        (weights @ x.unflatten(-1, (4, -1)).transpose(1, 2)).square().sum(), leaf, retain_graph=True
    )
    (through_out,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(through_out[: 2 * E], through_weights[: 2 * E], rtol=1e-4, atol=1e-5)


@by_attention
def test_dropout_only_in_training(attention):
    module, x = bare(attention, 0.5), torch.randn(2, 9, E)
    reference, _ = torch_copy(module)(x, x, x)
    torch.testing.assert_close(module.eval()(x, x, x)[0], reference, rtol=1e-5, atol=1e-5)
    module.train()
    torch.manual_seed(1)
    first = module(x, x, x, need_weights=False)[0]
    second = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x, x, x, need_weights=False)[0], first)
    assert not torch.equal(first, second)


def torch_copy(module):
    """Torch's module in evaluation, with the same parameters."""
    copied = torch.nn.MultiheadAttention(E, module.num_heads, bias=False, batch_first=True).eval()
    copied.load_state_dict(module.state_dict())
    return copied


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_keeps_the_mean(need_weights):
    module, x = bare("pyattn", 0.25, heads=1), torch.randn(1, 5, E)
    expected, _ = torch_copy(module)(x, x, x)
    draws = torch.stack([module(x, x, x, need_weights=need_weights)[0].detach() for _ in range(600)])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 600**0.5)
    assert error.max() < 5 and draws.std(0).min() > 0.01


def test_dropping_everything_leaves_nothing():
    module, x = bare("pyattn", 1.0), torch.randn(2, 9, E)
    out, weights = module(x, x, x)
    assert not out.any() and not weights.any()


# ---- a module as torch's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", [{}, {"kdim": 5, "vdim": 6}, {"bias": False, "add_bias_kv": True}], ids=str)
def test_it_is_one_of_torchs(constructor):
    torch.manual_seed(2)
    torchs = torch.nn.MultiheadAttention(E, H, **constructor)
    torch.manual_seed(2)
    ours = MultiheadAttention(E, H, **constructor)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    for (name, x), (other, y) in zip(ours.state_dict().items(), torchs.state_dict().items(), strict=True):
        assert name == other and torch.equal(x, y)
    torchs.load_state_dict(MultiheadAttention(E, H, **constructor).state_dict())
    ours.load_state_dict(torchs.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), torchs.parameters(), strict=True))
    torch.manual_seed(2)
    ours._reset_parameters()
    assert not ours._qkv_same_embed_dim
    torch.manual_seed(2)
    torchs._reset_parameters()
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), torchs.parameters(), strict=True))
    assert "attention='pyattn'" in repr(ours)


def test_devices_and_dtypes_of_the_constructor():
    module = MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert module.in_proj_weight.is_meta and module.in_proj_weight.dtype == torch.bfloat16
    assert MultiheadAttention(E, H, 0.1, False, True, True, 5, 6, True).vdim == 6


def test_copies_and_files():
    _, ours = pair(batch_first=True, dropout=0.1)
    ours.eval()
    x = torch.randn(2, 5, E)
    expected = ours(x, x, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(other) is MultiheadAttention and other.attention == "pyattn" and not other.training
        assert not other._qkv_same_embed_dim
        for a, b in zip(other(x, x, x), expected, strict=True):
            assert torch.equal(a, b)


def test_a_subclass_stays_one():
    class Mine(MultiheadAttention):
        pass

    assert type(Mine(E, H)) is Mine


def count_products(module, *inputs):
    with mock.patch("pyattn.projection_ops.projection", wraps=projection_ops.projection) as projection:
        module(*inputs)
    return projection.call_count


@by_layout
def test_as_few_products_as_tensors_allow(batch_first):
    _, ours = pair(batch_first=batch_first)
    x, y, z = torch.randn(3, 2, 5, E)
    assert count_products(ours, x, x, x) == 2
    assert count_products(ours, x, y, y) == 3
    assert count_products(ours, x, y, z) == count_products(ours, x, y, x) == 4
    _, apart = pair(kdim=7, vdim=7, batch_first=batch_first)
    k = torch.randn(2, 5, 7)
    assert count_products(apart, x, k, k) == 4
    _, naive = pair(attention="naive")
    with mock.patch("pyattn.functional.naive_attention", wraps=pyattn.naive_attention) as attention:
        assert count_products(naive, x, x, x) == 0
        naive(x, x, x, need_weights=False)
    assert attention.call_count == 1
    _, torchs = pair(attention="torch")
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
        torchs(x, x, x, need_weights=False)
    assert sdpa.call_count == 1


def test_layouts_of_outputs():
    for shape, batch_first in (((2, 5, E), True), ((5, 2, E), False), ((5, E), True), ((5, E), False)):
        _, ours = pair(batch_first=batch_first)
        x = torch.randn(shape)
        out, _ = ours(x, x, x)
        assert out.shape == x.shape and out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(dtype, need_weights):
    torchs, ours = pair(batch_first=True, add_bias_kv=True)
    x, y = torch.randn(2, 9, E), torch.randn(2, 7, E)
    mask, padding = torch.randn(9, 7), torch.arange(7) >= torch.tensor([7, 4])[:, None]
    arguments = {"need_weights": need_weights, "attn_mask": mask, "key_padding_mask": padding.float() * -1e9}
    found = {}
    for name, module in (("torchs", torchs), ("ours", ours)):
        with torch.autocast("cpu", dtype):
            out, weights = module(x, y, y, **arguments)
        (out.float().square().sum() + (weights.float().square().sum() if need_weights else 0)).backward()
        found[name] = (out, weights, module.in_proj_weight.grad, module.bias_k.grad)
    truth = torchs(x, y, y, **arguments)
    for ours, torchs in zip(found["ours"], found["torchs"], strict=True):
        assert (ours is None) == (torchs is None)
        if ours is not None:
            assert ours.dtype == torchs.dtype
            torch.testing.assert_close(ours, torchs, rtol=3e-2, atol=3e-2 * float(torchs.detach().abs().max()))
    assert_close(found["ours"][0], [found["torchs"][0]], truth[0].double())


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(need_weights):
    torch._dynamo.reset()
    ours = MultiheadAttention(E, 2, dropout=0.3, batch_first=True)
    x, padding = torch.randn(2, 6, E), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    arguments = {"need_weights": need_weights, "key_padding_mask": padding}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def run(module):
        torch.manual_seed(7)
        return results(module, (x, x, x), arguments)

    for training in (False, True):
        ours.train(training)
        expected, found = run(ours), run(compiled)
        for (name, a), (_, b) in zip(expected.items(), found.items(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    _, ours = pair(batch_first=True)
    ours.eval()
    x, y = torch.randn(2, 6, E), torch.randn(2, 9, E)
    kwargs = {"key_padding_mask": torch.tensor([[False] * 9, [False] * 4 + [True] * 5])}
    exported = torch.export.export(ours, (x, y, y), kwargs, strict=strict)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"pyattn.attention_forward.default", "pyattn.projection.default"} <= operators
    torch.testing.assert_close(exported.module()(x, y, y, **kwargs), ours(x, y, y, **kwargs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_functional_gradients(need_weights):
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 6, E)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters):
        outputs = torch.func.functional_call(ours, parameters, (x, x, x), {"need_weights": need_weights})
        return sum(y.square().sum() for y in outputs if y is not None)

    found = torch.func.grad(loss)(parameters)
    loss(dict(ours.named_parameters())).backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-5)


# ---- memory -----------------------------------------------------------------------------------------------------

LONG = 1200
SQUARE = 4 * LONG * LONG  # bytes of one head's weights in float32: 6 MB


@pytest.fixture
def returned_memory():
    """Large blocks come from the system, one by one, so that glibc's heap keeps none that are free."""
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def peak(heads=16, grad=False, **arguments):
    module = MultiheadAttention(64, heads, batch_first=True)

    def run(x):
        with torch.set_grad_enabled(grad):
            out, weights = module(x, x, x, **arguments)
            if grad:
                (out.sum() + (0 if weights is None else weights.square().sum())).backward()
        return out, weights

    x = torch.randn(1, LONG, 64)
    run(x)
    return measure.peak_extra_memory(lambda: run(x))


def test_without_weights_there_is_no_matrix_of_scores():
    padding = torch.arange(LONG)[None] >= 900
    assert peak(need_weights=False) < SQUARE / 2
    assert peak(need_weights=False, grad=True) < SQUARE
    assert peak(need_weights=False, key_padding_mask=padding) < SQUARE / 2
    spread = torch.rand(1, LONG) < 0.3  # no run of keys, so it is a mask, but one for all heads and rows
    assert peak(need_weights=False, key_padding_mask=spread) < SQUARE / 2


def test_padding_and_a_mask_are_not_merged_sample_by_sample():
    N = 16
    module = MultiheadAttention(8, 1, batch_first=True)
    x, mask = torch.randn(N, LONG // 2, 8), torch.randn(LONG // 2, LONG // 2)
    padding = torch.arange(LONG // 2) >= torch.randint(1, LONG // 2, (N, 1))
    one_mask = SQUARE / 4

    def run():
        with torch.no_grad():
            return module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]

    run()
    assert measure.peak_extra_memory(run) < 3 * one_mask  # merged they would be 16


@pytest.mark.usefixtures("returned_memory")
def test_averaged_weights_are_added_up_head_by_head():
    """All heads together would be 16 matrices, beside the temporaries of one."""
    assert peak(average_attn_weights=True) < 5 * SQUARE
    assert peak(average_attn_weights=True, grad=True) < 8 * SQUARE


@pytest.mark.usefixtures("returned_memory")
def test_the_weights_of_heads_are_made_in_their_place():
    """Beside the 16 that are returned."""
    assert peak(average_attn_weights=False) < 5 * SQUARE


# ---- bad input --------------------------------------------------------------------------------------------------

z = torch.zeros
BAD = [
    (TypeError, "query must be a tensor, got list", {"query": [1]}),
    (TypeError, "query must be float32, got float64", {"query": z(2, 5, E, dtype=torch.float64)}),
    (TypeError, "key must be float32, got int64", {"key": z(2, 7, E, dtype=torch.int64)}),
    (TypeError, "value must be a dense tensor, got a nested one",
     {"value": torch.nested.nested_tensor([z(7, E), z(6, E)], layout=torch.jagged)}),
    (ValueError, "key must be on the device of the parameters", {"key": z(2, 7, E, device="meta")}),
    (ValueError, r"query must have shape \[N, L, E\] or \[L, E\], got \[1, 2, 5, 24\]", {"query": z(1, 2, 5, E)}),
    (ValueError, r"query must have shape \[N, L, E\] or \[L, E\], got \[24\]", {"query": z(E)}),
    (ValueError, r"key must have the 3 dimensions of query, got \[7, 24\]", {"key": z(7, E)}),
    (ValueError, r"value must have the 3 dimensions of query, got \[7, 24\]", {"value": z(7, E)}),
    (ValueError, "query must have 24 features, got 23", {"query": z(2, 5, 23)}),
    (ValueError, "key must have 24 features, got 25", {"key": z(2, 7, 25)}),
    (ValueError, "value must have 24 features, got 1", {"value": z(2, 7, 1)}),
    (ValueError, r"key must have the batch size of query \(2\), got 3", {"key": z(3, 7, E)}),
    (ValueError, r"value must have the batch size and length of key \[2, 7\], got \[2, 6\]", {"value": z(2, 6, E)}),
    (TypeError, "need_weights must be a bool", {"need_weights": 1}),
    (TypeError, "average_attn_weights must be a bool", {"average_attn_weights": None}),
    (TypeError, "is_causal must be a bool", {"is_causal": 0}),
    (TypeError, "attn_mask must be bool or float32 or .* got int64", {"attn_mask": z(5, 7, dtype=torch.int64)}),
    (TypeError, "attn_mask must be a tensor, got bool", {"attn_mask": True}),
    (ValueError, r"attn_mask must have shape \[L, S\] = \[5, 7\] or \[N \* num_heads, L, S\] = \[8, 5, 7\], got",
     {"attn_mask": z(7, 5)}),
    (ValueError, r"attn_mask must have shape .* got \[2, 5, 7\]", {"attn_mask": z(2, 5, 7)}),
    (ValueError, r"attn_mask must have shape .* got \[7\]", {"attn_mask": z(7)}),
    (ValueError, r"attn_mask must have shape .* got \[2, 4, 5, 7\]", {"attn_mask": z(2, 4, 5, 7)}),
    (ValueError, "attn_mask must be on the device of query", {"attn_mask": z(5, 7, device="meta")}),
    (TypeError, "key_padding_mask must be bool or .* got uint8", {"key_padding_mask": z(2, 7, dtype=torch.uint8)}),
    (ValueError, r"key_padding_mask must have shape \[N, S\] = \[2, 7\], got \[7, 2\]", {"key_padding_mask": z(7, 2)}),
    (ValueError, r"key_padding_mask must have shape \[N, S\] = \[2, 7\], got \[7\]", {"key_padding_mask": z(7)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD, ids=[case[1] for case in BAD])
def test_bad_input(error, match, overrides):
    torchs, ours = pair(batch_first=True)
    arguments = {"query": z(2, 5, E), "key": z(2, 7, E), "value": z(2, 7, E)} | overrides
    with pytest.raises(error, match=match.replace("like", "query")):
        ours(**arguments)
    if not any(isinstance(x, bool | int) or x is None or getattr(x, "is_meta", False) for x in overrides.values()):
        with pytest.raises(Exception):  # noqa: B017  torch's refusals have many types
            torchs(**arguments)


def test_bad_unbatched_masks():
    _, ours = pair()
    x = z(5, E)
    with pytest.raises(ValueError, match=r"attn_mask must have shape .* or \[num_heads, L, S\] = \[4, 5, 5\], got"):
        ours(x, x, x, attn_mask=z(8, 5, 5))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \[S\] = \[5\], got \[1, 5\]"):
        ours(x, x, x, key_padding_mask=z(1, 5))


@pytest.mark.parametrize("attention", ["fast", None, 1])
def test_bad_attention(attention):
    with pytest.raises(ValueError, match="attention must be one of pyattn, naive, torch, got"):
        MultiheadAttention(E, H, attention=attention)


def test_bad_sizes():
    with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
        MultiheadAttention(E, 0)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(E, 5)


@pytest.mark.parametrize("shape", [(0, 5, E), (2, 0, E)], ids=str)
def test_nothing_to_do(shape):
    torchs, ours = pair(batch_first=True)
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x, x, x), torchs(x, x, x))
    torch.testing.assert_close(ours(x, x, x, need_weights=False), torchs(x, x, x, need_weights=False))
