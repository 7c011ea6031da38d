"""pyattn under torch.func: vmap, per-sample gradients, functional_call, and derivatives that are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pyattn
from pyattn.testing import CASES, DIFFERENTIABLE, make_inputs

EXAMPLES = 3
BY_NAME = {case.name: case for case in CASES}
VMAPPED = ["full", "causal, top-left", "gqa", "BLHD", "head dim 80, v 48", "bool mask, keys only", "float mask",
           "float mask, one for all", "float mask, rows only", "padding both, window", "offset per sample",
           "alibi, both sides, gqa", "softcap", "sinks", "paged", "packed, lengths differ"]  # fmt: skip
PER_SAMPLE = ("q_offset", "kv_lengths", "kv_starts", "block_table")


@pytest.fixture(autouse=True)
def no_fallback():
    """A rule, not a loop: torch warns where it falls back to one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def attention(kwargs):
    function = pyattn.attention_varlen if "cu_seqlens_q" in kwargs else pyattn.attention
    return function(**kwargs, return_lse=True)


def split(kwargs):
    tensors = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in kwargs.items() if name not in tensors}


def examples(case, seed=0):
    """``EXAMPLES`` times the tensors of a case, and its numbers. Lengths and offsets differ by example too."""
    several = [make_inputs(case, torch.float32, seed=seed + i) for i in range(EXAMPLES)]
    tensors = [split(kwargs)[0] for kwargs in several]
    for i, t in enumerate(tensors):
        for name in ("q_offset", "kv_lengths", "kv_starts"):
            if name in t and case.page_size is None:
                t[name] = (t[name] - i).clamp(min=0)
    return tensors, split(several[0])[1]


def stacked(tensors, in_dims):
    """One argument for vmap: a tensor without a dimension to map over is the first example's."""
    return {
        name: tensors[0][name] if dim is None else torch.stack([t[name] for t in tensors], dim)
        for name, dim in in_dims.items()
    }


def looped(function, tensors, in_dims):
    results = [
        function({name: (tensors[0] if dim is None else t)[name] for name, dim in in_dims.items()}) for t in tensors
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def check(function, tensors, in_dims, **options):
    actual = torch.vmap(function, (in_dims,), **options)(stacked(tensors, in_dims))
    for x, y in zip(actual, looped(function, tensors, in_dims), strict=True):
        torch.testing.assert_close(x, y)


def foldable(case, name):
    """What a vmapped dimension can be folded into, as the rule says."""
    if name.startswith("cu_seqlens") or (case.page_size is not None and name in ("key", "value")):
        return False
    return not (name in PER_SAMPLE and (case.sinks or case.packed))


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name):
    """All tensors vmapped, in different dimensions; then each by itself."""
    case = BY_NAME[name].small()
    tensors, numbers = examples(case)
    names = [n for n in tensors[0] if foldable(case, n)]
    fixed = {n: None for n in tensors[0] if n not in names}

    def function(t):
        return attention(t | numbers)

    for first in (0, 1):
        check(function, tensors, fixed | {n: (first + i) % (tensors[0][n].dim() + 1) for i, n in enumerate(names)})
    for alone in names:
        check(function, tensors, dict.fromkeys(tensors[0]) | {alone: 0})


@pytest.mark.parametrize("name", [n for n in VMAPPED if n != "paged"])
def test_gradients_of_each_example(name):
    case = BY_NAME[name].small()
    tensors, numbers = examples(case)
    differentiable = [n for n in DIFFERENTIABLE if n in tensors[0] and tensors[0][n].is_floating_point()]

    def gradients(t):
        def loss(leaves):
            out, lse = attention(t | leaves | numbers)
            return out.square().sum() + torch.where(lse == -torch.inf, 0, lse).sin().sum()

        return tuple(torch.func.grad(loss)({n: t[n] for n in differentiable}).values())

    names = [n for n in tensors[0] if foldable(case, n)]
    fixed = {n: None for n in tensors[0] if n not in names}
    check(gradients, tensors, fixed | {n: i % (tensors[0][n].dim() + 1) for i, n in enumerate(names)})
    for alone in names:
        check(gradients, tensors, dict.fromkeys(tensors[0]) | {alone: -1})


