"""The short way of an eager call: the same results, the same errors, and never past anybody who watches."""

from __future__ import annotations

import pytest
import torch
from watcher import Watcher

import pyattn
from pyattn import functional, ops
from pyattn.spec import AttentionTensors
from pyattn.testing import CASES, OUTPUTS, forward_and_gradients, make_inputs, random_grads, run

BY_NAME = {case.name: case for case in CASES}


def inputs(*shape, requires_grad=False):
    return [torch.randn(*(shape or (2, 4, 9, 16))).requires_grad_(requires_grad) for _ in range(3)]


@pytest.mark.parametrize("name", ["gqa", "causal", "tiles, family", "packed, family", "tiles, float mask"])
def test_the_short_way_and_the_dispatchers_give_the_same_bits(name):
    kwargs = make_inputs(BY_NAME[name], torch.float32, requires_grad=True)

    def call(k):
        return run(k, return_lse=True)

    short = [forward_and_gradients(kwargs, call, OUTPUTS) for _ in range(3)]  # the first prepares a plain call
    with Watcher() as watcher:
        watched = forward_and_gradients(kwargs, call, OUTPUTS)
    assert "pyattn::attention_forward" in watcher.seen
    assert "pyattn::attention_backward" in watcher.seen
    for results in short:
        for result, x in results.items():
            assert torch.equal(x, watched[result]), result


def test_a_mode_that_comes_between_forward_and_backward_sees_the_backward():
    q, k, v = inputs(requires_grad=True)
    out = pyattn.attention(q, k, v)
    with Watcher() as watcher:
        out.sum().backward()
    assert "pyattn::attention_backward" in watcher.seen


def test_the_profiler_sees_the_op():
    q, k, v = inputs()
    pyattn.attention(q, k, v)
    with torch.profiler.profile() as profile:
        pyattn.attention(q, k, v)
    assert "pyattn::attention_forward" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("lazy", ["query", "key", "value"])
def test_a_lazy_negation_is_resolved(lazy):
    kwargs = dict(zip(("query", "key", "value"), inputs(), strict=True))
    expected = pyattn.attention(**kwargs)
    negative = torch._neg_view(-kwargs[lazy])
    assert negative.is_neg()
    assert torch.equal(pyattn.attention(**kwargs | {lazy: negative}), expected)


def test_a_lazy_negation_of_a_gradient_is_resolved():
    q, k, v = inputs(requires_grad=True)
    out = pyattn.attention(q, k, v)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    actual = torch.autograd.grad(out, (q, k, v), torch._neg_view(-grad))
    assert all(map(torch.equal, actual, expected))


class Tagged(torch.Tensor):
    pass


def test_subclasses_stay_what_they_are():
    q, k, v = (x.as_subclass(Tagged) for x in inputs())
    assert type(pyattn.attention(q, k, v)) is Tagged
    parameter = torch.nn.Parameter(q.as_subclass(torch.Tensor))
    pyattn.attention(parameter, k.as_subclass(torch.Tensor), v.as_subclass(torch.Tensor)).sum().backward()
    assert parameter.grad.any()


@pytest.mark.parametrize(
    ("legal", "illegal", "message"),
    [
        ({"causal": True}, {"causal": 1}, "causal must be a bool"),
        ({"causal": False}, {"causal": 0}, "causal must be a bool"),
        ({"scale": 1.0}, {"scale": True}, "scale must be a number"),
        ({"softcap": 1}, {"softcap": True}, "softcap must be a number"),
        ({"q_offset": 1}, {"q_offset": True}, "q_offset must be an int"),
        ({"q_offset": 1}, {"q_offset": 1.0}, "q_offset must be an int"),
        ({"window": (1, 0)}, {"window": (True, 0)}, "window must be an int"),
        ({"window": (1, 0)}, {"window": (1.0, 0)}, "window must be an int"),
        ({"window": (1, 0)}, {"window": "10"}, "window must be a pair"),
        ({"return_lse": True}, {"return_lse": 1}, "return_lse must be a bool"),
        ({"dropout_p": 0.0}, {"dropout_p": 0j}, "dropout_p must be a number"),
        ({"scale": 1.0}, {"scale": [1.0]}, "scale must be a number"),
    ],
)
def test_what_equals_a_prepared_call_is_still_checked(legal, illegal, message):
    q, k, v = inputs()
    for _ in range(2):
        pyattn.attention(q, k, v, **legal)
    with pytest.raises((TypeError, ValueError), match=message):
        pyattn.attention(q, k, v, **illegal)


def test_another_shape_dtype_or_layout_is_another_call():
    q, k, v = inputs()
    pyattn.attention(q, k, v)
    with pytest.raises(ValueError, match="key must have the head dim"):
        pyattn.attention(q, k[..., :8], v)
    with pytest.raises(TypeError, match="value must have the dtype of query"):
        pyattn.attention(q, k, v.half())
    laid_out = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(pyattn.attention(*laid_out), pyattn.attention(q, k, v))
    last = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(pyattn.attention(*last), pyattn.attention(q, k, v))


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def test_tensors_of_one_kind_in_other_places_are_other_calls():
    """Starts are no lengths, and offsets are neither: each is compared with the reference after the others."""
    q, k, v = inputs(2, 4, 9, 16)
    kinds = [{"kv_lengths": ints(5, 9)}, {"kv_starts": ints(5, 8)}, {"q_offset": ints(5, 9)}, {"causal": True}]
    kinds += [{"kv_lengths": ints(9, 7), "kv_starts": ints(2, 1)}, {"kv_lengths": ints(4, 9, dtype=torch.int64)}]
    for _ in range(2):
        for kind in kinds:
            expected = pyattn.attention(q, k, v, window=(4, 2), **kind, backend="reference")
            torch.testing.assert_close(pyattn.attention(q, k, v, window=(4, 2), **kind), expected)


