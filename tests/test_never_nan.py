"""Never NaN: rows without keys, NaN and inf where no row looks, and numbers as large as they come, on every backend.

Forward and gradients, held to the float64 reference by the rule of ``pyattn.testing``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from pyattn.testing import (
    DIFFERENTIABLE,
    DTYPES,
    OUTPUTS,
    Case,
    check_case,
    check_results,
    emulations_and_truth,
    make_inputs,
    random_grads,
    run,
    to_dtype,
    to_pages,
    visible,
)

NAN, INF = math.nan, math.inf
FAMILY = {"alibi": True, "softcap": 5.0, "sinks": True, "dropout_p": 0.2}
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
POISONS = (("key", NAN), ("value", NAN), ("key", INF), ("value", -INF))


def by_name(problems):
    return pytest.mark.parametrize("name", list(problems))


def inputs(case, change, dtype):
    """The case's inputs after ``change`` wrote to them, all differentiable that may be."""
    kwargs = make_inputs(case, dtype)
    if change is not None:
        change(kwargs)
    for name in DIFFERENTIABLE:
        if case.differentiable and name in kwargs and kwargs[name].is_floating_point():
            kwargs[name] = kwargs[name].detach().requires_grad_()
    return kwargs


def through(kwargs):
    return OUTPUTS if kwargs["query"].requires_grad else ()


