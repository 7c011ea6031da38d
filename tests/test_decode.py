"""Few queries against many keys, dense and through pages: conformance, bits, and what must not be read."""

from __future__ import annotations

import pytest
import torch

from pyattn.testing import (
    DTYPES,
    OUTPUTS,
    Case,
    assert_close,
    check_case,
    expected,
    make_inputs,
    random_grads,
    to_pages,
)

DECODE = Case("decode", B=3, Hq=6, Hkv=2, Lq=1, Lk=5000, D=32, kv_lengths=(5000, 37, 4099))
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_num_queries = pytest.mark.parametrize("num_queries", [1, 3, 8])


def decode(num_queries=1, **changes):
    return Case(**(vars(DECODE) | {"Lq": num_queries} | changes))


def assert_same_bits(actual, expected):
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), f"{name}: {int((x != expected[name]).sum())} elements differ"


# ---- right, on either side of any decision -----------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("page_size", [None, 16], ids=["dense", "paged"])
def test_the_last_queries_alone(page_size, group, dtype, engine):
    """Aligned bottom-right, the last n of 70 queries are a problem of their own, for a decode kernel or for tiles."""
    case = Case("last", B=2, Hq=2 * group, Hkv=2, Lq=70, Lk=1100, D=32, causal=True)
    kwargs = make_inputs(case, dtype)
    emulations, truth = expected(case, dtype)
    paged = kwargs if page_size is None else to_pages(kwargs, page_size)
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 70):
        actual = engine.results(paged | {"query": kwargs["query"][:, :, -n:]})
        for name, x in actual.items():
            emulated = [e[name][:, :, -n:] for e in emulations]
            assert_close(x, emulated, truth[name][:, :, -n:], f"{name} of {n} queries")


@by_dtype
@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True},
        {"window": (1000, 0)},
        {"window": (None, 3), "q_offset": (4900, 20, 4000)},
        {"window": (10, None), "q_offset": (900, 4990, 4200), "kv_lengths": (20, 37, 4099)},
        {"kv_starts": (700, 36, 4098)},
        {"kv_lengths": (0, 5000, 1), "kv_starts": (0, 4999, 0)},
        {"mask": "bool"},
        {"mask": "float", "mask_shape": "B11K"},
        {"mask": "float32", "mask_shape": "1H1K", "causal": True},
        {"layout": "BLHD", "Dv": 48},
    ],
    ids=str,
)
@pytest.mark.parametrize("page_size", [None, 64], ids=["dense", "paged"])
def test_what_a_cache_may_ask_for(page_size, changes, dtype, engine):
    case = decode(4, **changes)
    kwargs = make_inputs(case, dtype)
    check_case(engine.results(kwargs if page_size is None else to_pages(kwargs, page_size)), case, dtype)


# ---- the same bits, whatever lies around -------------------------------------------------------------------


@by_dtype
@by_num_queries
@pytest.mark.parametrize("changes", [{}, {"Hq": 1, "Hkv": 1, "B": 1, "kv_lengths": None}], ids=["batch", "one head"])
def test_bits_do_not_depend_on_the_number_of_threads(changes, num_queries, dtype, engine):
    kwargs = make_inputs(decode(num_queries, causal=True, **changes), dtype)
    alone = engine.results(kwargs, threads=1)
    for threads in (2, 4):
        assert_same_bits(engine.results(kwargs, threads=threads), alone)


@by_dtype
@by_num_queries
@pytest.mark.parametrize("page_size", [None, 64], ids=["dense", "paged"])
def test_bits_of_a_sample_do_not_depend_on_its_batch(page_size, num_queries, dtype, engine):
    kwargs = make_inputs(decode(num_queries, causal=True), dtype)
    if page_size is not None:
        kwargs = to_pages(kwargs, page_size)
    batch = engine.results(kwargs)
    shared = () if page_size is None else ("key", "value")  # the pages serve every sample
    for b in range(DECODE.B):
        alone = {n: x[b : b + 1] if isinstance(x, torch.Tensor) and n not in shared else x for n, x in kwargs.items()}
        assert_same_bits(engine.results(alone), {name: x[b : b + 1] for name, x in batch.items()})