def paged(**changes):
    shapes = {"query": (2, 4, 1, 16), "key": (5, 2, 4, 16), "value": (5, 2, 4, 16)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"block_table": ints(0, 1, 2, 3).view(2, 2), "kv_lengths": ints(8, 3)} | changes


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"kv_lengths must lie in \[0, 8\]", {"kv_lengths": ints(8, 9)}),
        (r"kv_lengths must lie in \[0, 8\]", {"kv_lengths": ints(-1, 3)}),
        (r"kv_starts must lie in \[0, 8\]", {"kv_starts": ints(9, 3)}),
        (r"block_table must lie in \[0, 4\]", {"block_table": ints(0, 5, 2, 3).view(2, 2)}),
        (r"block_table must lie in \[0, 4\]", {"block_table": ints(0, 1, -1, 3).view(2, 2)}),
    ],
)
def test_values_are_checked_in_each_call(message, changes):
    legal = {"kv_starts": ints(0, 0)} if "kv_starts" in changes else {}
    for _ in range(2):
        pyattn.attention(**paged(**legal))
        with pytest.raises(ValueError, match=message):
            pyattn.attention(**paged(**changes))


def test_pages_that_are_not_in_use_are_not_looked_at():
    for pages in (2, 300):  # few are looked at by Python, many by torch
        table = torch.full((2, pages), 99, dtype=torch.int32)
        table[:, 0] = ints(3, 1)
        arguments = paged(block_table=table, kv_lengths=ints(4, 3))
        assert pyattn.attention(**arguments).isfinite().all()
        with pytest.raises(ValueError, match=r"block_table must lie in \[0, 4\] .* got \[3, 1, 99\]"):
            pyattn.attention(**arguments | {"kv_lengths": ints(4, 5)})


def test_a_gradient_through_pages_is_refused_whatever_was_prepared():
    arguments = paged()
    pyattn.attention(**arguments)
    arguments["query"].requires_grad_()
    with torch.no_grad():
        pyattn.attention(**arguments)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="paged keys have no gradient, but query requires one"):
            pyattn.attention(**arguments)


def test_a_mode_sees_a_prepared_call_of_pages():
    arguments = paged()
    out = pyattn.attention(**arguments)
    with Watcher() as watcher:
        assert torch.equal(pyattn.attention(**arguments), out)
    assert "pyattn::attention_forward" in watcher.seen


def test_another_device_is_another_call(monkeypatch):
    monkeypatch.setattr(ops, "unobserved", lambda tensors: True)
    numbers = (False, None, None, None, None, True, False, None)
    tensors = AttentionTensors(*inputs())
    kinds = [functional._kind(AttentionTensors(*(x.to(d) for x in tensors[:3])), 0.0, numbers) for d in ("cpu", "meta")]
    assert None not in kinds and kinds[0] != kinds[1]


def test_prepared_calls_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(functional, "_MOST_PREPARED", 5)
    functional._prepared.clear()
    for length in range(1, 20):
        pyattn.attention(*inputs(1, 1, length, 4))
        assert len(functional._prepared) <= 5
    assert functional._prepared


def test_unobserved():
    x = torch.randn(3)
    assert ops.unobserved((x, torch.nn.Parameter(x)))
    assert not ops.unobserved((x, "no tensor"))
    assert not ops.unobserved((x.to("meta"),))
    assert not ops.unobserved((x.to_sparse(),))
    assert not ops.unobserved((torch.nested.nested_tensor([x, x]),))  # no subclass, and it has no shape
    with Watcher():
        assert not ops.unobserved((x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.unobserved((x,))
    with torch.device("cpu"):  # a mode
        assert not ops.unobserved((x,))
    with torch.autograd.forward_ad.dual_level():
        assert not ops.unobserved((x,))
    seen = []

    def function(y):
        seen.append(ops.unobserved((y,)))
        return y.sum()

    torch.func.grad(function)(x)
    assert seen == [False]


def test_gradients_of_only_some():
    q, k, v = inputs()
    for leaf in (q, k, v):
        leaf.requires_grad_()
        for _ in range(2):
            pyattn.attention(q, k, v).sum().backward()
        assert leaf.grad.shape == leaf.shape
        leaf.requires_grad_(False)
        leaf.grad = None
    assert all(x.grad is None for x in (q, k, v))


def test_lse_alone_and_both():
    q, k, v = inputs(requires_grad=True)
    for _ in range(2):
        out, lse = pyattn.attention(q, k, v, return_lse=True)
        grads = random_grads({"out": out, "lse": lse})
        both = torch.autograd.grad((out, lse), (q, k, v), tuple(grads.values()), retain_graph=True)
        parts = [
            torch.autograd.grad(x, (q, k, v), grads[name], retain_graph=True, materialize_grads=True)
            for name, x in (("out", out), ("lse", lse))
        ]
        for whole, part_of_out, part_of_lse in zip(both, *parts, strict=True):
            torch.testing.assert_close(whole, part_of_out + part_of_lse)
