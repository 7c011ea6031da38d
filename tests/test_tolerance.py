"""The tolerance rule accepts a sound kernel and catches planted bugs, in every dtype."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import pytest
import torch

from pyattn import reference
from pyattn.testing import (
    CASES,
    DTYPES,
    OUTPUTS,
    Case,
    assert_close,
    check_case,
    expected,
    forward_and_gradients,
    make_inputs,
    run,
)

CASE = Case("planted", Hq=8, Hkv=2, Lq=100, Lk=130, window=(40, 0))  # bottom-right: row i sits at i + 30

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_seed = pytest.mark.parametrize("seed", range(5))


@by_dtype
@pytest.mark.parametrize("case", CASES)
def test_the_emulation_is_near_the_truth(case, dtype):
    """The rule's measure must itself be good: a poor emulation would let everything pass."""
    emulations, truth = expected(case, dtype, OUTPUTS if case.differentiable else ())
    for name, x in (item for emulated in emulations for item in emulated.items()):
        of_float32 = name == "lse" or (name == "grad of attn_mask" and case.mask == "float32")
        assert x.dtype == (torch.float32 if of_float32 else dtype)
        finite = truth[name].isfinite()
        assert torch.equal(x.isfinite(), finite), name
        error, norm = float((x.double() - truth[name])[finite].norm()), float(truth[name][finite].norm())
        computed_in = torch.float32 if name == "lse" else dtype  # a float32 mask's gradient has seen a rounded out
        # float32 sums hundreds of terms in float32; the others are rounded more coarsely than they are summed
        epsilons = 20 if computed_in == torch.float32 else 2
        assert error <= epsilons * torch.finfo(computed_in).eps * norm, f"{name}: {error / norm:.3g}"


# ---- planted bugs: the forward -----------------------------------------------------------------------------


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
    check_case({"out": tiled(kwargs["query"], kwargs["key"], kwargs["value"], **bug)}, CASE, dtype, seed=seed)


@by_dtype
@by_seed
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
@by_seed
def test_a_planted_bug_is_caught(dtype, bug, seed):
    with pytest.raises(AssertionError, match=r"out: (largest|relative L2|signed) error"):
        judge(dtype, seed, **BUGS[bug])


# ---- planted bugs: the gradients ---------------------------------------------------------------------------

GRADIENT_CASE = Case("planted", Hq=8, Hkv=2, Lq=100, Lk=130, window=(40, 0), mask="float", mask_shape="1HQK")


def sum_groups(x):
    """``[B, Hq, Lk, D]`` to ``[B, Hkv, Lk, D]``: query head h reads kv head h // 4."""
    return x.unflatten(1, (2, 4)).sum(2)


def tiled_backward(
    spec,
    t,
    out,
    lse,
    grad_out,
    grad_lse,
    needs_mask_grad,
    *,
    dq_scale=0.125,
    dk_scale=0.125,
    left=40,
    right=0,
    end_q=100,
    end_k=130,
    row_term=lambda delta, dlse: delta - dlse,
    lse_used=lambda lse, of_one_tile: lse,
    dv_weights=lambda p, lse: p,
    dk_sum=sum_groups,
    dv_sum=sum_groups,
    mask_sum=lambda ds: ds.sum(0, keepdim=True),
):
    """A fused backward in miniature: P recomputed from lse in tiles of 32 queries x 32 keys, P and dS rounded to the
    input dtype before their products, sums in float32. In the place of the reference's."""
    dtype = t.query.dtype
    q, k, v, o, do = (x.float() for x in (t.query, t.key, t.value, out, grad_out))
    k, v = (reference.repeat_heads(x, 8) for x in (k, v))
    mask = t.attn_mask.float()
    tile = slice(64, 96)
    _, lse_of_one_tile = run(
        {"query": q, "key": k[:, :, tile], "value": v[:, :, tile], "attn_mask": mask[..., tile]},
        window=(40, 0),
        q_offset=30 - tile.start,
        return_lse=True,
    )
    lse = lse_used(lse, lse_of_one_tile)
    rows_term = row_term((do * o).sum(-1), grad_lse)
    dq, dk, dv, dmask = (torch.zeros_like(x) for x in (q, k, v, mask.expand(2, -1, -1, -1)))
    for i in range(0, end_q, 32):
        rows = slice(i, min(i + 32, 100))
        pos = torch.arange(rows.start, rows.stop)[:, None] + 30
        for j in range(0, end_k, 32):
            keys = slice(j, min(j + 32, 130))
            key = torch.arange(keys.start, keys.stop)
            s = q[:, :, rows] @ k[:, :, keys].mT * 0.125 + mask[:, :, rows, keys]
            s = s.masked_fill((key < pos - left) | (key > pos + right), -torch.inf)
            p = torch.exp(s - lse[:, :, rows, None])
            ds = p * (do[:, :, rows] @ v[:, :, keys].mT - rows_term[:, :, rows, None])
            dmask[:, :, rows, keys] = ds
            ds = ds.to(dtype).float()
            dq[:, :, rows] += ds @ k[:, :, keys]
            dk[:, :, keys] += ds.mT @ q[:, :, rows]
            dv[:, :, keys] += dv_weights(p, lse[:, :, rows, None]).to(dtype).float().mT @ do[:, :, rows]
    gradients = dq * dq_scale, dk_sum(dk) * dk_scale, dv_sum(dv), mask_sum(dmask)
    return *(x.to(dtype) for x in gradients), None


