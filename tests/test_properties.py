"""What holds for every shape, stride, window and mask: hypothesis draws the problems."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pyattn.testing import Case, make_inputs, run, to_dtype

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
LAYOUTS = ["BHLD", "BLHD", "LBHD", "HBLD", "BHDL"]  # the last has a last stride other than 1


@st.composite
def cases(draw, smallest=1, dropout=False):
    """A dense problem that the CPU backend must be able to compute."""
    B, Hkv, group = (
        draw(st.integers(smallest, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0 if smallest == 0 else 1, 3)),
    )
    # Around the sizes of tiles and beyond one block of keys, as well as anything small.
    Lq = draw(st.one_of(st.integers(smallest, 40), st.sampled_from([63, 64, 65, 130])))
    Lk = draw(st.one_of(st.integers(smallest, 40), st.sampled_from([63, 64, 65, 191, 192, 193, 260])))
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
@given(cases(), DTYPES, SEEDS)
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


@example(BEYOND, torch.bfloat16, 0)
@given(cases(), DTYPES, SEEDS)
def test_nothing_outside_a_view_is_read_or_written(engine, case, dtype, seed):
    """The inputs lie in tensors of NaN, of which a stray read shows, and a write too."""
    kwargs = make_inputs(case, dtype, seed=seed)
    around, inside = {}, {}
    for name in ("query", "key", "value"):
        x = kwargs[name]
        around[name] = torch.full([n + 2 for n in x.shape], torch.nan, dtype=dtype)
        inside[name] = around[name][1:-1, 1:-1, 1:-1, 1:-1].copy_(x)
    for x, y in zip(engine.run(kwargs | inside, return_lse=True), engine.run(kwargs, return_lse=True), strict=True):
        assert torch.equal(x, y)
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


@given(cases(), DTYPES, SEEDS)
def test_heads_and_samples_commute_bitwise(engine, case, dtype, seed):
    """Neither its place nor what lies around it changes the bits of a sample or of a head."""
    kwargs = make_inputs(dataclasses.replace(case, Hkv=case.Hq), dtype, seed=seed)
    results = engine.run(kwargs, return_lse=True)
    for axis, size in ((0, case.B), (1, case.Hq)):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        for index in (order, order[:1]):
            for x, y in zip(results, engine.run(select(kwargs, axis, index), return_lse=True), strict=True):
                assert torch.equal(x.index_select(axis, index), y)


@given(cases(), DTYPES, SEEDS)
def test_bits_do_not_depend_on_the_number_of_threads(engine, case, dtype, seed):
    kwargs = make_inputs(case, dtype, seed=seed)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4, 2):
            torch.set_num_threads(threads)
            results.append(run(kwargs, backend=engine.backend, return_lse=True))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def visible(kwargs, case):
    """Which keys ``[B, Hkv, Lk]`` some row of some query head sees, by the gradient of a sum over values."""
    kwargs = to_dtype(kwargs, torch.float64) | {"scale": 0.0}
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].is_floating_point():
        kwargs["attn_mask"] = kwargs["attn_mask"] * 0  # equal weights: none can underflow
    value = torch.zeros(case.B, case.Hkv, case.Lk, 1, dtype=torch.float64, requires_grad=True)
    out = run(kwargs | {"value": value}, backend="reference")
    return torch.autograd.grad(out.sum(), value)[0][..., 0] > 0


def loose(dtype):
    """Another path through the kernel may round otherwise; what is asked here is that no NaN shows."""
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@given(cases(), DTYPES, SEEDS, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_masked_nan_or_inf_never_shows(engine, case, dtype, seed, poison):
    """In K or in V, behind whatever kind of mask."""
    kwargs = make_inputs(case, dtype, seed=seed)
    hidden = ~visible(kwargs, case)
    assume(hidden.any())
    expected = engine.run(kwargs, return_lse=True)
    for name in ("key", "value"):
        poisoned = kwargs | {name: kwargs[name].masked_fill(hidden[..., None], poison)}
        for x, y in zip(engine.run(poisoned, return_lse=True), expected, strict=True):
            torch.testing.assert_close(x, y, **loose(dtype))


@given(SEEDS, DTYPES, st.sampled_from([torch.nan, torch.inf]), st.integers(1, 30), st.booleans())
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
    hidden = ~visible(kwargs, case)
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


@given(cases(smallest=0), DTYPES)
def test_empty_sizes(engine, case, dtype):
    """B, Hq, Lq or Lk of zero: right shapes, and zeros where there is no key."""
    assume(0 in (case.B, case.Hq, case.Lq, case.Lk))
    kwargs = make_inputs(case, dtype)
    out, lse = engine.run(kwargs, return_lse=True)
    assert out.shape == (case.B, case.Hq, case.Lq, case.Dv or case.D)
    assert lse.shape == out.shape[:3]
    assert not out.any()
    assert (lse == -torch.inf).all()


@given(cases(), DTYPES, SEEDS, st.sampled_from(["expanded batch", "expanded heads", "sliced", "strided"]))
def test_strides_of_the_input_do_not_change_the_bits(engine, case, dtype, seed, how):
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
        kwargs[name] = x
    dense = kwargs | {
        name: kwargs[name].clone(memory_format=torch.contiguous_format) for name in ("query", "key", "value")
    }
    for x, y in zip(engine.run(kwargs, return_lse=True), engine.run(dense, return_lse=True), strict=True):
        assert torch.equal(x, y)


@given(cases(), DTYPES)
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