def by_row(results):
    """A value, or a vector, for each row ``[B, Hq, Lq]`` or ``[Hq, total_q]``: packed results in the order of lse."""
    results = {name: results[name] for name in ("out", "lse", "grad of query") if name in results}
    packed = results["lse"].dim() == 2
    return {name: x.movedim(1, 0) if packed and name != "lse" else x for name, x in results.items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


# ---- rows without keys -------------------------------------------------------------------------------------


def mask_rows(value):
    """Masks every third row, and a whole tile of rows."""

    def change(kwargs):
        kwargs["attn_mask"] = kwargs["attn_mask"].clone()
        kwargs["attn_mask"][:, :, ::3] = kwargs["attn_mask"][:, :, 64:128] = value

    return change


MASKED_ROWS = 64 + sum(i % 3 == 0 for i in [*range(64), *range(128, 140)])
# The rows of a head, over all samples, that see no key; counted by hand.
ROWS_WITHOUT_KEYS = {
    "causal": (Case("", D=16, Lq=70, Lk=50, causal=True), None, 2 * 20),
    "offset": (Case("", Lq=70, Lk=90, causal=True, q_offset=-66, D=16), None, 2 * 66),
    "offset per sample": (Case("", D=16, Hq=8, Hkv=2, Lq=50, Lk=90, causal=True, q_offset=(-3, -9)), None, 3 + 9),
    "window": (Case("", Lq=90, Lk=40, window=(5, 0), q_offset=10, D=16), None, 2 * 55),
    "window, one query": (Case("", D=16, Lq=1, Lk=40, window=(5, 9), q_offset=45), None, 2),
    "bool mask": (Case("", Lq=140, Lk=130, D=16, mask="bool"), mask_rows(False), 2 * MASKED_ROWS),
    "float mask": (Case("", Lq=140, Lk=130, D=16, mask="float"), mask_rows(-INF), 2 * MASKED_ROWS),
    "float32 mask": (Case("", Lq=140, Lk=190, D=16, mask="float32"), mask_rows(-INF), 2 * MASKED_ROWS),
    "kv_lengths 0": (Case("", D=16, Lq=33, Lk=70, kv_lengths=(0, 70)), None, 33),
    "kv_starts at kv_lengths": (Case("", D=16, Lq=33, Lk=90, kv_lengths=(70, 90), kv_starts=(70, 20)), None, 33),
    "kv_starts behind kv_lengths": (Case("", D=16, Lq=33, Lk=90, kv_lengths=(9, 20), kv_starts=(80, 21)), None, 66),
    "kv_starts, causal": (Case("", D=16, Lq=90, Lk=90, causal=True, kv_starts=(0, 67)), None, 67),
    "one query, kv_lengths 0": (Case("", Hq=6, Hkv=2, Lq=1, Lk=700, D=32, kv_lengths=(0, 700)), None, 1),
    "no keys": (Case("", D=16, Lq=33, Lk=0), None, 66),
    "paged": (Case("", D=16, Lq=9, Lk=112, page_size=16, kv_lengths=(100, 4), causal=True), None, 5),
    "paged, kv_starts": (Case("", D=16, Lq=1, Lk=640, page_size=64, kv_lengths=(600, 0), kv_starts=(600, 0)), None, 2),
    "packed": (Case("", packed=((70, 50), (5, 0), (33, 40)), causal=True, D=16), None, 20 + 5),
    "packed, kv_lengths": (Case("", D=16, packed=((9, 50), (5, 7)), kv_lengths=(0, 7), kv_starts=(0, 7)), None, 9 + 5),
}


@functools.cache
def rows_without_keys(name, family, dtype):
    case, change, blind_rows = ROWS_WITHOUT_KEYS[name]
    kwargs = inputs(replace(case, **dict(family)), change, dtype)
    plain = to_dtype(inputs(case, change, dtype), torch.float64)
    _, lse = run(plain, backend="reference", return_lse=True)
    blind = lse == -INF
    assert int(blind.sum()) == blind_rows * case.Hq
    return kwargs, blind, emulations_and_truth(kwargs, through(kwargs), draws=5)


@by_dtype
@pytest.mark.parametrize("family", [{}, {"sinks": True}, FAMILY], ids=["plain", "sinks", "family"])
@by_name(ROWS_WITHOUT_KEYS)
def test_rows_without_keys(name, family, dtype, any_engine):
    """Out 0, lse -inf or the sink, and nothing of them in any gradient."""
    kwargs, blind, expected = rows_without_keys(name, tuple(family.items()), dtype)
    results = any_engine.results(kwargs, through(kwargs))
    check_results(results, *expected)
    of_blind = {name: x[blind] for name, x in by_row(results).items()}
    assert not of_blind["out"].any()
    if "sinks" in kwargs:
        sinks = kwargs["sinks"].detach().float().view(-1, 1).expand(blind.shape)
        torch.testing.assert_close(of_blind["lse"], sinks[blind])
    else:
        assert (of_blind["lse"] == -INF).all()
    if not through(kwargs):
        return
    assert not of_blind["grad of query"].any()
    if "grad of attn_mask" in results:
        assert not results["grad of attn_mask"][blind].any()
    if blind.all():
        assert not results["grad of key"].any() and not results["grad of value"].any()


# ---- NaN and inf where no row looks ------------------------------------------------------------------------


def mask_keys(value):
    """Masks keys for all rows, some of a tile and a whole one."""

    def change(kwargs):
        kwargs["attn_mask"] = kwargs["attn_mask"].clone()
        kwargs["attn_mask"][..., 3:9] = kwargs["attn_mask"][..., 64:130] = value

    return change


HIDDEN = {
    "kv_lengths": (Case("", Lq=40, Lk=200, D=16, kv_lengths=(200, 77)), None),
    "kv_starts": (Case("", Lq=40, Lk=200, D=16, kv_starts=(130, 7), Hkv=2), None),
    "kv_starts, kv_lengths, causal": (
        Case("", Lq=70, Lk=200, D=16, kv_starts=(70, 3), kv_lengths=(150, 9), causal=True),
        None,
    ),
    "no key in use": (Case("", Lq=5, Lk=70, D=16, kv_lengths=(0, 70)), None),
    "causal": (Case("", Lq=33, Lk=130, D=16, causal=True, q_offset=0), None),
    "causal, inside a tile": (Case("", Lq=33, Lk=40, D=16, causal=True, q_offset=1), None),
    "window": (Case("", Lq=20, Lk=200, D=16, window=(30, 3), q_offset=100), None),
    "window, one query": (Case("", Hq=6, Hkv=2, Lq=1, Lk=700, D=16, window=(300, 0), q_offset=500), None),
    "bool mask": (Case("", Lq=70, Lk=140, D=16, mask="bool"), mask_keys(False)),
    "bool mask of keys": (Case("", Lq=5, Lk=140, D=16, mask="bool", mask_shape="B11K"), mask_keys(False)),
    "float mask": (Case("", Lq=70, Lk=140, D=16, mask="float", Hkv=1), mask_keys(-INF)),
    "float mask of keys": (Case("", Lq=70, Lk=140, D=16, mask="float32", mask_shape="1H1K"), mask_keys(-INF)),
    "packed": (Case("", D=16, packed=((40, 90), (5, 70)), kv_lengths=(20, 66), kv_starts=(3, 0)), None),
    "packed, causal": (Case("", D=16, packed=((9, 30), (70, 150)), causal=True, q_offset=2), None),
    "family": (
        Case("", Lq=70, Lk=200, D=16, kv_starts=(70, 3), kv_lengths=(150, 80), causal=True, mask="float", **FAMILY),
        mask_keys(-INF),
    ),
}


@functools.cache
def hidden_keys(name, dtype):
    kwargs = inputs(*HIDDEN[name], dtype)
    return kwargs, ~visible(kwargs), emulations_and_truth(kwargs, OUTPUTS)


@by_dtype
@by_name(HIDDEN)
def test_hidden_keys_may_be_anything(name, dtype, any_engine):
    kwargs, hidden, expected = hidden_keys(name, dtype)
    assert hidden.any() and not hidden.all()
    for poisoned, poison in POISONS:
        x = kwargs[poisoned].detach().masked_fill(hidden[..., None], poison)
        results = any_engine.results(kwargs | {poisoned: x.requires_grad_()}, OUTPUTS)
        check_results(results, *expected)
        assert not results["grad of key"][hidden].any()
        assert not results["grad of value"][hidden].any()


PARTLY_HIDDEN = {
    "causal": Case("", Lq=70, Lk=70, D=16, causal=True),
    "window": Case("", Lq=70, Lk=70, D=16, window=(7, 2), Hkv=2),
    "bool mask": Case("", Lq=70, Lk=70, D=16, mask="bool"),
    "float mask": Case("", Lq=70, Lk=70, D=16, mask="float"),
    "one query": Case("", B=9, Hq=6, Hkv=2, Lq=1, Lk=300, D=16, mask="bool"),
    "packed": Case("", packed=((70, 70), (9, 20)), D=16, causal=True),
    "family": Case("", Lq=70, Lk=70, D=16, causal=True, **(FAMILY | {"dropout_p": 0.0})),
}


def hide_some(kwargs):
    """-inf here and there in a float mask, so that some rows see a key and others do not."""
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        generator = torch.Generator().manual_seed(3)
        kwargs["attn_mask"] = mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.3, -INF)


