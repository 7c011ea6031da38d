"""The tolerance rule accepts a sound kernel and catches planted bugs, in every dtype."""

from __future__ import annotations

import pytest
import torch

from pyattn.testing import Case, assert_close, make_inputs, run, to_dtype

CASE = Case("planted", Hq=8, Hkv=2, Lq=100, Lk=130, window=(40, 0))  # bottom-right: row i sits at i + 30
SEEDS = range(5)

by_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


def tiled(query, key, value, *, scale=0.125, left=40, right=0, offset=30, heads=lambda h: h // 4, rescale=True):
    """A fused kernel in miniature: an online softmax over tiles of 32 keys, P rounded to the input dtype."""
    dtype, (B, H, Lq, D), Lk = query.dtype, query.shape, key.shape[2]
    kv_heads = [heads(h) for h in range(H)]
    q, k, v = query.float(), key.float()[:, kv_heads], value.float()[:, kv_heads]
    pos = torch.arange(Lq)[:, None] + offset
    m, total, acc = torch.full((B, H, Lq, 1), -torch.inf), torch.zeros(B, H, Lq, 1), torch.zeros(B, H, Lq, D)
    for j in range(0, Lk, 32):
        keys = torch.arange(j, min(j + 32, Lk))
        s = (q @ k[:, :, keys].mT * scale).masked_fill((keys < pos - left) | (keys > pos + right), -torch.inf)
        new_m = torch.maximum(m, s.amax(-1, keepdim=True))
        safe_m = new_m.masked_fill(new_m == -torch.inf, 0)
        p, factor = torch.exp(s - safe_m), torch.exp(m - safe_m)
        total = total * factor + p.sum(-1, keepdim=True)
        acc = acc * (factor if rescale else 1) + p.to(dtype).float() @ v[:, :, keys]
        m = new_m
    return (acc / total).to(dtype)


def judge(dtype, seed, **bug):
    kwargs = make_inputs(CASE, dtype, seed=seed)
    emulated, truth = run(kwargs, backend="reference"), run(to_dtype(kwargs, torch.float64))
    assert_close(tiled(kwargs["query"], kwargs["key"], kwargs["value"], **bug), emulated, truth)


@by_dtype
@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_kernel_passes(dtype, seed):
    judge(dtype, seed)


BUGS = {
    "scale 0.2% too large": {"scale": 0.125 * 1.002},
    "scale 0.2% too small": {"scale": 0.125 * 0.998},
    "window one key too wide": {"left": 41},
    "window one key too narrow": {"left": 39},
    "causal edge one key too wide": {"right": 1},
    "aligned top-left": {"offset": 0, "left": 10},  # left: the same keys at the far end, so no row is empty
    "wrong head of a group": {"heads": lambda h: h % 2},
    "sums not rescaled": {"rescale": False},
}


@by_dtype
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_bug_is_caught(dtype, bug, seed):
    with pytest.raises(AssertionError, match=r"out: (largest|relative L2|signed) error"):
        judge(dtype, seed, **BUGS[bug])


@by_dtype
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_planted_bug_in_a_gradient_is_caught(dtype, name):
    """A gradient that is 0.2% off, as a backward with its own, wrong, scale would give."""
    kwargs = make_inputs(CASE, dtype, requires_grad=True)
    exact = to_dtype(kwargs, torch.float64)
    emulated, truth = (torch.autograd.grad(run(k, backend="reference").sum(), k[name])[0] for k in (kwargs, exact))
    assert_close(truth.to(dtype), emulated, truth)
    with pytest.raises(AssertionError, match=r"(largest|relative L2|signed) error"):
        assert_close((truth * 1.002).to(dtype), emulated, truth)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_one_bad_element_is_caught(bad):
    truth = torch.zeros(50, dtype=torch.float64)
    actual = emulated = truth.float()
    assert_close(actual, emulated, truth)
    actual = actual.index_fill(0, torch.tensor([17]), bad)
    with pytest.raises(AssertionError, match=r"NaN|infinit|largest error"):
        assert_close(actual, emulated, truth)


def test_an_infinity_must_stand_where_the_truth_has_one():
    """The lse of a row without keys is -inf, and neither 0 nor a large negative number."""
    truth = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    assert_close(truth.float(), truth.float(), truth)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_close(torch.tensor([0.0, -1e30]), truth.float(), truth)


def test_shape_and_dtype_must_be_those_of_the_reference():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(3, 2), torch.zeros(2, 3), truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(torch.zeros(2, 3).half(), torch.zeros(2, 3), truth)
