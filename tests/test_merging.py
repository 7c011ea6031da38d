"""``pyattn.merge_attention`` against attention over all keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyattn
from pyattn.testing import DTYPES, assert_close, emulations_and_truth, to_dtype

B, HQ, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 40, 16, 24


def inputs(dtype=torch.float32, Lk=LK):
    shapes = {"query": (B, HQ, LQ, D), "key": (B, HKV, Lk, D), "value": (B, HKV, Lk, DV)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def in_parts(kwargs, edges, **arguments):
    """Attention over the keys between ``edges``, part by part."""
    parts = []
    for low, high in itertools.pairwise(edges):
        part = {name: kwargs[name][:, :, low:high] for name in ("key", "value")}
        parts.append(pyattn.attention(**kwargs | part, return_lse=True, **arguments))
    return [out for out, _ in parts], [lse for _, lse in parts]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_give_the_whole(dtype, any_engine):
    kwargs = inputs(dtype)
    emulations, truth = emulations_and_truth(kwargs)
    with any_engine.at_work():
        outs, lses = in_parts(kwargs, (0, 7, 7, 31, LK), backend=any_engine.backend)
    # The parts have been rounded to the dtype: what is exact is the merge of the parts that there are.
    exact = in_parts(to_dtype(kwargs, torch.float64), (0, 7, 7, 31, LK))
    torch.testing.assert_close(pyattn.merge_attention(*exact), (truth["out"], truth["lse"]), rtol=1e-12, atol=1e-12)
    out, lse = pyattn.merge_attention(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(lse, [e["lse"] for e in emulations], truth["lse"], "lse")
    merged, _ = pyattn.merge_attention([x.double() for x in outs], [x.double() for x in lses])
    weights = torch.stack(lses).softmax(0)[..., None]
    assert_close(out, [(weights * torch.stack(outs).float()).sum(0).to(dtype)], merged, "out")


@given(data=st.data())
def test_any_parts_in_any_order(data):
    kwargs = inputs(torch.float64)
    edges = sorted(data.draw(st.lists(st.integers(0, LK), max_size=5)))
    outs, lses = in_parts(kwargs, (0, *edges, LK))
    order = data.draw(st.permutations(range(len(outs))))
    merged = pyattn.merge_attention([outs[i] for i in order], [lses[i] for i in order])
    torch.testing.assert_close(merged, pyattn.attention(**kwargs, return_lse=True), rtol=1e-12, atol=1e-12)


def test_one_part_is_itself():
    outs, lses = in_parts(inputs(), (0, LK))
    out, lse = pyattn.merge_attention(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


@pytest.mark.parametrize("offset", [-8192.0, 8192.0])
def test_far_scores_do_not_overflow(offset):
    """Of numbers that the offset leaves exact the weights stay the same."""
    outs, lses = in_parts(inputs(), (0, 9, LK))
    lses = [(x * 256).round() / 256 for x in lses]
    out, lse = pyattn.merge_attention(outs, [x + offset for x in lses])
    expected, plain = pyattn.merge_attention(outs, lses)
    assert torch.equal(out, expected)
    torch.testing.assert_close(lse, plain + offset, rtol=torch.finfo(torch.float32).eps, atol=0)


def test_a_part_far_below_the_others_counts_nothing():
    outs, lses = in_parts(inputs(), (0, 9, LK))
    out, lse = pyattn.merge_attention(outs, [lses[0] - 1000, lses[1]])
    assert torch.equal(out, outs[1]) and torch.equal(lse, lses[1])


def test_parts_without_keys_count_nothing():
    """Also where they hold NaN, in values and gradients; if no part has keys the row is 0 and -inf."""
    outs, lses = in_parts(inputs(), (0, LK))
    nothing = torch.full_like(lses[0], -math.inf)
    empty = torch.full_like(outs[0], math.nan).requires_grad_()
    out, lse = pyattn.merge_attention([empty, outs[0].requires_grad_()], [nothing, lses[0].requires_grad_()])
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])
    (out.sum() + lse.sum()).backward()
    assert not empty.grad.any()
    torch.testing.assert_close(outs[0].grad, torch.ones_like(out))
    torch.testing.assert_close(lses[0].grad, torch.ones_like(lse))
    lses = [nothing.clone().requires_grad_() for _ in range(2)]
    out, lse = pyattn.merge_attention([empty, empty], lses)
    assert not out.any() and (lse == -math.inf).all()
    out.sum().backward()
    assert not lses[0].grad.any()


def test_gradients():
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def merge(*parts):
        return pyattn.merge_attention(parts[:3], parts[3:])

    assert torch.autograd.gradcheck(merge, (*outs, *lses))
    assert torch.autograd.gradgradcheck(merge, (*outs, *lses))


def test_gradients_through_the_parts_are_those_of_the_whole():
    def grads(call):
        kwargs = {name: x.requires_grad_() for name, x in inputs(torch.float64).items()}
        out, lse = call(kwargs)
        torch.manual_seed(1)
        loss = (out * torch.randn_like(out)).sum() + (lse * torch.randn_like(lse)).sum()
        return torch.autograd.grad(loss, tuple(kwargs.values()))

    torch.manual_seed(0)
    whole = grads(lambda kwargs: pyattn.attention(**kwargs, return_lse=True))
    torch.manual_seed(0)
    merged = grads(lambda kwargs: pyattn.merge_attention(*in_parts(kwargs, (0, 13, 13, LK))))
    torch.testing.assert_close(merged, whole, rtol=1e-11, atol=1e-11)


def z(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


OUT, LSE = z(2, 4, 5, 8), z(2, 4, 5)


@pytest.mark.parametrize(
    ("error", "message", "outs", "lses"),
    [
        (TypeError, "outs must be a list or tuple of tensors, got Tensor", OUT, [LSE]),
        (TypeError, "lses must be a list or tuple of tensors, got Tensor", [OUT], LSE),
        (ValueError, "outs must hold at least one part, got none", [], []),
        (ValueError, "lses must hold a part for each of the 2 outs, got 1", [OUT, OUT], [LSE]),
        (TypeError, r"outs\[0\] must be a tensor, got NoneType", [None], [LSE]),
        (TypeError, r"outs\[0\] must be .*, got int64", [OUT.long()], [LSE]),
        (TypeError, r"outs\[1\] must be float32, got float16", [OUT, OUT.half()], [LSE, LSE]),
        (ValueError, r"outs\[0\] must have shape \[B, Hq, Lq, Dv\], got \[4, 5, 8\]", [OUT[0]], [LSE]),
        (
            ValueError,
            r"outs\[1\] must have shape that of outs\[0\] .*got \[2, 4, 5, 7\]",
            [OUT, OUT[..., :7]],
            [LSE] * 2,
        ),
        (ValueError, r"outs\[1\] must be on the device of outs\[0\]", [OUT, OUT.to("meta")], [LSE, LSE]),
        (TypeError, r"lses\[0\] must be float32, got float64", [OUT], [LSE.double()]),
        (TypeError, r"lses\[0\] must be float64, got float32", [OUT.double()], [LSE]),
        (ValueError, r"lses\[0\] must have shape \[B, Hq, Lq\] = \[2, 4, 5\], got \[2, 4, 6\]", [OUT], [z(2, 4, 6)]),
        (ValueError, r"lses\[0\] must be on the device of outs\[0\]", [OUT], [LSE.to("meta")]),
    ],
)
def test_errors(error, message, outs, lses):
    with pytest.raises(error, match=message):
        pyattn.merge_attention(outs, lses)