@by_dtype
@by_num_queries
@pytest.mark.parametrize(
    "changes",
    [{}, {"Hq": 8, "Hkv": 8, "Dv": 48}, {"Hq": 5, "Hkv": 5, "D": 20, "kv_starts": (1003, 20, 4090)}],
    ids=["groups", "heads", "starts"],
)
def test_pages_and_layouts_do_not_change_the_bits(changes, num_queries, dtype, engine):
    """Wherever pages lie: ``to_pages`` draws their order. Nor do key heads that lie side by side, in a page or BLHD."""
    kwargs = make_inputs(decode(num_queries, causal=True, **changes), dtype)
    dense = engine.results(kwargs)
    for page_size in (1, 7, 16, 32, 48, 64, 256):
        for threads in (1, 3):
            assert_same_bits(engine.results(to_pages(kwargs, page_size), threads=threads), dense)
    blhd = {n: kwargs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("key", "value")}
    assert_same_bits(engine.results(kwargs | blhd), dense)


@by_dtype
@pytest.mark.parametrize("num_queries", [100, 300])
def test_pages_do_not_change_the_bits_of_many_queries(num_queries, dtype, engine):
    case = decode(num_queries, Lk=700, kv_lengths=(700, 37, 409), kv_starts=(0, 5, 400), causal=True)
    kwargs = make_inputs(case, dtype)
    for page_size in (3, 64, 256):
        assert_same_bits(engine.results(to_pages(kwargs, page_size)), engine.results(kwargs))


# ---- pages: what may lie in them, and around them ----------------------------------------------------------


@by_dtype
@by_num_queries
@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_in_use_never_shows(fill, num_queries, dtype, engine):
    """Neither the rest of a page, nor other pages, nor what the block table names past the length."""
    kwargs = make_inputs(decode(num_queries, kv_lengths=(17, 0, 4999)), dtype)
    clean = engine.results(to_pages(kwargs, 16, fill=0.0))
    assert_same_bits(engine.results(to_pages(kwargs, 16, fill=fill)), clean)
    assert not clean["out"][1].any()
    assert (clean["lse"][1] == -torch.inf).all()


@by_dtype
@by_num_queries
def test_what_a_dense_cache_does_not_hold_yet_never_shows(num_queries, dtype, engine):
    kwargs = make_inputs(decode(num_queries), dtype)
    unused = (torch.arange(DECODE.Lk) >= kwargs["kv_lengths"][:, None])[:, None, :, None]
    poisoned = {name: kwargs[name].masked_fill(unused, torch.nan) for name in ("key", "value")}
    assert_same_bits(engine.results(kwargs | poisoned), engine.results(kwargs))


@by_dtype
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("page_size", [None, 16], ids=["dense", "paged"])
def test_a_nan_stays_with_the_queries_that_see_it(page_size, name, dtype, engine):
    """One key past a row's edge lies in the same page, tile and pair as the last that it sees."""
    kwargs = make_inputs(Case("leak", B=1, Hq=4, Hkv=2, Lq=8, Lk=2000, D=32, causal=True), dtype)
    for key in range(1992, 2000):
        poisoned = kwargs[name].clone()
        poisoned[:, :, key] = torch.nan
        poisoned = kwargs | {name: poisoned}
        out = engine.results(poisoned if page_size is None else to_pages(poisoned, page_size))["out"]
        assert out[:, :, : key - 1992].isfinite().all()
        assert out[:, :, key - 1992 :].isnan().all()


@by_dtype
def test_one_page_may_serve_several_samples(dtype, engine):
    """As a shared prompt does."""
    kwargs = to_pages(make_inputs(decode(2), dtype), 64)
    first = kwargs["block_table"][:1]
    shared = kwargs | {"block_table": first.expand_as(kwargs["block_table"])}
    results = engine.results(shared)
    for b in range(DECODE.B):
        alone = {name: kwargs[name][b : b + 1] for name in ("query", "kv_lengths")} | {"block_table": first}
        assert_same_bits(engine.results(kwargs | alone), {name: x[b : b + 1] for name, x in results.items()})


@by_dtype
@pytest.mark.parametrize("how", ["BLHD", "one tensor of keys and values", "sliced", "strided table"])
def test_pages_of_any_strides(how, dtype, engine):
    kwargs = to_pages(make_inputs(decode(3), dtype), 16)
    key, value, table = (kwargs[name] for name in ("key", "value", "block_table"))
    if how == "BLHD":  # [num_pages, page_size, Hkv, D], as flash-attn has them
        changed = {n: kwargs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("key", "value")}
    elif how == "one tensor of keys and values":  # [num_pages, 2, Hkv, page_size, D]
        changed = dict(zip(("key", "value"), torch.stack([key, value], 1).unbind(1), strict=True))
    elif how == "sliced":
        wide = {n: torch.full([size + 2 for size in kwargs[n].shape], torch.nan, dtype=dtype) for n in ("key", "value")}
        changed = {n: x[1:-1, 1:-1, 1:-1, 1:-1].copy_(kwargs[n]) for n, x in wide.items()}
    else:
        changed = {"block_table": torch.stack([table, table * 0 - 1], -1)[..., 0]}
    assert any(not x.is_contiguous() for x in changed.values())
    assert_same_bits(engine.results(kwargs | changed), engine.results(kwargs))


