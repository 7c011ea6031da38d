"""Conformance: every case, backend, instruction set and dtype against the float64 reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from unittest import mock

import pytest
import torch

import pyattn
from pyattn import dispatch, functional, reference
from pyattn.testing import CASES, assert_close, make_inputs, run, to_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "sinks")
WITH_GRADIENT = [case for case in CASES if case.page_size is None]
# What the CPU backend has to compute itself (issue 2, section 3).
DEMANDED_OF_CPU = [
    case
    for case in CASES
    if not (case.alibi or case.softcap or case.sinks or case.dropout_p or case.page_size or case.packed)
]

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def forward_and_gradients(kwargs, call):
    """``{name: tensor}``: out, lse, and the gradients under random gradients of out and of lse."""
    out, lse = call(kwargs)
    inputs = {name: x for name in DIFFERENTIABLE if (x := kwargs.get(name)) is not None and x.requires_grad}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    gradients = torch.autograd.grad((out, lse), tuple(inputs.values()), grads)
    named = {f"grad of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | named


def on_reference(kwargs):
    return run(kwargs, backend="reference", return_lse=True)


@functools.cache
def expected(case, dtype, gradients):
    """What the fused emulation and the float64 reference give for the case."""
    kwargs = make_inputs(case, dtype, requires_grad=gradients)
    exact = to_dtype(kwargs, torch.float64)
    if not gradients:
        return [dict(zip(("out", "lse"), on_reference(k), strict=True)) for k in (kwargs, exact)]
    emulated, truth = (forward_and_gradients(k, on_reference) for k in (kwargs, exact))
    # Any forward pairs with any backward, so the emulated backward gets the true out, rounded, and the true
    # lse, an epsilon off. The lse of its own forward shares its rounding errors in the scores: they would cancel.
    signs = torch.randint(0, 2, truth["lse"].shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    forward = truth["out"].to(dtype), (truth["lse"] * (1 + signs * torch.finfo(torch.float32).eps)).float()
    with mock.patch.object(reference, "forward", lambda spec, tensors: forward):
        return forward_and_gradients(kwargs, on_reference) | {n: emulated[n] for n in ("out", "lse")}, truth


def check(actual, case, dtype, gradients):
    emulated, truth = expected(case, dtype, gradients)
    for name, x in actual.items():
        assert_close(x, emulated[name], truth[name], name)


@by_dtype
@by_name
def test_forward(case, dtype, engine):
    out, lse = engine.run(make_inputs(case, dtype), return_lse=True)
    check({"out": out, "lse": lse}, case, dtype, gradients=False)


@by_dtype
@pytest.mark.parametrize("case", WITH_GRADIENT, ids=lambda case: case.name)
def test_gradients(case, dtype, engine):
    """Also of a backend without a backward of its own: any forward pairs with any backward."""
    kwargs = make_inputs(case, dtype, requires_grad=True)
    try:
        actual = forward_and_gradients(kwargs, lambda k: engine.run(k, return_lse=True))
    except NotImplementedError as error:
        assert f"backend {engine.backend!r} cannot compute this backward" in str(error)
        if engine.isa != pyattn.backends.cpu.available_isas()[0]:
            pytest.skip(f"{error}; the pairing is tested on the first instruction set")
        actual = forward_and_gradients(kwargs, lambda k: run(k, return_lse=True))
    check(actual, case, dtype, gradients=True)


@by_dtype
@by_name
def test_the_emulation_is_near_the_truth(case, dtype):
    """The rule's measure must itself be good: a poor emulation would let everything pass."""
    emulated, truth = expected(case, dtype, case in WITH_GRADIENT)
    for name, x in emulated.items():
        assert x.dtype == (torch.float32 if name == "lse" else dtype)
        finite = truth[name].isfinite()
        assert torch.equal(x.isfinite(), finite), name
        error, norm = float((x.double() - truth[name])[finite].norm()), float(truth[name][finite].norm())
        # float32 sums hundreds of terms in float32; the others are rounded more coarsely than they are summed
        epsilons = 16 if x.dtype == torch.float32 else 2
        assert error <= epsilons * torch.finfo(x.dtype).eps * norm, f"{name}: {error / norm:.3g}"


