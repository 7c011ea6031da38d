"""Dropout: the same entries as the reference's, bit for bit, whatever the tiles, threads and instruction set."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyattn import functional, reference
from pyattn.spec import AttentionSpec
from pyattn.testing import DTYPES, Case, make_inputs, run

# Where every weight is equal and the values are the identity, the output is the pattern of what is kept.
CASES = [
    Case("one tile", B=2, Hq=2, Hkv=2, Lq=16, Lk=16),
    Case("few queries", B=2, Hq=4, Hkv=2, Lq=3, Lk=300),
    Case("tiles", B=2, Hq=6, Hkv=2, Lq=131, Lk=203),
    Case("edges", B=1, Hq=2, Hkv=1, Lq=140, Lk=210, window=(51, 13), q_offset=3),
    Case("causal", B=3, Hq=2, Hkv=2, Lq=150, Lk=150, causal=True),
    Case("padding", B=2, Hq=2, Hkv=2, Lq=70, Lk=90, kv_starts=(5, 0), kv_lengths=(90, 33)),
    Case("packed", Hq=4, Hkv=2, packed=((3, 110), (70, 20), (0, 7), (130, 135))),
]
by_case = pytest.mark.parametrize("case", CASES)


def inputs(case, dtype, p):
    """Query zero, and values that are the rows of an identity."""
    Lk = case.Lk if case.packed is None else max(k for _, k in case.packed)
    case = dataclasses.replace(case, D=8, Dv=Lk, dropout_p=p)
    kwargs = make_inputs(case, dtype)
    value, eye = kwargs["value"], torch.eye(Lk, dtype=dtype)
    if case.packed is None:
        value.copy_(eye)
    else:
        value.copy_(torch.cat([eye[:length] for _, length in case.packed])[:, None])
    return kwargs | {"query": torch.zeros_like(kwargs["query"])}


@pytest.mark.parametrize(("p", "seed"), [(0.1, 0), (0.5, 12345), (1.0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@by_case
def test_entries_are_the_references(case, dtype, p, seed, engine):
    kwargs = inputs(case, dtype, p)
    expected = run(kwargs, backend="reference", dropout_seed=seed) != 0
    for threads in (1, 2, 3):
        kept = engine.run(kwargs, threads=threads, dropout_seed=seed) != 0
        assert torch.equal(kept, expected)
    assert expected.any() == (p < 1)


@pytest.mark.parametrize("dtype", DTYPES)
@by_case
def test_the_backward_drops_what_the_forward_dropped(case, dtype, engine):
    """The gradient of value by output row i is the weights of row i, so it has their zeros."""
    kwargs = inputs(case, dtype, 0.4)
    rows = kwargs["query"].shape[0 if case.packed else 2]
    with engine.at_work(2):
        value = kwargs["value"].clone().requires_grad_()
        out = run(kwargs | {"value": value}, backend=engine.backend)
        for row in range(0, rows, 29):
            grad_out = torch.zeros_like(out)
            grad_out.movedim(0 if case.packed else 2, 0)[row, ..., 0] = 1
            (grad,) = torch.autograd.grad(out, value, grad_out, retain_graph=True)
            # [.., Hkv, Lk]: a key is kept if it is for one of the query heads that share its head
            weights = out.detach().movedim(0 if case.packed else 2, 0)[row] != 0  # [.., Hq, Dv]
            shared = weights.unflatten(-2, (kwargs["key"].shape[1], -1)).any(-2)
            if case.packed:
                sequence = int((kwargs["cu_seqlens_q"] <= row).sum()) - 1
                first, last = kwargs["cu_seqlens_k"][sequence : sequence + 2].tolist()
                assert torch.equal(grad[first:last, :, 0].T != 0, shared[:, : last - first])
                assert not grad[:first].any()
                assert not grad[last:].any()
            else:
                assert torch.equal(grad[..., 0] != 0, shared)


def test_weights_of_some_heads_are_those_of_the_call():
    """What the reference multiplies the identity by, head by head, with the heads' places in the call."""
    kwargs = inputs(Case("heads", B=2, Hq=4, Hkv=4, Lq=9, Lk=21, kv_lengths=(21, 0)), torch.float32, 0.4)
    out = run(kwargs, backend="reference")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        spec, t = functional.dense(**kwargs)
    for h in range(4):
        part = t._replace(query=t.query[:, h : h + 1], key=t.key[:, h : h + 1])
        torch.testing.assert_close(reference.attention_weights(spec, part, h), out[:, h : h + 1])
    torch.testing.assert_close(reference.attention_weights(spec, t), out)
    assert not out[1].any() and out[0].any()


def test_far_entries(engine):
    """Counters beyond 16 bits: a window far out in the keys, and many queries before it."""
    Lq, Lk = 66000, 140003
    q, k = torch.zeros(1, 1, Lq, 1), torch.zeros(1, 1, Lk, 1)
    v = torch.ones(1, 1, Lk, 1)
    kwargs = {"query": q, "key": k, "value": v, "window": (0, 0), "q_offset": Lk - Lq, "dropout_p": 0.5}
    kept = engine.run(kwargs)[0, 0, :, 0] != 0
    spec, seed = AttentionSpec(1.0, dropout_p=0.5), seed_of_run()
    rows = torch.tensor([0, 1, 7, 65535, 65536, Lq - 1])
    for i in rows.tolist():
        key = i + Lk - Lq
        words = reference.philox(tuple(torch.tensor(n) for n in (key // 8, i, 0, 0)), seed)
        half = (int(words[key & 3]) >> 16 * (key >> 2 & 1)) & 0xFFFF
        assert bool(kept[i]) == (half >= spec.dropout_threshold), i
    assert 0.49 < float(kept.float().mean()) < 0.51


def seed_of_run():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what ``run`` seeds the generator with
        info = torch.iinfo(torch.int64)
        return int(torch.randint(info.min, info.max, (), dtype=torch.int64))