def test_a_table_without_columns(engine):
    """Nothing is in use: no page need exist."""
    kwargs = make_inputs(decode(2, kv_lengths=(0, 0, 0)), torch.float32)
    for num_pages in (0, 3):
        pages = {name: kwargs[name].new_full((num_pages, 2, 16, 32), torch.nan) for name in ("key", "value")}
        results = engine.results(kwargs | pages | {"block_table": torch.empty(3, 0, dtype=torch.int32)})
        assert not results["out"].any()
        assert (results["lse"] == -torch.inf).all()


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_no_heads(paged, engine):
    keys = torch.empty((25, 0, 16, 32) if paged else (1, 0, 400, 32))
    kwargs = {"query": torch.empty(1, 0, 1, 32), "key": keys, "value": keys}
    if paged:
        table = torch.arange(25, dtype=torch.int32)[None]
        kwargs |= {"block_table": table, "kv_lengths": torch.tensor([400])}
    results = engine.results(kwargs)
    assert results["out"].shape == (1, 0, 1, 32)
    assert results["lse"].shape == (1, 0, 1)


@by_dtype
@pytest.mark.parametrize("family", [{}, {"alibi": True, "softcap": 5.0, "sinks": True}], ids=["plain", "family"])
def test_packed_queries_over_pages_are_the_sequences_one_by_one(family, dtype, engine):
    """As a server batches them: some sequences decode, some prefill; bit for bit what each gives alone."""
    rows = [1, 70, 0, 4, 130, 1]
    case = decode(130, B=len(rows), Lk=700, kv_lengths=(700, 70, 33, 409, 300, 0), causal=True, **family)
    kwargs = to_pages(make_inputs(case, dtype), 16)
    queries = [kwargs["query"][b, :, :n].transpose(0, 1) for b, n in enumerate(rows)]
    packed = {n: x for n, x in kwargs.items() if n not in ("query", "attn_mask")}
    packed["cu_seqlens_q"] = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    packed["cu_seqlens_k"] = None
    results = engine.results(packed | {"query": torch.cat(queries)})
    first = 0
    for b, n in enumerate(rows):
        sample = {name: kwargs[name][b : b + 1] for name in ("block_table", "kv_lengths")}
        alone = engine.results(kwargs | sample | {"query": kwargs["query"][b : b + 1, :, :n]})
        assert torch.equal(results["out"][first : first + n].transpose(0, 1), alone["out"][0])
        assert torch.equal(results["lse"][:, first : first + n], alone["lse"][0])
        first += n


@by_dtype
def test_packed_sequences_are_the_sequences_one_by_one(dtype, engine):
    """Forward and gradients, bit for bit, of short and long sequences, whatever the number of threads."""
    lengths = ((1, 300), (130, 131), (0, 5), (7, 90), (200, 0), (64, 64))
    case = Case("packed", Hq=6, Hkv=2, D=24, packed=lengths, causal=True, alibi=True, softcap=5.0)
    kwargs = make_inputs(case, dtype, requires_grad=True)
    results = engine.results(kwargs, OUTPUTS)
    grads = random_grads(results)
    for threads in (1, 4):
        assert_same_bits(engine.results(kwargs, OUTPUTS, grads, threads), results)
    cu_q, cu_k = (kwargs[f"cu_seqlens_{side}"].tolist() for side in "qk")
    for b in range(len(lengths)):
        q, k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        dense = {n: x for n, x in kwargs.items() if not n.startswith("cu_seqlens")}
        for name, part in (("query", q), ("key", k), ("value", k)):
            dense[name] = kwargs[name].detach()[part].transpose(0, 1)[None].requires_grad_()
        incoming = {"out": grads["out"][q].transpose(0, 1)[None], "lse": grads["lse"][None, :, q]}
        alone = engine.results(dense, OUTPUTS, incoming)
        assert torch.equal(results["lse"][:, q], alone["lse"][0])
        for name, part in (("out", q), ("grad of query", q), ("grad of key", k), ("grad of value", k)):
            assert torch.equal(results[name][part].transpose(0, 1), alone[name][0]), f"{name} of sequence {b}"