@functools.cache
def partly_hidden_key(name, dtype):
    """Inputs, the key's axis and index, which rows see it, and what is expected of the others."""
    case = PARTLY_HIDDEN[name]
    kwargs = inputs(case, hide_some, dtype)
    axis, j = (0, 40) if case.packed else (2, 40)
    one_key = torch.zeros(kwargs["value"].shape, dtype=torch.float64)
    one_key.select(axis, j).fill_(1)
    out, lse = run(to_dtype(kwargs | {"value": one_key}, torch.float64), backend="reference", return_lse=True)
    sees = by_row({"out": out.detach(), "lse": lse})["out"][..., 0] > 0
    assert sees.any() and not sees.all()
    emulations, truth = emulations_and_truth(kwargs, OUTPUTS)
    *emulations, truth = ({n: x[~sees] for n, x in by_row(r).items()} for r in (*emulations, truth))
    return kwargs, (axis, j), sees, (emulations, truth)


@by_dtype
@by_name(PARTLY_HIDDEN)
def test_a_poisoned_key_stays_with_the_rows_that_see_it(name, dtype, any_engine):
    kwargs, place, sees, expected = partly_hidden_key(name, dtype)
    for poisoned, poison in POISONS:
        x = kwargs[poisoned].detach().clone()
        x.select(*place).fill_(poison)
        results = by_row(any_engine.results(kwargs | {poisoned: x.requires_grad_()}, OUTPUTS))
        check_results({name: x[~sees] for name, x in results.items()}, *expected)
        if math.isnan(poison):  # of an inf in a key the score may be -inf, which is masked
            assert results["out"][sees].isnan().all()
            assert results["grad of query"][sees].isnan().all()


@by_dtype
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("num_queries", [1, 70])
def test_what_pages_hold_unused_may_be_anything(num_queries, poison, dtype, any_engine):
    """Pages of nobody, and what follows ``kv_lengths`` in the last page of a sample."""
    case = Case("", B=3, Hq=4, Hkv=2, Lq=num_queries, Lk=150, D=16, kv_lengths=(150, 0, 71), kv_starts=(3, 0, 65))
    kwargs = make_inputs(case, dtype)
    results = any_engine.results(to_pages(kwargs, 16, fill=poison))
    check_case(results, case, dtype)
    assert_same_bits(results, any_engine.results(to_pages(kwargs, 16, fill=0.0)))


