"""``scaled_dot_product_attention`` against torch's, cell by cell: the same answer, or a refusal from both."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import pyattn

HALF = (torch.bfloat16, torch.float16)
REFUSALS = (TypeError, ValueError, NotImplementedError)  # and nothing else, above all no AttributeError


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def call(function, *args, **kwargs):
    try:
        return function(*args, **kwargs), None
    except Exception as error:  # torch's refusals have many types
        return None, error


def check_same(*args, equal_nan=False, **kwargs):
    """Both give the same values, shape, dtype and strides, or both refuse."""
    ours, our_error = call(pyattn.scaled_dot_product_attention, *args, **kwargs)
    torchs, torch_error = call(F.scaled_dot_product_attention, *args, **kwargs)
    assert (our_error is None) == (torch_error is None), f"ours: {our_error!r}, torch's: {torch_error!r}"
    if our_error is not None:
        assert isinstance(our_error, REFUSALS), repr(our_error)
        return
    assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
    rtol, atol = (3e-2, 2e-2) if ours.dtype in HALF else (1e-4, 1e-5)
    torch.testing.assert_close(ours, torchs, rtol=rtol, atol=atol, equal_nan=equal_nan)
    in_query_order = torchs.shape == args[0].shape and torchs.stride() == torch.empty_like(args[0]).stride()
    if in_query_order and ours.numel():
        assert ours.stride() == torchs.stride()


def only_torch_accepts(*args, match, **kwargs):
    F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises(REFUSALS, match=match):
        pyattn.scaled_dot_product_attention(*args, **kwargs)


SHAPES = [(8,), (5, 8), (3, 5, 8), (1, 5, 8), (2, 3, 5, 8), (1, 3, 5, 8), (2, 1, 5, 8), (2, 2, 3, 5, 8),
          (2, 2, 1, 5, 8)]  # fmt: skip


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
@pytest.mark.parametrize("query_shape", SHAPES, ids=str)
def test_ranks_and_broadcasting(query_shape, arguments):
    for shape in SHAPES:
        check_same(randn(*query_shape), randn(*shape), randn(*shape), **arguments)
        check_same(randn(*query_shape), randn(*query_shape), randn(*shape), **arguments)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8]
DTYPES += [torch.bool, torch.complex64, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    q = randn(2, 3, 5, 8)
    x, mask = q.to(dtype), torch.ones(5, 5).to(dtype)
    check_same(x, x, x)
    for mixed in ((q, x, x), (q, q, x), (q, x, q), (x, q, q)):
        check_same(*mixed)
    for query_dtype in (torch.float32, torch.float64, *HALF):
        y = q.to(query_dtype)
        check_same(y, y, y, mask)


MASKS = [(5, 5), (1, 5), (5, 1), (1, 1), (3, 5, 5), (1, 5, 5), (2, 5, 5), (2, 3, 5, 5), (1, 3, 5, 5),
         (2, 1, 1, 5), (2, 1, 5, 1), (1, 1, 1, 1), (2, 2, 3, 5, 5), (1, 2, 3, 5, 5), (1, 1, 1, 5, 5),
         (4, 5), (5, 4), (0, 5)]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape, kind):
    mask = torch.rand(shape) < 0.6 if kind == "bool" else randn(*shape)
    q4, q5 = randn(2, 3, 5, 8), randn(2, 2, 3, 5, 8)
    for query, key in ((q4, q4), (q4[0], q4[0]), (q4[0, 0], q4[0, 0]), (q5, q5), (q4, q4[:1]), (q4[:1], q4)):
        check_same(query, key, key, mask)


def test_values_of_masks():
    q = randn(2, 3, 5, 8)
    for value in (-torch.inf, torch.finfo(torch.float32).min, torch.inf, torch.nan):
        one = torch.zeros(5, 5).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(value))
        for mask in (one, torch.full((5, 5), value)):
            check_same(q, q, q, mask, equal_nan=True)
    check_same(q, q, q, torch.zeros(5, 5, dtype=torch.bool))  # fully masked rows give 0
    assert not pyattn.scaled_dot_product_attention(q, q, q, torch.zeros(5, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("enable_gqa", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_grouped_heads(rank, enable_gqa):
    for heads in itertools.product((1, 2, 3, 6), repeat=3):
        check_same(
            *(randn(*((2, h, 5, 8) if rank == 4 else (h, 5, 8)[-rank:])) for h in heads),
            enable_gqa=enable_gqa,
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(is_causal):
    """Causal is top-left, whatever the lengths; zero queries or keys work."""
    for Lq, Lk in itertools.product((0, 1, 4, 6), repeat=2):
        check_same(randn(2, 3, Lq, 8), randn(2, 3, Lk, 8), randn(2, 3, Lk, 8), is_causal=is_causal)


def test_empty_sizes_and_head_dims():
    for shape in [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (0, 0, 0, 0), (2, 3, 5, 0)]:
        x = randn(*shape)
        check_same(x, x, x)
        check_same(x, x, x, is_causal=True)
        check_same(x, x, x, enable_gqa=True)
    for D, Dk, Dv in itertools.product((0, 1, 8), (0, 1, 8), (1, 8)):
        check_same(randn(2, 3, 5, D), randn(2, 3, 5, Dk), randn(2, 3, 5, Dv))


@pytest.mark.parametrize("dropout_p", [0, 0.0, 1, 1.0, -1, 2, -0.1, 1 + 1e-9, float("nan"), "0.1", None, False])
def test_dropout_p(dropout_p):
    q = randn(2, 3, 5, 8)
    check_same(q, q, q, dropout_p=dropout_p)


def scale_tensor(*args, **kwargs):
    return pytest.param(torch.tensor(*args, **kwargs), id=f"tensor({args[0]}{', requires_grad' if kwargs else ''})")


# Torch takes a 0-dim tensor that needs no gradient, and no other: it would drop the gradient.
@pytest.mark.parametrize(
    "scale",
    [1, 2, -1, 0, -0.5, 1e-30, "0.5", None, 1j, scale_tensor(0.5), scale_tensor(2), scale_tensor([0.5]),
     scale_tensor([[0.5]]), scale_tensor([0.5, 0.5]), scale_tensor(0.5, requires_grad=True)],
)  # fmt: skip
def test_scale(scale):
    q = randn(2, 3, 5, 8)
    check_same(q, q, q, scale=scale)


@pytest.mark.parametrize("flag", [0, 1, None, "x", 1.0, torch.tensor(True), torch.tensor([True])], ids=repr)
def test_flags_must_be_bool(flag):
    q = randn(2, 3, 5, 8)
    check_same(q, q, q, is_causal=flag)
    check_same(q, q, q, enable_gqa=flag)


@pytest.mark.parametrize("bad", [None, 1, [[1.0]], "q", randn(2, 3, 5, 8).numpy()], ids=lambda x: type(x).__name__)
def test_not_tensors(bad):
    q = randn(2, 3, 5, 8)
    check_same(bad, q, q)
    check_same(q, bad, q)
    check_same(q, q, bad)
    check_same(q, q, q, bad)


def test_signature():
    q = randn(2, 3, 5, 8)
    check_same(q, key=q, value=q)
    check_same(q, q)
    check_same(q, q, q, None, 0.0, False, 0.5)  # scale is keyword-only
    check_same(q, q, q, unknown=1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_strides(order):
    inverse = [order.index(i) for i in range(4)]
    x, y = (randn(*((2, 3, 5, 8)[i] for i in order)).permute(inverse) for _ in range(2))
    dense = randn(2, 3, 5, 8)
    for query, key, value in ((x, y, y), (x, dense, dense), (dense, x, y)):
        check_same(query, key, value)
        check_same(query, key, value, is_causal=True)


def test_expanded_and_sliced():
    q = randn(2, 3, 5, 8)
    for x in (q[:1].expand(2, 3, 5, 8), q[:, :1].expand(2, 3, 5, 8), q[:, :, :1].expand(2, 3, 5, 8)):
        check_same(x, q, q)
        check_same(q, x, x)
    for x in (
        randn(2, 3, 10, 16)[:, :, ::2, :8],
        randn(2, 3, 10, 16)[:, :, ::2, ::2],
        q[..., :1].expand(2, 3, 5, 8),
    ):
        check_same(x, q, q)
        check_same(q, x, x)


# ---- where we differ, and mean to --------------------------------------------------------------------------


def test_key_and_value_of_different_length_are_refused():
    """Torch reads the shorter one out of step, or past its end."""
    only_torch_accepts(randn(1, 1, 4, 8), randn(1, 1, 4, 8), randn(1, 1, 6, 8), match="value must")


def test_empty_batches_that_do_not_broadcast_are_refused():
    only_torch_accepts(randn(2, 3, 5, 8), randn(0, 3, 5, 8), randn(0, 3, 5, 8), match="query, key and value must")


def test_head_dims_that_differ_are_refused_even_if_the_output_is_empty():
    only_torch_accepts(randn(2, 3, 5, 8), randn(2, 3, 5, 1), randn(2, 3, 5, 0), match="key must have the head dim")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    q = randn(2, 3, 5, 8)
    only_torch_accepts(q, q, q, scale=scale, match="scale must be finite")


@pytest.mark.parametrize("arguments", [{"scale": True}, {"dropout_p": True}, {"dropout_p": torch.tensor(1.0)}], ids=str)
def test_a_truth_value_is_no_number(arguments):
    q = randn(2, 3, 5, 8)
    only_torch_accepts(q, q, q, **arguments, match="must be a number")


@pytest.mark.parametrize("scale", [-0.5, -1, 0, 0.0])
def test_causal_with_a_scale_that_is_not_positive(scale):
    """Torch multiplies its -inf by the scale and gives NaN."""
    q = randn(2, 3, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    actual = pyattn.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, q, q, mask, scale=scale))
    assert F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale).isnan().any()


def test_a_mask_with_causal_combines():
    """Torch combines them on one of its paths, and refuses them on the others (here for want of a batch)."""
    q, mask = randn(2, 3, 5, 8), torch.rand(5, 5) < 0.6
    both = mask & torch.ones(5, 5, dtype=torch.bool).tril()
    check_same(q, q, q, mask, is_causal=True)
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set"):
        F.scaled_dot_product_attention(q[0], q[0], q[0], mask, is_causal=True)
    actual = pyattn.scaled_dot_product_attention(q[0], q[0], q[0], mask, is_causal=True)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(q[0], q[0], q[0], both))


@pytest.mark.parametrize("shape", [(), (5,), (1,)])
def test_a_mask_of_fewer_than_two_dimensions_is_refused(shape):
    """Torch refuses it for 4-D input, and broadcasts it on its other paths."""
    q, mask = randn(2, 3, 5, 8), torch.ones(shape, dtype=torch.bool)
    check_same(q, q, q, mask)
    only_torch_accepts(q[0], q[0], q[0], mask, match="attn_mask must have at least two dimensions")


def test_a_nan_query_gives_nan():
    """Torch's flash path gives 0 for the row, which hides the fault."""
    q = randn(1, 1, 2, 8)
    nan = q.clone()
    nan[..., 0, 3] = torch.nan
    out = pyattn.scaled_dot_product_attention(nan, q, q)
    assert out[..., 0, :].isnan().all()
    assert out[..., 1, :].isfinite().all()
    assert not F.scaled_dot_product_attention(nan, q, q).isnan().any()


def test_gradients_are_torchs():
    q, k, v = (randn(2, 3, n, 8).requires_grad_() for n in (5, 7, 7))
    mask = randn(1, 3, 5, 7).requires_grad_()
    weight = randn(2, 3, 5, 8)
    ours, torchs = (
        torch.autograd.grad((f(q, k, v, mask, scale=0.4) * weight).sum(), (q, k, v, mask))
        for f in (pyattn.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(ours, torchs)