def test_gradients_through_vmap():
    """Recorded outside, computed inside: the gradient of what is shared is the sum over the examples."""
    q = torch.randn(EXAMPLES, 2, 4, 7, 8, requires_grad=True)
    k = torch.randn(2, 2, 7, 8, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    weight = torch.randn_like(q)

    def loss(function):
        return (function(lambda x: pyattn.attention(x, k, k, causal=True, sinks=sinks)) * weight).sum()

    actual = torch.autograd.grad(loss(lambda f: torch.vmap(f)(q)), (q, k, sinks))
    expected = torch.autograd.grad(loss(lambda f: torch.stack([f(x) for x in q])), (q, k, sinks))
    torch.testing.assert_close(actual, expected)


def test_gradient_of_the_vmapped_input_alone():
    """Inside vmap a tensor does not say that it requires a gradient."""
    q, k = torch.randn(EXAMPLES, 2, 4, 7, 8, requires_grad=True), torch.randn(2, 2, 7, 8)

    def loss(q):
        return torch.vmap(lambda x: pyattn.attention(x, k, k))(q).square().sum()

    (expected,) = torch.autograd.grad(sum(pyattn.attention(x, k, k).square().sum() for x in q), q)
    torch.testing.assert_close(torch.autograd.grad(loss(q), q)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), expected)


def test_nested_vmap_and_jacobian():
    q, k, v = torch.randn(2, 5, 1, 4, 6, 8), torch.randn(5, 1, 2, 9, 8), torch.randn(2, 1, 2, 9, 8)
    actual = torch.vmap(torch.vmap(pyattn.attention, (0, 0, None)), (0, None, 0))(q, k, v)
    expected = torch.stack([torch.stack([pyattn.attention(q[i, j], k[j], v[i]) for j in range(5)]) for i in range(2)])
    torch.testing.assert_close(actual, expected)

    def rows(x):
        return pyattn.attention(x, k[0], v[0]).sum((1, 2))

    x = q[0, 0].requires_grad_()
    expected = torch.autograd.functional.jacobian(rows, x)
    torch.testing.assert_close(torch.func.jacrev(rows)(x.detach()), expected)


def test_vmap_of_the_drop_in():
    q, k, v, mask = torch.randn(3, 4, 6, 8), torch.randn(4, 3, 6, 8), torch.randn(4, 6, 8), torch.randn(6, 6)
    for in_dims, arguments in (((0, 1, None), (q, k, v)), ((0, 1, None, None), (q, k, v, mask))):
        actual = torch.vmap(pyattn.scaled_dot_product_attention, in_dims)(*arguments)
        expected = torch.vmap(torch.nn.functional.scaled_dot_product_attention, in_dims)(*arguments)
        torch.testing.assert_close(actual, expected)


def test_gradient_taken_inside_another_transform():
    """The value of a level below must be recorded also where a level above records it."""
    q, k = torch.randn(3, 1, 2, 5, 8), torch.randn(1, 2, 5, 8)

    def sum_of_losses(k):
        def loss(q, k):
            return pyattn.attention(q, k, k).square().sum()

        return torch.vmap(torch.func.grad_and_value(loss), (0, None))(q, k)[1].sum()

    k.requires_grad_()
    expected = torch.autograd.grad(sum(pyattn.attention(x, k, k).square().sum() for x in q), k)[0]
    torch.testing.assert_close(torch.func.grad(sum_of_losses)(k.detach()), expected)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return pyattn.attention(q, k, v, causal=True)


def test_functional_call():
    """Per-sample gradients of a module's parameters, and an ensemble of modules."""
    layer, x = Layer(), torch.randn(4, 6, 16)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],)).square().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    actual = torch.vmap(torch.func.grad(loss), (None, 0))(detached, x)
    for i in range(4):
        expected = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), tuple(parameters.values()))
        torch.testing.assert_close([g[i] for g in actual.values()], list(expected))
    layers = [Layer() for _ in range(3)]
    stack, _ = torch.func.stack_module_state(layers)
    ensemble = torch.vmap(lambda p, x: torch.func.functional_call(layer, p, (x,)), (0, None))(stack, x)
    torch.testing.assert_close(ensemble, torch.stack([each(x) for each in layers]))