BATCHES = {
    "dense": Case("", B=3, Hkv=2, Lq=70, Lk=90, D=16, causal=True),
    "dense, family": Case("", B=3, Lq=9, Lk=90, D=16, mask="bool", **FAMILY),
    "packed": Case("", packed=((40, 90), (1, 1), (0, 9), (70, 65)), D=16, Hkv=2, causal=True),
    "packed, few queries": Case("", packed=((1, 90), (1, 300), (2, 7)), D=16, causal=True),
    "packed, family": Case("", packed=((40, 90), (9, 70), (3, 0)), D=16, window=(30, 5), **FAMILY),
}


@by_dtype
@by_name(BATCHES)
def test_nan_everywhere_in_a_sequence_leaves_the_bits_of_the_others(name, dtype, any_engine):
    case = BATCHES[name]
    kwargs = inputs(case, None, dtype)
    clean = any_engine.results(kwargs, OUTPUTS)

    def rows(name, b):
        """What belongs to sequence b of a tensor called ``name``."""
        if case.packed is None:
            return (b,)
        start, end = kwargs[f"cu_seqlens_{'k' if name.endswith(('key', 'value')) else 'q'}"][b : b + 2].tolist()
        return (slice(None),) * (name == "lse") + (slice(start, end),)

    for b in range(case.batch):
        poisoned, grads = {n: kwargs[n].detach().clone() for n in ("query", "key", "value")}, random_grads(clean)
        for n, x in (poisoned | grads).items():
            x[rows(n, b)] = NAN
        poisoned = {n: x.requires_grad_() for n, x in poisoned.items()}
        results = any_engine.results(kwargs | poisoned, OUTPUTS, grads)
        for n, x in results.items():
            for other in set(range(case.batch)) - {b}:
                if n != "grad of sinks":  # the sum over all sequences
                    assert torch.equal(x[rows(n, other)], clean[n][rows(n, other)]), f"{n} of sequence {other}"


# ---- numbers as large as they come -------------------------------------------------------------------------


def scaled(query=1.0, key=1.0):
    def change(kwargs):
        kwargs["query"], kwargs["key"] = kwargs["query"] * query, kwargs["key"] * key

    return change


def far(sign):
    """Scores of about ``sign`` times 1000, from the first of 16 dimensions and the default scale."""

    def change(kwargs):
        kwargs["query"][..., 0], kwargs["key"][..., 0] = 64, sign * 64

    return change


def biased(bias):
    def change(kwargs):
        kwargs["attn_mask"] = kwargs["attn_mask"] + bias

    return change


def lowest(where=torch.isfinite, value=None):
    """The lowest finite number, or ``value``, in the mask's elements that ``where`` picks."""

    def change(kwargs):
        mask = kwargs["attn_mask"]
        kwargs["attn_mask"] = mask.masked_fill(where(mask), torch.finfo(mask.dtype).min if value is None else value)

    return change


def mixed_mask(kwargs):
    """Rows of -inf, of the lowest number, of both, and of either with a single 0."""
    mask = kwargs["attn_mask"]
    least = torch.finfo(mask.dtype).min
    mask[:, :, 0::5] = -INF
    mask[:, :, 1::5] = least
    mask[:, :, 2::5, ::2], mask[:, :, 2::5, 1::2] = -INF, least
    mask[:, :, 3::5], mask[:, :, 3::5, 7] = -INF, 0
    mask[:, :, 4::5], mask[:, :, 4::5, 7] = least, 0


def sinks_of(*values):
    def change(kwargs):
        kwargs["sinks"] = torch.tensor(values).to(kwargs["sinks"])

    return change


def slopes_of(slope):
    def change(kwargs):
        kwargs["alibi_slopes"] = torch.full_like(kwargs["alibi_slopes"], slope)

    return change


