"""Gradients: conformance, pairing, bits, layouts, masks, and rows without keys."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

from pyattn import dispatch, functional
from pyattn.testing import (
    CASES,
    DTYPES,
    OUTPUTS,
    Case,
    check_case,
    forward_and_gradients,
    make_inputs,
    random_grads,
    run,
    to_dtype,
)

WITH_GRADIENT = [case for case in CASES if case.differentiable]
BY_NAME = {case.name: case for case in CASES}
SOME = [BY_NAME[name] for name in ("head dim 80, v 48", "padding, empty sample", "tiles, gqa", "tiles, float mask")]

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_some_case = pytest.mark.parametrize("case", SOME)


def assert_same_bits(actual, expected):
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), f"{name}: {int((x != expected[name]).sum())} elements differ"


@by_dtype
@pytest.mark.parametrize("case", WITH_GRADIENT)
def test_gradients(case, dtype, engine):
    check_case(engine.results(make_inputs(case, dtype, requires_grad=True), OUTPUTS), case, dtype, OUTPUTS)


@by_dtype
@by_some_case
@pytest.mark.parametrize("through", [("out",), ("lse",)], ids=["out", "lse"])
def test_gradients_through_one_output(through, case, dtype, engine):
    check_case(engine.results(make_inputs(case, dtype, requires_grad=True), through), case, dtype, through)


@by_dtype
@by_some_case
@pytest.mark.parametrize("native", ["forward", "backward"])
def test_any_forward_pairs_with_any_backward(native, case, dtype, engine):
    backends = (engine.backend, "reference")
    forward, backward = backends if native == "forward" else reversed(backends)
    kwargs = make_inputs(case, dtype, requires_grad=True)
    with mock.patch.object(dispatch.load(backward), "forward", dispatch.load(forward).forward), engine.at_work(1):
        actual = forward_and_gradients(kwargs, lambda k: run(k, backend=backward, return_lse=True))
    check_case(actual, case, dtype, OUTPUTS)


# ---- the reference itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_GRADIENT)
def test_gradcheck(case):
    kwargs = to_dtype(make_inputs(case.small(), torch.float32, requires_grad=True), torch.float64)
    leaves = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad}

    def function(*inputs):
        out, lse = run(kwargs | dict(zip(leaves, inputs, strict=True)), return_lse=True)
        return out, torch.where(lse == -torch.inf, 0, lse)  # differences of -inf are NaN

    # fast_mode: along random directions instead of element by element
    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", [case for case in WITH_GRADIENT if case.packed is None])
def test_gradients_are_those_of_autograd_through_naive(case):
    kwargs = to_dtype(make_inputs(case, torch.float32, requires_grad=True), torch.float64)
    actual = forward_and_gradients(kwargs, lambda k: run(k, backend="reference", return_lse=True))
    if (actual["lse"] == -torch.inf).any():
        pytest.skip("naive attention gives NaN in a row without keys")

    def naive(k):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return functional.naive_attention(**k, return_lse=True)

    for name, x in forward_and_gradients(kwargs, naive).items():
        torch.testing.assert_close(actual[name], x, msg=lambda m, name=name: f"{name}: {m}")


# ---- the same bits, whatever lies around -------------------------------------------------------------------

LONG = Case("long", B=1, Hq=1, Hkv=1, Lq=700, Lk=700, D=32)


@by_dtype
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": True},
        {"Hq": 3, "causal": True},
        {"Hq": 3, "mask": "float", "mask_shape": "11QK"},
        {"Hq": 3, "Hkv": 3, "B": 2, "Lq": 300, "Lk": 400, "mask": "float", "mask_shape": "1H1K", "window": (200, 9)},
    ],
    ids=["full", "causal", "group", "group with a mask", "mask over samples and rows"],
)
def test_bits_do_not_depend_on_the_number_of_threads(changes, dtype, engine):
    """With fewer heads than threads, one head's rows and keys are split; a mask's gradient is summed over all."""
    case = Case(**(vars(LONG) | changes))
    kwargs = make_inputs(case, dtype, requires_grad=True)
    alone = engine.results(kwargs, OUTPUTS, threads=1)
    for threads in (2, 4):
        assert_same_bits(engine.results(kwargs, OUTPUTS, threads=threads), alone)


@by_dtype
def test_bits_of_a_sample_do_not_depend_on_its_batch(dtype, engine):
    case = Case("batch", B=3, Hq=6, Hkv=2, Lq=260, Lk=300, D=16, causal=True, mask="float", mask_shape="B1QK",
                kv_lengths=(300, 120, 277))  # fmt: skip
    kwargs = make_inputs(case, dtype, requires_grad=True)
    batch = engine.results(kwargs, OUTPUTS)
    grads = random_grads(batch)
    for b in range(case.B):
        sample = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        alone = engine.results(sample, OUTPUTS, {name: x[b : b + 1] for name, x in grads.items()})
        assert_same_bits(alone, {name: x[b : b + 1] for name, x in batch.items()})


LAYOUTS = {
    "BLHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": lambda x: torch.stack([x, x * torch.nan], -1)[..., 0],
    "expanded rows": lambda x: x[:, :, :1].expand_as(x),
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "of a sum": lambda x: x.new_ones(()).expand_as(x),
    "sliced": lambda x: torch.cat([x * torch.nan, x, x * torch.nan], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
}


@by_dtype
def test_the_layout_of_what_comes_in_does_not_change_the_bits(dtype, engine):
    """Gradients of out and lse come in as autograd leaves them."""
    kwargs = make_inputs(BY_NAME["head dim 80, v 48"], dtype, requires_grad=True)
    for layout in LAYOUTS.values():
        grads = {name: layout(x) for name, x in random_grads(engine.results(kwargs)).items()}
        dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in grads.items()}
        assert_same_bits(engine.results(kwargs, OUTPUTS, grads), engine.results(kwargs, OUTPUTS, dense))


@by_dtype
@pytest.mark.parametrize("name", ["tiles, gqa", "tiles, float mask 11QK"])
def test_who_else_asks_for_a_gradient_does_not_change_the_bits(name, dtype, engine):
    kwargs = make_inputs(BY_NAME[name], dtype, requires_grad=True)
    everything = engine.results(kwargs, OUTPUTS)
    leaves = [n for n, x in kwargs.items() if isinstance(x, torch.Tensor)]
    for asking in leaves:
        some = kwargs | {n: kwargs[n].detach() for n in leaves if n != asking}
        assert_same_bits(engine.results(some, OUTPUTS), everything)


# ---- masks -------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("mask_dtype", ["float", "float32"])
def test_a_broadcast_mask_gets_the_sum(mask_dtype, dtype, engine):
    """Summed in float32 over all that it serves, whatever that is, and rounded once."""
    case = Case("mask", Hkv=2, Lq=70, Lk=100, D=16, window=(60, 10), mask=mask_dtype)
    kwargs = make_inputs(case, dtype, requires_grad=True)
    mask = kwargs["attn_mask"] = torch.zeros_like(kwargs["attn_mask"])
    terms = engine.results(kwargs | {"attn_mask": mask.float().requires_grad_()}, OUTPUTS)["grad of attn_mask"].double()
    for sizes in itertools.product(*((1, n) for n in mask.shape)):
        broadcast = mask.new_zeros(sizes).requires_grad_()
        actual = engine.results(kwargs | {"attn_mask": broadcast}, OUTPUTS)["grad of attn_mask"]
        total, size = terms.sum_to_size(sizes), terms.abs().sum_to_size(sizes)
        assert actual.dtype == mask.dtype
        assert actual.shape == sizes
        # one rounding, and the usual bound of a float32 sum of at most 2^17 terms
        bound = torch.finfo(mask.dtype).eps * total.abs() + 17 * torch.finfo(torch.float32).eps * size
        assert ((actual - total).abs() <= bound + torch.finfo(mask.dtype).tiny).all(), sizes


# ---- rows without keys, and what lies behind a mask --------------------------------------------------------


@by_dtype
@pytest.mark.parametrize(
    "name", ["tiles, rows without keys", "padding, empty sample", "causal, offset before the keys", "tiles, padding"]
)
def test_rows_without_keys_and_keys_without_rows_get_zero(name, dtype, engine):
    case = BY_NAME[name]
    results = engine.results(make_inputs(case, dtype, requires_grad=True), OUTPUTS)
    blind = results["lse"] == -torch.inf
    start, end = (torch.tensor(x or (default,) * case.B) for x, default in
                  ((case.kv_starts, 0), (case.kv_lengths, case.Lk)))  # fmt: skip
    keys = torch.arange(case.Lk)
    unused = ((keys < start[:, None]) | (keys >= end[:, None]))[:, None].expand(-1, case.Hkv, -1)
    assert blind.any() or unused.any()
    assert not results["grad of query"][blind].any()
    for grad in ("grad of key", "grad of value"):
        assert not results[grad][unused].any()
        assert results[grad].isfinite().all()


@by_dtype
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("q_offset", [0, 1])
def test_a_nan_stays_with_the_rows_that_see_it(q_offset, name, dtype, engine):
    """And with the keys that those rows see, at every parity of the window's edges."""
    window = 5
    case = Case("leak", B=1, Hq=2, Hkv=1, Lq=130, Lk=141, D=16, window=(window, 0), q_offset=q_offset)
    kwargs = make_inputs(case, dtype, requires_grad=True)
    rows, keys = torch.arange(case.Lq) + q_offset, torch.arange(case.Lk)
    for key in range(60, 72):
        poisoned = kwargs[name].detach().clone()
        poisoned[:, :, key] = torch.nan
        results = engine.results(kwargs | {name: poisoned.requires_grad_()}, OUTPUTS)
        sees = (rows >= key) & (rows <= key + window)
        shares = (keys >= key - window) & (keys <= key + window)
        assert results["grad of query"][:, :, ~sees].isfinite().all()
        assert results["grad of query"][:, :, sees].isnan().all()
        for grad in ("grad of key", "grad of value"):
            assert results[grad][:, :, ~shares].isfinite().all()


@by_dtype
@pytest.mark.parametrize("D", [1, 7, 33, 100])
def test_nothing_of_an_earlier_call_shows(D, dtype, engine):
    """What lies in scratch, NaN included, is not read: not even to be multiplied by zero."""
    for L in (1, 3, 17, 65, 200):
        poisoned = make_inputs(Case("earlier", B=1, Hq=2, Hkv=1, Lq=200, Lk=200), dtype, requires_grad=True)
        poisoned |= {n: torch.full_like(poisoned[n], torch.nan, requires_grad=True) for n in ("query", "key", "value")}
        engine.results(poisoned, OUTPUTS)
        results = engine.results(make_inputs(Case("next", Lq=L, Lk=L, D=D), dtype, requires_grad=True), OUTPUTS)
        for name, x in results.items():
            assert x.isfinite().all(), f"{name}, L = {L}"