def test_cpu_backend_is_built():
    assert pyattn.backends.cpu.unavailable() == []


@by_dtype
@pytest.mark.parametrize("case", DEMANDED_OF_CPU, ids=lambda case: case.name)
def test_cpu_backend_is_able(case, dtype, engine):
    """Skips hide no hole: automatic dispatch takes the CPU kernels wherever they are demanded."""
    kwargs = make_inputs(case, dtype)
    explanation = pyattn.explain(**kwargs)
    assert dispatch.why_not(explanation.problem, "cpu") == ()
    assert explanation.chosen["forward"] == "cpu"


# ---- the reference itself ----------------------------------------------------------------------------------


def small(case):
    """The same features at lengths and head dims an order of magnitude smaller."""

    def shrink(x, step):
        if isinstance(x, tuple):
            return tuple(shrink(y, step) for y in x)
        return None if x is None else -(-x // step)

    step = max(case.Lq, case.Lk) // 6 + 1 if case.packed is None else 16
    lengths = ("Lq", "Lk", "window", "q_offset", "kv_lengths", "kv_starts", "packed")
    changes = {name: shrink(getattr(case, name), step) for name in lengths}
    changes |= {"D": shrink(case.D, 32), "Dv": shrink(case.Dv, 32)}
    if case.page_size is not None:
        changes |= {"page_size": 2, "Lk": changes["Lk"] * 2}
    return dataclasses.replace(case, **changes)


def make_small(case, requires_grad=False):
    return to_dtype(make_inputs(small(case), torch.float32, requires_grad=requires_grad), torch.float64)


@pytest.mark.parametrize("case", WITH_GRADIENT, ids=lambda case: case.name)
def test_gradcheck(case):
    kwargs = make_small(case, requires_grad=True)
    names = [name for name in DIFFERENTIABLE if kwargs.get(name) is not None and kwargs[name].requires_grad]

    def function(*inputs):
        out, lse = run({**kwargs, **dict(zip(names, inputs, strict=True))}, return_lse=True)
        return out, torch.where(lse == -torch.inf, 0, lse)  # differences of -inf are NaN

    # fast_mode: along random directions instead of element by element
    assert torch.autograd.gradcheck(function, tuple(kwargs[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("case", [c for c in WITH_GRADIENT if c.packed is None], ids=lambda case: case.name)
def test_gradients_are_those_of_autograd_through_naive(case):
    kwargs = to_dtype(make_inputs(case, torch.float32, requires_grad=True), torch.float64)
    actual = forward_and_gradients(kwargs, on_reference)
    if (actual["lse"] == -torch.inf).any():
        pytest.skip("naive attention gives NaN in a row without keys")

    def naive(k):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return functional.naive_attention(**k, return_lse=True)

    for name, x in forward_and_gradients(kwargs, naive).items():
        torch.testing.assert_close(actual[name], x, msg=lambda m, name=name: f"{name}: {m}")


MASK32 = 2**32 - 1


def philox_scalar(counter, key):
    """Philox 4x32-10 with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK32, (a >> 32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


# kat_vectors of Random123, philox 4x32, 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox(counter, key, answer):
    assert philox_scalar(counter, key) == answer
    seed = key[0] | key[1] << 32
    for s in (seed, seed - 2**64 if seed >= 2**63 else seed):  # the op's seed is a signed integer
        words = reference.philox(tuple(torch.tensor(c) for c in counter), s)
        assert tuple(int(w) for w in words) == answer


def dropout_weight(seed, p, b, h, i, j):
    words = philox_scalar((j // 8, i, h, b), (seed & MASK32, seed >> 32 & MASK32))
    threshold = round(p * 65536)
    kept = words[j & 3] >> 16 * (j >> 2 & 1) & 0xFFFF >= threshold
    return 65536 / (65536 - threshold) if kept else 0.0


def by_definition(case, kwargs, seed):
    """``(out, lse)`` key by key, from the words of the documentation and with no code of pyattn."""
    B, Hq, Dv = case.batch, case.Hq, kwargs["value"].shape[-1]
    query, key, value = kwargs["query"], kwargs["key"], kwargs["value"]
    numbers = {name: kwargs.get(name) for name in ("kv_lengths", "kv_starts", "q_offset")}
    numbers = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in numbers.items()}
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.D)
    mask = kwargs.get("attn_mask")
    mask = None if mask is None else mask.expand(B, Hq, case.Lq, case.Lk)
    outs, lses = [], []
    for b in range(B):
        if case.packed is not None:
            (q0, q1), (k0, k1) = (kwargs[f"cu_seqlens_{s}"][b : b + 2].tolist() for s in "qk")
            q, k, v = (x.movedim(1, 0) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        elif case.page_size is not None:
            pages = kwargs["block_table"][b].tolist()
            q, k, v = query[b], torch.cat([key[n] for n in pages], 1), torch.cat([value[n] for n in pages], 1)
        else:
            q, k, v = query[b], key[b], value[b]
        Lq, Lk = q.shape[1], k.shape[1]
        length = numbers["kv_lengths"][b] if numbers["kv_lengths"] else Lk
        start = numbers["kv_starts"][b] if numbers["kv_starts"] else 0
        offset = numbers["q_offset"]
        offset = length - Lq if offset is None else offset[b] if isinstance(offset, list) else offset
        out, lse = query.new_zeros(Hq, Lq, Dv), query.new_full((Hq, Lq), -torch.inf)
        for h in range(Hq):
            hk = h // (Hq // case.Hkv)
            for i in range(Lq):
                weights = [math.exp(float(kwargs["sinks"][h]))] if case.sinks else []
                for j in range(start, length):
                    distance = j - (i + offset)
                    if (left is not None and distance < -left) or (right is not None and distance > right):
                        continue
                    s = scale * float(q[h, i] @ k[hk, j])
                    s = case.softcap * math.tanh(s / case.softcap) if case.softcap else s
                    if case.alibi:
                        s -= float(kwargs["alibi_slopes"][h]) * abs(distance)
                    if case.mask == "float":
                        s += float(mask[b, h, i, j])
                    elif case.mask == "bool" and not mask[b, h, i, j]:
                        continue
                    weights.append(math.exp(s))
                    dropped = dropout_weight(seed, case.dropout_p, b, h, i, j) if case.dropout_p else 1
                    out[h, i] += weights[-1] * dropped * v[hk, j]
                if sum(weights) > 0:
                    out[h, i] /= sum(weights)
                    lse[h, i] = math.log(sum(weights))
        outs.append(out)
        lses.append(lse)
    if case.packed is not None:
        return torch.cat(outs, 1).movedim(0, 1), torch.cat(lses, 1)
    return torch.stack(outs), torch.stack(lses)


@by_name
def test_reference_follows_the_definition(case):
    kwargs = make_small(case)
    out, lse = on_reference(kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what ``run`` seeds the generator with
        info = torch.iinfo(torch.int64)
        seed = int(torch.randint(info.min, info.max, (), dtype=torch.int64))
    torch.testing.assert_close((out, lse), by_definition(small(case), kwargs, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_offset", [0, 1, 2, 3])
def test_a_nan_value_stays_behind_the_diagonal(engine, dtype, q_offset):
    """At every parity of the diagonal: kernels that read values in pairs of keys must not read one masked key more."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 16, generator=generator).to(dtype) for length in (130, 141, 141))
    for key in range(60, 72):
        value = v.clone()
        value[:, :, key] = torch.nan
        out = engine.run({"query": q, "key": k, "value": value, "causal": True, "q_offset": q_offset})
        blind = torch.arange(130) + q_offset < key
        assert out[0, 0, blind].isfinite().all()
        assert out[0, 0, ~blind].isnan().all()