EXTREME = {
    # exp(-lse) overflows below -88.7, and a last tile of 64 keys is half a tile of 128 (pytorch#196678)
    **{
        f"lse far below, L {length}, {kind}": (Case("", Lq=70, Lk=length, D=16, mask=kind), biased(-700.0))
        for length in (64, 192, 320)
        for kind in ("float", "float32")
    },
    "lse far below, bool mask": (Case("", Lq=70, Lk=192, D=16, mask="bool"), far(-1)),
    "lse far below, causal": (Case("", Lq=192, Lk=192, D=16, causal=True), far(-1)),
    "lse far below, kv_lengths": (Case("", Lq=70, Lk=256, D=16, kv_lengths=(192, 64)), far(-1)),
    "lse far below, one query": (Case("", Hq=8, Hkv=2, Lq=1, Lk=704, D=16, mask="bool"), far(-1)),
    "lse far below, family": (Case("", Lq=70, Lk=192, D=16, mask="float32", **FAMILY), biased(-700.0)),
    "lse far above": (Case("", Lq=70, Lk=192, D=16, mask="bool"), far(1)),
    "scale zero": (Case("", Lq=70, Lk=90, D=16, scale=0.0, mask="float"), None),
    "scale zero, softcap": (Case("", Lq=70, Lk=90, D=16, scale=0.0, softcap=3.0, causal=True), None),
    "scale negative": (Case("", Lq=70, Lk=90, D=16, scale=-3.0, mask="bool"), None),
    "logits of 1e4": (Case("", Lq=130, Lk=150, D=16, causal=True), scaled(query=1e4)),
    "logits of 1e4, few queries": (Case("", Lq=3, Lk=700, D=16), scaled(query=1e4)),
    "huge queries, tiny keys": (Case("", Lq=70, Lk=90, D=16), scaled(2.0**13, 2.0**-13)),
    "huge keys, tiny queries": (Case("", Lq=70, Lk=90, D=16, mask="float"), scaled(2.0**-13, 2.0**13)),
    "lowest everywhere, causal, sinks": (Case("", Lq=70, Lk=90, D=16, mask="float", causal=True, sinks=True), lowest()),
    "lowest instead of -inf": (Case("", Lq=70, Lk=90, D=16, mask="float"), lowest(lambda mask: mask < 0)),
    "-inf for most": (Case("", Lq=70, Lk=200, D=16, mask="float"), lowest(lambda mask: mask < 1, -INF)),
    "-inf and lowest, family": (Case("", Lq=70, Lk=90, D=16, mask="float", causal=True, **FAMILY), mixed_mask),
    "one query, one key": (Case("", B=30, Lq=1, Lk=1, causal=True, mask="float", **FAMILY), None),
    "one key": (Case("", Lq=70, Lk=1, D=16, window=(0, 0), q_offset=-3, **FAMILY), None),
    "one query": (Case("", B=9, Lq=1, Lk=130, D=16, causal=True, **FAMILY), None),
    "packed, empty first": (Case("", packed=((0, 0), (9, 20), (70, 65)), D=16, causal=True, **FAMILY), None),
    "packed, empty in the middle": (Case("", packed=((9, 20), (0, 7), (0, 0), (5, 0), (1, 3)), D=16, **FAMILY), None),
    "packed, empty last": (Case("", packed=((9, 20), (70, 0), (0, 70)), D=16), None),
    "packed, all empty": (Case("", packed=((0, 0), (0, 0)), sinks=True), None),
    "packed, no queries": (Case("", packed=((0, 9), (0, 70)), sinks=True), None),
    "packed, no keys": (Case("", packed=((9, 0), (70, 0)), sinks=True), None),
    "sinks of -inf": (Case("", Lq=70, Lk=50, D=16, sinks=True, causal=True), sinks_of(-INF, -INF, -INF, -INF)),
    "some sinks of -inf": (Case("", Lq=70, Lk=50, D=16, sinks=True, causal=True), sinks_of(-INF, 0, -INF, 2)),
    "sinks far above": (Case("", Lq=70, Lk=90, D=16, sinks=True), sinks_of(3e4, 100, 1e3, 0)),
    "sinks far below": (Case("", Lq=70, Lk=50, D=16, sinks=True, causal=True), sinks_of(-3e4, -100, -1e3, 0)),
    "softcap far below the logits": (Case("", Lq=70, Lk=90, D=16, softcap=30.0, causal=True), scaled(query=1e4)),
    "softcap far above the logits": (Case("", Lq=70, Lk=90, D=16, softcap=1e6, causal=True), None),
    "small softcap": (Case("", Lq=70, Lk=90, D=16, softcap=1e-3, mask="bool"), None),
    "huge slopes": (Case("", Lq=70, Lk=90, D=16, alibi=True, causal=True), slopes_of(9876.543)),
    "huge slopes, far away": (Case("", Lq=70, Lk=90, D=16, alibi=True, q_offset=200), slopes_of(9876.543)),
    "dropout of everything": (Case("", Lq=70, Lk=50, D=16, dropout_p=1.0, causal=True, sinks=True), None),
    "dropout of everything, packed": (Case("", packed=((9, 20), (70, 65)), D=16, dropout_p=1.0), None),
}  # fmt: skip
# Beside lse the logarithm of the number of keys is less than a rounding, so the weights that a backward gets from it
# are some finite numbers.
BEYOND_LSE = {
    "lowest everywhere": (Case("", Lq=70, Lk=90, D=16, mask="float"), lowest()),
    "lowest everywhere, float32": (Case("", Lq=70, Lk=192, D=16, mask="float32"), lowest()),
    "lowest, rows only": (Case("", Lq=70, Lk=90, D=16, mask="float", mask_shape="1HQ1"), lowest()),
    "-inf and lowest": (Case("", Lq=70, Lk=90, D=16, mask="float"), mixed_mask),
    "-inf and lowest, float32": (Case("", Lq=70, Lk=192, D=16, mask="float32", Hkv=2), mixed_mask),
    "slopes of 1e30": (Case("", Lq=70, Lk=90, D=16, alibi=True, q_offset=200), slopes_of(1e30)),
}


