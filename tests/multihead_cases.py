"""Calls of ``pyattn.nn.MultiheadAttention`` and of torch's with equal parameters, and what both give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from pyattn.nn import MultiheadAttention

E, H = 24, 4


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
    """Outputs, and the gradients of the inputs, the parameters and whatever else requires one, through all outputs."""
    query, key, value = inputs
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}
    given = {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
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
    kind = draw(st.sampled_from([None, "bool", "float", "float, -inf", "right", "left", "right, float"]))
    if kind:
        padding = torch.rand(N, S) < 0.5
        if kind in ("right", "left", "right, float"):
            lengths = torch.randint(1, S + 1, (N, 1))
            padding = torch.arange(S) < S - lengths if kind == "left" else torch.arange(S) >= lengths
            visible_to_all = S - 1 if kind == "left" else 0
            if "attn_mask" in arguments and visible_to_all != visible:
                padding = torch.zeros(N, S, dtype=torch.bool)
        padding[:, visible] = False
        if kind == "right, float":
            padding = torch.zeros(N, S).masked_fill(padding, -torch.inf)
        elif kind in ("float", "float, -inf"):
            padding = torch.randn(N, S).masked_fill(padding & (kind != "float"), -torch.inf)
        arguments["key_padding_mask"] = padding if batched else padding[0]
    for mask in arguments.values():
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            mask.requires_grad_(draw(st.booleans()))
    arguments["need_weights"] = draw(st.booleans())
    arguments["average_attn_weights"] = draw(st.booleans())
    return Call(*pair(attention=attention, **constructor), (query, key, value), arguments)


# Torch warns of masks of two dtypes, which it adds up as we do.