def judge_gradients(dtype, seed, **bug):
    kwargs = make_inputs(GRADIENT_CASE, dtype, seed=seed, requires_grad=True)
    with mock.patch.object(reference, "backward", functools.partial(tiled_backward, **bug)):
        actual = forward_and_gradients(kwargs, lambda k: run(k, backend="reference", return_lse=True))
    check_case(actual, GRADIENT_CASE, dtype, OUTPUTS, seed)


@by_dtype
@by_seed
def test_a_sound_backward_passes(dtype, seed):
    judge_gradients(dtype, seed)


GRADIENT_BUGS = {
    "dq without scale": {"dq_scale": 1},
    "dq's scale 0.2% too large": {"dq_scale": 0.125 * 1.002},
    "dq's scale 0.2% too small": {"dq_scale": 0.125 * 0.998},
    "dk without scale": {"dk_scale": 1},
    "dk's scale 0.2% too large": {"dk_scale": 0.125 * 1.002},
    "dk's scale 0.2% too small": {"dk_scale": 0.125 * 0.998},
    "no delta": {"row_term": lambda delta, dlse: -dlse},
    "delta of the wrong sign": {"row_term": lambda delta, dlse: -delta - dlse},
    "no gradient of lse": {"row_term": lambda delta, dlse: delta},
    "gradient of lse of the wrong sign": {"row_term": lambda delta, dlse: delta + dlse},
    "lse counts a tile twice": {"lse_used": torch.logaddexp},
    "lse 0.2% off": {"lse_used": lambda lse, _: lse * 1.002},
    "dv not normalised": {"dv_weights": lambda p, lse: p * lse.exp()},
    "dk of the wrong heads": {"dk_sum": lambda x: x.unflatten(1, (4, 2)).sum(1)},
    "dk forgets a head of each group": {"dk_sum": lambda x: x.unflatten(1, (2, 4))[:, :, :3].sum(2)},
    "dv of the wrong heads": {"dv_sum": lambda x: x.unflatten(1, (4, 2)).sum(1)},
    "dv forgets a head of each group": {"dv_sum": lambda x: x.unflatten(1, (2, 4))[:, :, :3].sum(2)},
    "causal edge one key too wide": {"right": 1},
    "causal edge one key too narrow": {"right": -1},
    "window one key too wide": {"left": 41},
    "window one key too narrow": {"left": 39},
    "mask's gradient scaled": {"mask_sum": lambda ds: ds.sum(0, keepdim=True) * 0.125},
    "mask's gradient of neighbouring heads": {
        "mask_sum": lambda ds: ds.flatten(0, 1).unflatten(0, (8, 2)).sum(1)[None]
    },
    "mask's gradient forgets a sample": {"mask_sum": lambda ds: ds[:1]},
    "mask's gradient forgets a head": {
        "mask_sum": lambda ds: ds.sum(0, keepdim=True).index_fill(1, torch.tensor(7), 0)
    },
    "last keys dropped": {"end_k": 128},
    "last queries dropped": {"end_q": 96},
}


@by_dtype
@pytest.mark.parametrize("bug", GRADIENT_BUGS)
def test_a_planted_bug_in_a_gradient_is_caught(dtype, bug):
    with pytest.raises(AssertionError, match=r"grad of \w+: (largest|relative L2|signed) error"):
        judge_gradients(dtype, 0, **GRADIENT_BUGS[bug])


# ---- the rule itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_one_bad_element_is_caught(bad):
    truth = torch.zeros(50, dtype=torch.float64)
    actual = emulated = truth.float()
    assert_close(actual, [emulated], truth)
    actual = actual.index_fill(0, torch.tensor([17]), bad)
    with pytest.raises(AssertionError, match=r"NaN|infinit|largest error"):
        assert_close(actual, [emulated], truth)