@functools.cache
def extreme(name, dtype):
    kwargs = inputs(*EXTREME[name], dtype)
    return kwargs, emulations_and_truth(kwargs, OUTPUTS)


@by_dtype
@by_name(EXTREME)
def test_extremes(name, dtype, any_engine):
    kwargs, expected = extreme(name, dtype)
    check_results(any_engine.results(kwargs, OUTPUTS), *expected)


@by_dtype
@by_name(BEYOND_LSE)
def test_scores_beyond_the_precision_of_lse(name, dtype, any_engine):
    kwargs = inputs(*BEYOND_LSE[name], dtype)
    results = any_engine.results(kwargs, OUTPUTS)
    forward = {name: results.pop(name) for name in OUTPUTS}
    check_results(forward, *emulations_and_truth(kwargs))
    for name, x in results.items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_huge_and_tiny_numbers(dtype, any_engine):
    """1e30 and 1e-30, which float16 does not have; their powers of two change no other bit."""
    kwargs = inputs(Case("", Lq=70, Lk=90, D=16, mask="bool"), None, dtype)
    huge = inputs(Case("", Lq=70, Lk=90, D=16, mask="bool"), scaled(2.0**100, 2.0**-100), dtype)
    results, expected = (any_engine.results(k, OUTPUTS) for k in (huge, kwargs))
    expected["grad of query"] *= 2.0**-100
    expected["grad of key"] *= 2.0**100
    assert_same_bits(results, expected)


@by_dtype
@pytest.mark.parametrize("mask", ["float", "float32"])
def test_a_row_of_the_lowest_number_gives_the_mean(mask, dtype, any_engine):
    if (dtype, mask) == (torch.float16, "float"):
        pytest.skip("float16's lowest number, -65504, is an ordinary bias")
    kwargs = inputs(Case("", Lq=70, Lk=90, D=16, mask=mask), lowest(), dtype)
    out = any_engine.run(kwargs)
    mean = kwargs["value"].double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


@by_dtype
def test_sinks_of_minus_inf_are_no_sinks(dtype, any_engine):
    """Bit for bit, in rows without keys too; and no gradient."""
    kwargs, _ = extreme("sinks of -inf", dtype)
    results = any_engine.results(kwargs, OUTPUTS)
    assert not results.pop("grad of sinks").any()
    assert_same_bits(results, any_engine.results({n: x for n, x in kwargs.items() if n != "sinks"}, OUTPUTS))


@by_dtype
def test_dropout_of_everything_leaves_nothing(dtype, any_engine):
    kwargs, _ = extreme("dropout of everything", dtype)
    results = any_engine.results(kwargs, ("out",))
    assert not results["out"].any()
    for name in ("query", "key", "value", "sinks"):
        assert not results[f"grad of {name}"].any()
