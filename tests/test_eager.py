"""The short way of an eager call: the same results, the same errors, and never past anybody who watches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyattn
from pyattn import functional, ops
from pyattn.testing import CASES, OUTPUTS, forward_and_gradients, make_inputs, random_grads, run

BY_NAME = {case.name: case for case in CASES}


def inputs(*shape, requires_grad=False):
    return [torch.randn(*(shape or (2, 4, 9, 16))).requires_grad_(requires_grad) for _ in range(3)]


class Watcher(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


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