def test_an_infinity_must_stand_where_the_truth_has_one():
    """The lse of a row without keys is -inf, and neither 0 nor a large negative number."""
    truth = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    assert_close(truth.float(), [truth.float()], truth)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_close(torch.tensor([0.0, -1e30]), [truth.float()], truth)


def test_shape_and_dtype_must_be_those_of_the_reference():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(3, 2), [torch.zeros(2, 3)], truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(torch.zeros(2, 3).half(), [torch.zeros(2, 3)], truth)


# ---- planted bugs: the rest of the family ------------------------------------------------------------------

FAMILY = {"alibi": True, "softcap": 3.0, "sinks": True, "dropout_p": 0.2, "Hq": 8, "Hkv": 2, "D": 32}
FAMILY_CASES = {
    "dense": Case("family", Lq=60, Lk=90, kv_lengths=(90, 70), kv_starts=(0, 21), q_offset=(30, 11), causal=True,
                  **FAMILY),
    "packed": Case("packed family", packed=((30, 60), (9, 50), (40, 41)), window=(30, 0), **FAMILY),
}  # fmt: skip


def of_inputs(**changes):
    """A kernel that takes something else for an argument."""
    return (
        None,
        lambda kwargs: kwargs | {n: change(kwargs[n]) for n, change in changes.items() if kwargs.get(n) is not None},
    )


def of(function, mutate):
    """A kernel in which ``mutate(result, *arguments)`` is what a function of the reference returns."""
    original = getattr(reference, function)
    return (function, lambda *args: mutate(original(*args), *args)), lambda kwargs: kwargs


FACTOR, BACKWARD = reference.dropout_factor, reference.backward
FAMILY_BUGS = {
    "slopes 1% off": of("alibi_bias", lambda bias, *_: bias * 1.01),
    "slopes of the wrong sign": of("alibi_bias", lambda bias, *_: -bias),
    "slopes of another head": of("alibi_bias", lambda bias, *_: bias.roll(1, 1)),
    "distances one off": of("alibi_bias", lambda bias, *_: bias.roll(1, -1)),
    "softcap 1% off": of_inputs(softcap=lambda cap: cap * 1.01),
    "softcap without its derivative": of("_scores", lambda scores, *_: (scores[0], None)),
    "sinks of another head": of_inputs(sinks=lambda sinks: sinks.roll(1)),
    "sinks forgotten": of_inputs(sinks=lambda sinks: sinks * 0 - torch.inf),
    "gradient of sinks of the wrong sign": of("backward", lambda grads, *_: (*grads[:4], -grads[4])),
    "gradient of sinks 5% off": of("backward", lambda grads, *_: (*grads[:4], grads[4] * 1.05)),
    "dropout of the next sample": of("dropout_factor", lambda _, spec, t, dtype, b: FACTOR(spec, t, dtype, b + 1)),
    "dropout of the next key": of("dropout_factor", lambda factor, *_: factor.roll(1, -1)),
    "dropout of the next row": of("dropout_factor", lambda factor, *_: factor.roll(1, -2)),
    "dropout of the next head": of("dropout_factor", lambda factor, *_: factor.roll(1, 1)),
    "what is kept is not scaled": of("dropout_factor", lambda factor, *_: factor.sign()),
    "no dropout in the backward": of("backward", lambda _, spec, *a: BACKWARD(spec._replace(dropout_p=0.0), *a)),
    "one key more": of("key_range", lambda ends, *_: (ends[0], ends[1] + 1)),
    "one key less": of("key_range", lambda ends, *_: (ends[0] + 1, ends[1])),
    "lengths of the other sample": of_inputs(kv_lengths=lambda x: x.flip(0), cu_seqlens_k=lambda x: x[-1] - x.flip(0)),
    "offsets of the other sample": of_inputs(q_offset=lambda x: x.flip(0), cu_seqlens_q=lambda x: x[-1] - x.flip(0)),
}  # fmt: skip


@by_dtype
@pytest.mark.parametrize("kind", FAMILY_CASES)
@pytest.mark.parametrize("bug", [None, *FAMILY_BUGS])
def test_a_planted_bug_in_the_family_is_caught(bug, kind, dtype):
    case = FAMILY_CASES[kind]
    expected(case, dtype, OUTPUTS)  # before anything is planted
    patch, change = FAMILY_BUGS[bug] if bug else (None, lambda kwargs: kwargs)
    kwargs = change(make_inputs(case, dtype, requires_grad=True))
    with mock.patch.object(reference, *patch) if patch else contextlib.nullcontext():
        actual = forward_and_gradients(kwargs, lambda k: run(k, backend="reference", return_lse=True))
    with pytest.raises(AssertionError, match=r"error|infinit") if bug else contextlib.nullcontext():
        check_case(actual, case, dtype, OUTPUTS)
