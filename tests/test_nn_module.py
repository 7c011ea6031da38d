"""``pyattn.nn.MultiheadAttention`` as one of torch's modules: parameters, files, graphs, memory, refusals."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from multihead_cases import E, H, pair, results

import pyattn
from pyattn import projection_ops
from pyattn.nn import MultiheadAttention
from pyattn.testing import assert_close

by_layout = pytest.mark.parametrize("batch_first", [False, True])


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


def test_signatures_are_torchs():
    for name in ("__init__", "forward"):
        ours, torchs = (
            inspect.signature(getattr(m, name)).parameters for m in (MultiheadAttention, torch.nn.MultiheadAttention)
        )
        assert [(p.name, p.default) for p in torchs.values()] == [(p.name, p.default) for p in ours.values()][
            : len(torchs)
        ]
        assert [p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY] == ["attention"] * (name == "__init__")


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
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        torchs(x, x, x, need_weights=False, attn_mask=hidden, is_causal=True)
    _, _, _, mask, _, is_causal = sdpa.call_args.args
    assert sdpa.call_count == 1 and mask is None and is_causal


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

# Of 16 heads, in matrices of one head's weights. Without weights there is no matrix of scores, also where padding is no
# run of keys and becomes a mask, one for all heads and rows. Padding and a mask, merged sample by sample, would be 16,
# and so would the weights of all heads, beside the temporaries of one.
MOST = {
    "no weights": 0.5,
    "no weights, gradients": 1,
    "no weights, padding": 0.5,
    "no weights, mask": 0.5,
    "both masks": 3,
    "mean": 5,
    "mean, gradients": 8,
    "each": 5,  # beside the 16 that are returned
}


def test_memory():
    script = Path(__file__).parent / "nn_memory.py"
    process = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found.keys() == MOST.keys()
    assert not {name: peak for name, peak in found.items() if peak > MOST[name]}


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
