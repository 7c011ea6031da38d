"""Conformance: every case, backend, instruction set and dtype against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

import pyattn
from pyattn import reference
from pyattn.testing import CASES, DTYPES, check_case, make_inputs, run, to_dtype

by_case = pytest.mark.parametrize("case", CASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@by_dtype
@by_case
def test_forward(case, dtype, engine):
    check_case(engine.results(make_inputs(case, dtype)), case, dtype)


def test_the_plan_says_how():
    """Of few queries the keys are split, but not with dropout; a packed batch is planned sequence by sequence."""
    for name, how in (
        ("decode", "keys split into chunks"),
        ("decode, dropout", "tiles of 64 queries"),
        ("causal", "tiles of 64 queries"),
        ("packed", "each sequence by its own length"),
    ):
        (case,) = (case for case in CASES if case.name == name)
        row = pyattn.explain(**make_inputs(case, torch.float32)).rows[0]
        assert row.backend == "cpu"
        assert how in row.plan


def test_cpu_backend_is_built():
    assert pyattn.backends.cpu.unavailable() == []


@by_dtype
@by_case
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_cpu_backend_is_able(op, case, dtype, engine):
    """Skips hide no hole: the CPU kernels compute everything, and automatic dispatch takes them."""
    if op == "backward" and not case.differentiable:
        pytest.skip("paged keys have no gradient")
    explanation = pyattn.explain(**make_inputs(case, dtype, requires_grad=case.differentiable))
    (reasons,) = (row.reasons for row in explanation.rows if (row.op, row.backend) == (op, "cpu"))
    assert reasons == ()
    assert explanation.chosen[op] == "cpu"


# ---- the reference itself ----------------------------------------------------------------------------------


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
                    if case.mask == "bool" and not mask[b, h, i, j]:
                        continue
                    if case.mask in ("float", "float32"):
                        s += float(mask[b, h, i, j])
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


@by_case
def test_reference_follows_the_definition(case):
    case = case.small()
    kwargs = to_dtype(make_inputs(case, torch.float32), torch.float64)
    out, lse = run(kwargs, backend="reference", return_lse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what ``run`` seeds the generator with
        info = torch.iinfo(torch.int64)
        seed = int(torch.randint(info.min, info.max, (), dtype=torch.int64))
    torch.testing.assert_close((out, lse), by_definition(case, kwargs, seed))


@by_dtype
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
