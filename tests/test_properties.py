"""What holds for every shape, stride, window and mask: hypothesis draws the problems."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pyattn.testing import (
    DTYPES,
    OUTPUTS,
    Case,
    forward_and_gradients,
    make_inputs,
    random_grads,
    run,
    to_dtype,
    to_pages,
    visible,
)

DTYPE = st.sampled_from(DTYPES)
SEEDS = st.integers(0, 2**31)
LAYOUTS = ["BHLD", "BLHD", "LBHD", "HBLD", "BHDL"]  # the last has a last stride other than 1
# Around the sizes of tiles and beyond one block of keys, as well as anything small.
AROUND_TILES = ([63, 64, 65, 130], [63, 64, 65, 191, 192, 193, 260])

by_pass = pytest.mark.parametrize("through", [(), OUTPUTS], ids=["forward", "gradients"])


@st.composite
def cases(draw, smallest=1, groups=(1, 2, 3), long=AROUND_TILES):
    """A dense problem that the CPU backend must be able to compute."""
    B, Hkv = draw(st.integers(smallest, 3)), draw(st.integers(1, 3))
    group = draw(st.sampled_from((0, *groups) if smallest == 0 else groups))
    Lq, Lk = (draw(st.one_of(st.integers(smallest, 40), st.sampled_from(lengths))) for lengths in long)
    sides = st.one_of(st.none(), st.integers(0, 80))
    starts = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, Lk)] * B)))
    lengths = draw(st.one_of(st.none(), st.tuples(*[st.integers(0, Lk)] * B)))
    offset = st.integers(-Lq - 5, Lk + 5)
    return Case(
        "drawn",
        B=B,
        Hq=Hkv * group,
        Hkv=Hkv,
        Lq=Lq,
        Lk=Lk,
        D=draw(st.sampled_from([1, 2, 7, 16, 33, 64, 100])),
        Dv=draw(st.sampled_from([None, 1, 5, 16, 40, 64])),
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(sides, sides))),
        q_offset=draw(st.one_of(st.none(), st.just(0), offset, st.tuples(*[offset] * B))),
        mask=draw(st.sampled_from([None, "bool", "float"])),
        mask_shape="".join(draw(st.sampled_from([axis, "1"])) for axis in "BHQK"),
        kv_starts=starts,
        kv_lengths=lengths,
        scale=draw(st.sampled_from([None, 0.3, -0.1])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


def decodes():
    """Few queries, and keys enough to be split over threads."""
    return cases(groups=(1, 2, 3, 8), long=([1, 2, 3, 4, 70], [500, 1030, 2100]))


def select(kwargs, axis, index):
    """The problem with samples (axis 0) or heads (axis 1) picked by ``index``."""

    def pick(name, x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dim() == 1:  # kv_lengths, kv_starts, q_offset
            return x[index] if axis == 0 else x
        return x if x.shape[axis] == 1 and name == "attn_mask" else x[(slice(None),) * axis + (index,)]

    return {name: pick(name, x) for name, x in kwargs.items()}


# Rows far beyond the last key: their empty range must not take the kernel past the end of the keys.
BEYOND = Case("beyond", B=1, Hq=1, Hkv=1, Lq=64, Lk=1, D=16, Dv=16, window=(0, None), q_offset=0)


@example(BEYOND, torch.bfloat16, 0)
@given(st.one_of(cases(), decodes()), DTYPE, SEEDS)
def test_right_within_an_a_priori_bound(engine, case, dtype, seed):
    """The rule of ``assert_close`` compares samples of errors. Here a result may have a single element, so the
    measure is the mean of abs(v) under the same weights, of which every rounding is a small part."""
    kwargs = make_inputs(case, dtype, seed=seed)
    exact = to_dtype(kwargs, torch.float64)
    out, lse = engine.run(kwargs, return_lse=True)
    true_out, true_lse = run(exact, return_lse=True)
    size = run(exact | {"value": exact["value"].abs()})
    assert ((out - true_out).abs() <= (torch.finfo(dtype).eps + 1e-5) * size + torch.finfo(dtype).tiny).all()
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


@given(cases(), DTYPE, SEEDS, st.sampled_from([0.0, torch.nan, torch.inf, -torch.inf]))
def test_gradients_within_an_a_priori_bound(engine, case, dtype, seed, hidden_value):
    """The measure is the gradient in which no two terms cancel. Keys and values that no row sees may be anything."""
    kwargs = make_inputs(case, dtype, seed=seed, requires_grad=True)
    hidden = ~visible(kwargs)[..., None]
    poisoned = {n: kwargs[n].detach().masked_fill(hidden, hidden_value).requires_grad_() for n in ("key", "value")}
    actual = engine.results(kwargs | poisoned, OUTPUTS)
    exact = to_dtype(kwargs, torch.float64)
    truth = forward_and_gradients(
        exact, lambda k: run(k, return_lse=True), grads=to_dtype(random_grads(actual), torch.float64)
    )
    info = torch.finfo(dtype)
    for name, size in sizes_of_gradients(exact, truth, info.tiny).items():
        # P or dS, delta and the result are rounded; scores are sums in float32
        bound = (2 * info.eps + 3e-5) * size + info.tiny
        error = (actual[name] - truth[name]).abs()
        assert (error <= bound).all(), f"{name}: {float((error / bound).max()):.3g} times the bound"


def sizes_of_gradients(exact, truth, tiny):
    """The sums of the absolute values of the gradients' terms; ``tiny`` is where P and dS lose precision."""
    query, key, value = (exact[name].detach() for name in ("query", "key", "value"))
    (B, Hq, _, _), (_, Hkv, Lk, _) = query.shape, key.shape
    detached = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in exact.items()}
    p = run(detached | {"value": torch.eye(Lk, dtype=torch.float64).expand(B, Hkv, Lk, Lk)})
    grads = {name: x.abs() for name, x in random_grads(truth).items()}
    key, value = (x.abs().repeat_interleave(Hq // Hkv, 1) for x in (key, value))
    delta = (grads["out"] * truth["out"].abs()).sum(-1) + grads["lse"]
    ds = p * (grads["out"] @ value.mT + delta[..., None])
    scale = abs(exact["scale"] or query.shape[-1] ** -0.5)
    sizes = {
        "grad of query": (ds + tiny) @ key * scale,
        "grad of key": ((ds + tiny).mT @ query.abs() * scale).unflatten(1, (Hkv, -1)).sum(2),
        "grad of value": ((p + tiny).mT @ grads["out"]).unflatten(1, (Hkv, -1)).sum(2),
    }
    if "grad of attn_mask" in truth:
        sizes["grad of attn_mask"] = ds.sum_to_size(truth["grad of attn_mask"].shape)
    return sizes


@by_pass
@example(BEYOND, torch.bfloat16, 0)
@given(cases(), DTYPE, SEEDS)
def test_nothing_outside_a_view_is_read_or_written(engine, through, case, dtype, seed):
    """The inputs lie in tensors of NaN, of which a stray read shows, and a write too."""
    kwargs = make_inputs(case, dtype, seed=seed, requires_grad=bool(through))
    around, inside = {}, {}
    for name in ("query", "key", "value"):
        x = kwargs[name].detach()
        around[name] = torch.full([n + 2 for n in x.shape], torch.nan, dtype=dtype)
        inside[name] = around[name][1:-1, 1:-1, 1:-1, 1:-1].copy_(x).detach().requires_grad_(bool(through))
    assert_same_bits(engine.results(kwargs | inside, through), engine.results(kwargs, through))
    for name in inside:
        assert int(around[name].isfinite().sum()) == inside[name].numel()


@given(cases(), SEEDS, st.data())
def test_parts_merged_by_lse_give_the_whole(engine, case, seed, data):
    kwargs = make_inputs(dataclasses.replace(case, kv_starts=None, kv_lengths=None), torch.float32, seed=seed)
    if kwargs["q_offset"] is None:
        kwargs["q_offset"] = case.Lk - case.Lq
    whole, whole_lse = engine.run(kwargs, return_lse=True)
    cut = data.draw(st.integers(0, case.Lk))
    mask = kwargs.get("attn_mask")
    parts = []
    for keys in (slice(0, cut), slice(cut, case.Lk)):
        part = kwargs | {name: kwargs[name][:, :, keys] for name in ("key", "value")}
        part["q_offset"] = kwargs["q_offset"] - keys.start
        if mask is not None and mask.shape[-1] > 1:
            part["attn_mask"] = mask[..., keys]
        parts.append(engine.run(part, return_lse=True))
    lses = torch.stack([lse for _, lse in parts])
    merged_lse = lses.logsumexp(0)
    weights = torch.where(lses == -torch.inf, 0, (lses - merged_lse).exp())[..., None]
    merged = sum(out * weight for (out, _), weight in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged_lse, whole_lse, rtol=1e-4, atol=1e-5)


def assert_same_bits(actual, expected):
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


@by_pass
@given(cases(), DTYPE, SEEDS)
def test_heads_and_samples_commute_bitwise(engine, through, case, dtype, seed):
    """Neither its place nor what lies around it changes the bits of a sample or of a head."""
    kwargs = make_inputs(dataclasses.replace(case, Hkv=case.Hq), dtype, seed=seed, requires_grad=bool(through))
    if case.mask is not None:
        kwargs["attn_mask"] = kwargs["attn_mask"].detach()  # its gradient may be a sum over samples and heads
    results = engine.results(kwargs, through)
    grads = random_grads(results)
    for axis, size in ((0, case.B), (1, case.Hq)):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        for index in (order, order[:1]):
            selected = {name: x.index_select(axis, index) for name, x in grads.items()}
            actual = engine.results(select(kwargs, axis, index), through, selected)
            assert_same_bits(actual, {name: x.index_select(axis, index) for name, x in results.items()})


@by_pass
@given(cases(), DTYPE, SEEDS)
def test_bits_do_not_depend_on_the_number_of_threads(engine, through, case, dtype, seed):
    kwargs = make_inputs(case, dtype, seed=seed, requires_grad=bool(through))
    alone = engine.results(kwargs, through, threads=1)
    for threads in (2, 3, 4, 2):
        assert_same_bits(engine.results(kwargs, through, threads=threads), alone)


@given(decodes(), DTYPE, SEEDS, st.sampled_from([1, 2, 3, 5, 16, 100]))
def test_pages_do_not_change_the_bits_of_a_decode(engine, case, dtype, seed, page_size):
    assume(case.Lk > 64)  # with fewer keys than that, and no pages, a kernel may take the way of many queries
    kwargs = make_inputs(case, dtype, seed=seed)
    assert_same_bits(engine.results(to_pages(kwargs, page_size, seed=seed)), engine.results(kwargs))


@given(decodes(), DTYPE, SEEDS)
def test_bits_of_a_decode_do_not_depend_on_the_number_of_threads(engine, case, dtype, seed):
    kwargs = make_inputs(case, dtype, seed=seed)
    alone = engine.results(kwargs, threads=1)
    for threads in (2, 3):
        assert_same_bits(engine.results(kwargs, threads=threads), alone)


def loose(dtype):
    """Another path through the kernel may round otherwise; what is asked here is that no NaN shows."""
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@given(cases(), DTYPE, SEEDS, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_masked_nan_or_inf_never_shows(engine, case, dtype, seed, poison):
    """In K or in V, behind whatever kind of mask."""
    kwargs = make_inputs(case, dtype, seed=seed)
    hidden = ~visible(kwargs)
    assume(hidden.any())
    expected = engine.run(kwargs, return_lse=True)
    for name in ("key", "value"):
        poisoned = kwargs | {name: kwargs[name].masked_fill(hidden[..., None], poison)}
        for x, y in zip(engine.run(poisoned, return_lse=True), expected, strict=True):
            torch.testing.assert_close(x, y, **loose(dtype))


@given(SEEDS, DTYPE, st.sampled_from([torch.nan, torch.inf]), st.integers(1, 30), st.booleans())
def test_a_nan_that_some_rows_see_stays_with_them(engine, seed, dtype, poison, j, in_key):
    """Under a causal mask the rows before key j must stay clean although later rows of their tile see it."""
    kwargs = make_inputs(Case("leak", B=1, Hq=2, Hkv=1, Lq=40, Lk=40, D=16, causal=True), dtype, seed=seed)
    expected = engine.run(kwargs)
    x = kwargs["key" if in_key else "value"].clone()
    x[:, :, j] = poison
    actual = engine.run(kwargs | {"key" if in_key else "value": x})
    torch.testing.assert_close(actual[:, :, :j], expected[:, :, :j], **loose(dtype))
    assert not actual[:, :, j:].isfinite().all(-1).any()


@given(cases(), SEEDS, st.sampled_from([torch.nan, torch.inf]))
def test_a_masked_nan_never_shows_in_gradients(case, seed, poison):
    kwargs = make_inputs(dataclasses.replace(case, scale=0.3), torch.float32, seed=seed)
    hidden = ~visible(kwargs)
    assume(hidden.any())
    gradients = []
    for fill in (0.0, poison):
        leaves = {n: kwargs[n].masked_fill(hidden[..., None], fill) for n in ("key", "value")} | {
            "query": kwargs["query"]
        }
        leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
        out, lse = run(kwargs | leaves, backend="reference", return_lse=True)
        loss = out.sum() + torch.where(lse == -torch.inf, 0, lse).sum()
        gradients.append(torch.autograd.grad(loss, tuple(leaves.values())))
    for clean, poisoned in zip(*gradients, strict=True):
        torch.testing.assert_close(poisoned, clean)


@by_pass
@given(cases(smallest=0), DTYPE)
def test_empty_sizes(engine, through, case, dtype):
    """B, Hq, Lq or Lk of zero: right shapes, and zeros where there is no key."""
    assume(0 in (case.B, case.Hq, case.Lq, case.Lk))
    kwargs = make_inputs(case, dtype, requires_grad=bool(through))
    results = engine.results(kwargs, through)
    out, lse = results.pop("out"), results.pop("lse")
    assert out.shape == (case.B, case.Hq, case.Lq, case.Dv or case.D)
    assert lse.shape == out.shape[:3]
    assert not out.any()
    assert (lse == -torch.inf).all()
    for name, grad in results.items():
        assert grad.shape == kwargs[name.removeprefix("grad of ")].shape
        assert not grad.any()


@by_pass
@given(cases(), DTYPE, SEEDS, st.sampled_from(["expanded batch", "expanded heads", "sliced", "strided"]))
def test_strides_of_the_input_do_not_change_the_bits(engine, through, case, dtype, seed, how):
    kwargs = make_inputs(case, dtype, seed=seed)
    for name in ("query", "key", "value"):
        x = kwargs[name]
        if how == "expanded batch":
            x = x[:1].expand_as(x)
        elif how == "expanded heads":
            x = x[:, :1].expand_as(x)
        else:
            wide = torch.full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), torch.nan, dtype=dtype)
            step = 2 if how == "strided" else 1
            view = wide[:, :, : 2 * x.shape[2] : 2, : step * x.shape[3] : step]
            x = view.copy_(x)
        kwargs[name] = x.detach().requires_grad_(bool(through))
    dense = kwargs | {
        name: kwargs[name].detach().clone(memory_format=torch.contiguous_format).requires_grad_(bool(through))
        for name in ("query", "key", "value")
    }
    assert_same_bits(engine.results(kwargs, through), engine.results(dense, through))


@given(cases(), DTYPE)
def test_the_output_is_dense_in_the_querys_order(engine, case, dtype):
    kwargs = make_inputs(case, dtype)
    query = kwargs["query"].contiguous() if case.layout == "BHDL" else kwargs["query"]
    kwargs["query"] = query
    out, lse = engine.run(kwargs, return_lse=True)
    order = sorted(range(4), key=lambda d: (query.stride(d), -d), reverse=True)
    if 1 not in query.shape:
        assert out.permute(order).is_contiguous()
    assert lse.is_contiguous()
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        for real, faked in zip((out, lse), run(fake, return_lse=True), strict=True):
            assert (faked.shape, faked.dtype) == (real.shape, real.dtype)
            # The stride of a dimension of size 1 means nothing, and torch's own fakes differ there.
            assert all(n == 1 or s == t for n, s, t in zip(real.shape, real.stride(), faked.stride(), strict=True))