# ---- what cannot be folded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("packed", "cu_seqlens_q"),
        ("packed", "cu_seqlens_k"),
        ("paged", "key"),
        ("paged", "value"),
    ],
)
def test_what_cannot_be_folded_is_named(case, name):
    tensors, numbers = examples(BY_NAME[case].small())
    in_dims = dict.fromkeys(tensors[0]) | {name: 0}
    with pytest.raises(NotImplementedError, match=f"^{name} must be the same for every example"):
        torch.vmap(lambda t: attention(t | numbers), (in_dims,))(stacked(tensors, in_dims))


@pytest.mark.parametrize("name", ["kv_lengths", "kv_starts", "q_offset"])
def test_samples_and_sinks_cannot_both_be_folded(name):
    q, sinks = torch.randn(2, 2, 4, 8), torch.randn(2)
    with pytest.raises(
        NotImplementedError, match=f"^{name} must be the same for every example of torch.vmap with sink"
    ):
        torch.vmap(lambda x: pyattn.attention(q, q, q, sinks=sinks, **{name: x}))(torch.ones(3, 2, dtype=torch.int32))


def test_pages_and_sinks_cannot_be_folded():
    """Folded into heads, pages would have to be copied for every example."""
    q, pages, sinks = torch.randn(3, 1, 2, 4, 8), torch.randn(2, 2, 4, 8), torch.randn(2)
    where = {"block_table": torch.zeros(1, 1, dtype=torch.int32), "kv_lengths": torch.ones(1, dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=r"^block_table under torch.vmap does not go together with sinks"):
        torch.vmap(lambda x: pyattn.attention(x, pages, pages, sinks=sinks, **where))(q)


def dropped(q, **kwargs):
    """Rows of weights: the values are unit vectors."""
    return pyattn.attention(q, q, torch.eye(q.shape[-2]).expand(*q.shape[:-1], -1), dropout_p=0.5, **kwargs)


@pytest.mark.parametrize("sinks", [False, True])
def test_dropout_that_differs_by_example(sinks):
    """Forward and backward drop the same entries, other ones in each example, and the same for the same seed."""
    q = torch.randn(1, 2, 20, 8).expand(EXAMPLES, -1, -1, -1, -1)
    extra = {"sinks": torch.randn(2)} if sinks else {}
    torch.manual_seed(3)
    weights = torch.vmap(lambda x: dropped(x, **extra), randomness="different")(q)
    kept = weights != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert all(not torch.equal(kept[i], kept[j]) for i in range(EXAMPLES) for j in range(i))

    def gradient(v, x):
        return torch.func.grad(lambda v: pyattn.attention(x, x, v, dropout_p=0.5, **extra).sum())(v)

    torch.manual_seed(3)
    v = torch.eye(20).expand(EXAMPLES, 1, 2, -1, -1)
    dv = torch.vmap(gradient, randomness="different")(v, q)
    torch.testing.assert_close(dv[..., 0], weights.sum(-2))


def test_dropout_that_is_the_same_is_refused():
    q = torch.randn(EXAMPLES, 1, 2, 20, 8)
    with pytest.raises(NotImplementedError, match=r"^dropout_p must be 0 under torch.vmap with randomness='same'"):
        torch.vmap(dropped, randomness="same")(q)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(q)


# ---- derivatives without a rule: never a silent zero --------------------------------------------------------


SECOND = r"pyattn::attention_backward has no derivative"
FORWARD = r"pyattn::attention_(forward|backward) has no forward-mode derivative"
INPUTS = {
    "query": torch.randn(1, 2, 3, 4),
    "key": torch.randn(1, 2, 3, 4),
    "value": torch.randn(1, 2, 3, 4),
    "attn_mask": torch.randn(3, 3),
    "sinks": torch.randn(2),
}
PACKED = ["query", "key", "value", "sinks"]


def of_one(name, packed=False):
    """Attention as a function of one input, and that input."""
    if not packed:
        return lambda x: pyattn.attention(**INPUTS | {name: x}), INPUTS[name]
    lengths = torch.tensor([0, 1, 3], dtype=torch.int32)
    inputs = {n: INPUTS[n] if n == "sinks" else INPUTS[n][0].mT.contiguous().mT.transpose(0, 1) for n in PACKED}
    return lambda x: pyattn.attention_varlen(**inputs | {name: x}, cu_seqlens_q=lengths, cu_seqlens_k=lengths), inputs[
        name
    ]


each_input = pytest.mark.parametrize(
    ("name", "packed"), [*((n, False) for n in INPUTS), *((n, True) for n in PACKED)], ids=str
)


@each_input
@pytest.mark.parametrize("wrt", ["itself", "output gradient"])
def test_second_derivatives_raise(name, packed, wrt):
    function, x = of_one(name, packed)
    x = x.clone().requires_grad_()
    out = function(x)
    grad_out = torch.randn_like(out, requires_grad=wrt == "output gradient")
    (gradient,) = torch.autograd.grad(out, x, grad_out, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.autograd.grad(gradient.sum(), x if wrt == "itself" else grad_out)


@each_input
def test_nested_gradients_raise(name, packed):
    function, x = of_one(name, packed)

    def loss(x):
        return function(x).square().sum()

    def gradient_norm(x):
        return torch.func.grad(loss)(x).square().sum()

    with pytest.raises(NotImplementedError, match=SECOND):
        torch.func.grad(gradient_norm)(x)
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.vmap(torch.func.grad(gradient_norm))(x.expand(2, *x.shape))
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.func.jacrev(torch.func.grad(loss))(x)
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.hessian(loss)(x)
    # Recorded by torch.func inside, differentiated by autograd outside.
    leaf = x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=SECOND):
        gradient_norm(leaf).backward()


@each_input
def test_forward_mode_raises(name, packed):
    function, x = of_one(name, packed)
    tangent = torch.ones_like(x)
    for transform in (
        lambda: torch.func.jvp(function, (x,), (tangent,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.linearize(function, x),
        lambda: torch.func.jvp(torch.func.grad(lambda x: function(x).sum()), (x,), (tangent,)),
        lambda: torch.func.grad(lambda x: torch.func.jvp(function, (x,), (tangent,))[1].sum())(x),
        lambda: torch.vmap(lambda t: torch.func.jvp(function, (x,), (t,))[1])(tangent[None]),
        lambda: torch.func.jvp(torch.vmap(function), (x[None],), (tangent[None],)),
    ):
        with pytest.raises(NotImplementedError, match=FORWARD):
            transform()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        with pytest.raises(NotImplementedError, match=FORWARD):
            function(dual)
        with pytest.raises(NotImplementedError, match=FORWARD), torch.no_grad():
            function(dual)
        assert function(x).isfinite().all()  # no tangent, no error
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        with pytest.raises(NotImplementedError, match=FORWARD):
            torch.autograd.grad(out, leaf, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_a_tangent_of_what_has_no_gradient_raises():
    q, slopes, scale = INPUTS["query"], torch.rand(2), torch.tensor(0.5)
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.jvp(lambda x: pyattn.attention(q, q, q, alibi_slopes=x), (slopes,), (slopes,))
    with pytest.raises(TypeError, match="scale must be a number"):
        torch.func.jvp(lambda x: pyattn.scaled_dot_product_attention(q, q, q, scale=x), (scale,), (scale,))


def test_a_gradient_of_what_has_none_raises_inside_vmap():
    """There no tensor says that it requires a gradient."""
    q, slopes = INPUTS["query"], torch.rand(3, 2)

    def with_slopes(slopes):
        return torch.vmap(lambda x: pyattn.attention(q, q, q, alibi_slopes=x))(slopes).sum()

    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)

    def with_pages(queries):
        return torch.vmap(lambda x: pyattn.attention(x, q, q, block_table=table, kv_lengths=lengths))(queries).sum()

    for call in (torch.func.grad(with_slopes), lambda x: with_slopes(x.requires_grad_())):
        with pytest.raises(ValueError, match="alibi_slopes must not require a gradient"):
            call(slopes)
    with pytest.raises(NotImplementedError, match="block_table: paged keys have no gradient, but query requires one"):
        torch.func.grad(with_pages)(q[None])
    assert with_pages(q[None]).isfinite()


@pytest.mark.parametrize("function", [pyattn.attention, pyattn.scaled_dot_product_attention])
def test_second_derivatives_of_the_lse_and_the_drop_in_raise(function):
    q = INPUTS["query"].clone().requires_grad_()
    out = function(q, q, q) if function is not pyattn.attention else function(q, q, q, return_lse=True)[1]
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        (out.sum() + dq.square().sum()).backward()
