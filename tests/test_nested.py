"""Jagged nested tensors through both functions."""

from __future__ import annotations

import pytest
import torch

import pyattn

LENGTHS_Q, LENGTHS_K = (3, 0, 7), (5, 2, 6)
H, D = 4, 8


def jagged(lengths, heads=H, size=D, **kwargs):
    return torch.nested.nested_tensor([torch.randn(n, heads, size) for n in lengths], layout=torch.jagged, **kwargs)


def samples(x):
    """``[1, H, L, D]`` of each sample."""
    return [sample.transpose(0, 1)[None] for sample in x.transpose(1, 2).unbind()]


def as_one(x, like):
    """Values of a nested result, one sample after the other: ``[total, H, ...]``."""
    assert x.is_nested
    assert x.offsets() is like.offsets()
    assert x.shape[2] == like.shape[2]
    return x.transpose(1, 2).values()


def check(function, of_sample, leaves):
    """Outputs and gradients of ``function`` are those of ``of_sample``, called sample by sample."""
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = as_one(function(q, k, v), q)
    parts = [of_sample(b, *x) for b, x in enumerate(zip(*map(samples, (q, k, v)), strict=True))]
    expected = torch.cat([part[0].transpose(0, 1) for part in parts])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, grad)
    for x, y in zip(actual, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(x.values(), y.values())


@pytest.mark.parametrize("arguments", [
    {},
    {"causal": True},
    {"window": (1, 2), "q_offset": 1},
    {"causal": True, "q_offset": torch.tensor([2, 0, -1])},
    {"kv_lengths": torch.tensor([4, 2, 0]), "kv_starts": torch.tensor([1, 0, 0])},
    {"alibi_slopes": torch.rand(3, H), "softcap": 2.0, "sinks": torch.randn(H), "scale": 0.3},
], ids=lambda x: ", ".join(x) or "plain")  # fmt: skip
def test_attention(arguments):
    leaves = [jagged(LENGTHS_Q, requires_grad=True)]
    key = jagged(LENGTHS_K, 2, requires_grad=True)
    leaves += [key, torch.nested.nested_tensor_from_jagged(torch.randn(13, 2, 5), key.offsets()).requires_grad_()]

    def of_sample(b, q, k, v):
        return pyattn.attention(
            q,
            k,
            v,
            **{n: x[b : b + 1] if isinstance(x, torch.Tensor) and len(x) == 3 else x for n, x in arguments.items()},
        )

    check(lambda q, k, v: pyattn.attention(q, k, v, **arguments), of_sample, leaves)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_the_drop_in(causal, kv_heads):
    """Causal is aligned top-left, as torch does; key and value have offsets of their own, of the same lengths."""
    leaves = [
        jagged(LENGTHS_Q, requires_grad=True),
        *(jagged(LENGTHS_K, kv_heads, requires_grad=True) for _ in range(2)),
    ]
    options = {"is_causal": causal, "enable_gqa": kv_heads != H}

    def of_sample(b, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    check(lambda q, k, v: pyattn.scaled_dot_product_attention(q, k, v, **options), of_sample, leaves)


def test_lse_and_dropout():
    q = jagged(LENGTHS_Q).transpose(1, 2)
    out, lse = pyattn.attention(q, q, q, return_lse=True)
    packed = q.transpose(1, 2).values()
    offsets = q.offsets().to(torch.int32)
    expected, expected_lse = pyattn.attention_varlen(packed, packed, packed, offsets, offsets, return_lse=True)
    assert torch.equal(as_one(out, q), expected)
    assert torch.equal(as_one(lse, q), expected_lse.mT)
    results = []
    for call in (lambda: as_one(pyattn.attention(q, q, q, dropout_p=0.5), q),
                 lambda: pyattn.attention_varlen(packed, packed, packed, offsets, offsets, dropout_p=0.5)):  # fmt: skip
        torch.manual_seed(5)
        results.append(call())
    assert torch.equal(*results)


def test_lengths_by_rows_of_projections():
    """``[L, H * D]`` of each sample, split into heads: not contiguous after ``transpose``."""
    x = torch.nested.nested_tensor([torch.randn(n, 3 * H * D) for n in LENGTHS_Q], layout=torch.jagged)
    q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in x.chunk(3, dim=-1))
    out = as_one(pyattn.attention(q, k, v, causal=True), q)
    expected = [
        pyattn.attention(*parts, causal=True)[0].transpose(0, 1) for parts in zip(*map(samples, (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected))


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(pyattn.attention, backend="aot_eager", fullgraph=True)
    leaf = jagged(LENGTHS_Q, requires_grad=True)
    q = leaf.transpose(1, 2)
    results = [as_one(function(q, q, q, causal=True), q) for function in (compiled, pyattn.attention)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(out.square().sum(), leaf)[0].values() for out in results]
    torch.testing.assert_close(*gradients)


NESTED = jagged(LENGTHS_Q).transpose(1, 2)
DENSE = torch.randn(3, H, 7, D)
HOLES = torch.nested.nested_tensor_from_jagged(
    torch.randn(10, H, D), torch.tensor([0, 4, 8, 10]), torch.tensor([3, 2, 1])
)
WIDE = jagged(LENGTHS_Q, 8).transpose(1, 2)
STRIDED = torch.nested.nested_tensor([torch.randn(n, H, D) for n in LENGTHS_Q])


@pytest.mark.parametrize(("function", "arguments", "message"), [
    (pyattn.attention, {"attn_mask": torch.ones(1, 1, dtype=torch.bool)}, "attn_mask must be None"),
    (pyattn.attention, {"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table must be None"),
    (pyattn.attention, {"key": DENSE}, "key must be a nested tensor of layout torch.jagged"),
    (pyattn.attention, {"value": DENSE}, "value must be a nested tensor of layout torch.jagged"),
    (pyattn.attention, {"query": DENSE}, "key must be a dense tensor"),
    (pyattn.attention, {"query": STRIDED}, "query must be a nested tensor of layout torch.jagged"),
    (pyattn.attention, {"query": NESTED.transpose(1, 2)}, r"query must have shape \[B, H, j, D\]"),
    (pyattn.attention, {"key": jagged((1, 2)).transpose(1, 2)}, r"key must have the batch size of query \(3\), got 2"),
    (pyattn.attention, {"value": jagged(LENGTHS_K).transpose(1, 2)}, "value must have sequences of the lengths of key"),
    (pyattn.attention, {"query": HOLES.transpose(1, 2)}, "query must have no holes"),
    (pyattn.attention, {"kv_lengths": torch.ones(2, dtype=torch.int32)}, r"kv_lengths must have shape \[B\]"),
    (pyattn.scaled_dot_product_attention, {"attn_mask": torch.ones(1, 1)}, "attn_mask must be None"),
    (pyattn.scaled_dot_product_attention, {"query": STRIDED}, "query must be a nested tensor of layout torch.jagged"),
    (pyattn.scaled_dot_product_attention, {"query": WIDE}, "key must have the 8 heads of query"),
    (pyattn.explain, {}, "query must be a dense tensor"),
    (pyattn.naive_attention, {}, "query must be a dense tensor"),
])  # fmt: skip
def test_refused(function, arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        function(**{"query": NESTED, "key": NESTED, "value": NESTED} | arguments)


def test_contiguous_closes_holes():
    q = HOLES.contiguous().transpose(1, 2)
    assert pyattn.attention(q, q, q).offsets().tolist() == [0, 3, 5, 6]


@pytest.mark.parametrize("function", [pyattn.attention, pyattn.scaled_dot_product_attention])
def test_second_derivatives_raise(function):
    leaf = jagged(LENGTHS_Q, requires_grad=True)
    q = leaf.transpose(1, 2)
    (gradient,) = torch.autograd.grad(function(q, q, q).values().square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="pyattn::attention_backward has no derivative"):
        gradient.values().sum().backward()
