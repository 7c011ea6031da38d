"""Multi-head projections: conformance, gradients, bits, layouts, what torch does with ops, and bad input."""

from __future__ import annotations

import dataclasses
import itertools

import projection_cases
import pytest
import torch
import torch.nn.functional as F
from projection_cases import CASES, ProjectionCase, call, check, make, results
from torch.utils.flop_counter import FlopCounterMode

import pyattn
from pyattn import projection, projection_ops
from pyattn.backends import cpu
from pyattn.backends.cpu import projection as kernels
from pyattn.spec import ProjectionSpec, ProjectionTensors
from pyattn.testing import DTYPES, assert_close

# Several blocks of rows, of columns and of depth, and a rest of each; none of it happens in small ones.
LARGE = [
    ProjectionCase("blocks", heads=(4, 2, 2), D=80, L=450, B=1, E=530, norms="qk", R=80),
    ProjectionCase("blocks, plain", heads=(5, 3, 3), D=64, L=130, B=3, E=300, layout="transposed"),
    ProjectionCase("blocks, odd depth", heads=(2, 1, 1), D=48, L=70, B=1, E=257, layout="rows"),
    ProjectionCase("blocks, one wide head", heads=(1, 0, 0), D=600, L=401, B=1, E=64, norms="q"),
    ProjectionCase("blocks, output", D=520, E=288, D_in=96, L=200, B=2, layout="BLHD", residual=True),
    ProjectionCase("few rows, deep", heads=(3, 1, 1), D=40, L=5, B=3, E=1030, norms="qk", R=40, interleaved=True),
    ProjectionCase("one row", heads=(2, 2, 2), D=64, L=1, B=1, E=515),
    ProjectionCase("few rows, output", D=520, E=96, D_in=32, L=9, B=2, layout="BLHD", residual=True),
]
BY_NAME = {case.name: case for case in CASES + LARGE}
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@by_dtype
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_conformance(case, dtype, engine):
    with engine.at_work(2):
        check(case, dtype, engine.backend)


@by_dtype
@pytest.mark.parametrize("name", ["blocks", "blocks, plain", "blocks, output", "few rows, deep"])
def test_the_same_bits_for_any_number_of_threads(name, dtype, engine):
    case = BY_NAME[name]
    found = []
    for threads in (1, 2, 5):
        with engine.at_work(threads):
            found.append(results(case, make(case, dtype, True), dtype, engine.backend))
    for other, (key, x) in itertools.product(found[1:], found[0].items()):
        assert torch.equal(other[key], x), key


def test_the_same_bits_in_any_larger_batch(engine):
    kwargs = make(ProjectionCase("rows", L=500, B=1, E=300, heads=(4, 2, 2), norms="qk", R=16), torch.float32)
    with engine.at_work(2):
        whole = pyattn.qkv_projection(**kwargs, num_heads=4, num_kv_heads=2, backend=engine.backend)
        part = pyattn.qkv_projection(
            **kwargs | {"x": kwargs["x"][:, :77]}, num_heads=4, num_kv_heads=2, backend=engine.backend
        )
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x[:, :, :77], y)


def eager_rotary(x, cos, sin, interleaved):
    """The usual one of model code, in the dtype of ``x``."""
    R = 2 * cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = turned.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    return torch.cat((turned * cos + other * sin, rest), -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_against_torch(interleaved, any_engine):
    """The reference, too, is held to what everybody writes."""
    case = ProjectionCase("all", heads=(4, 2, 2), D=16, L=30, norms="qk", R=12, interleaved=interleaved, eps=1e-2)
    kwargs = make(case, torch.float32) | {"positions": torch.randint(0, 60, (2, 30))}
    with any_engine.at_work():
        found = call(case, kwargs, any_engine.backend)
    y = F.linear(kwargs["x"], kwargs["weight"], kwargs["bias"]).unflatten(-1, (8, 16)).transpose(1, 2)
    q, k, v = y.split([4, 2, 2], 1)
    angles = (table[kwargs["positions"]][:, None] for table in kwargs["rotary"][:2])
    cos, sin = angles
    q = eager_rotary(F.rms_norm(q, (16,), kwargs["q_norm"], 1e-2), cos, sin, interleaved)
    k = eager_rotary(F.rms_norm(k, (16,), kwargs["k_norm"], 1e-2), cos, sin, interleaved)
    torch.testing.assert_close(found, {"q": q, "k": k, "v": v}, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["everything", "everything, interleaved", "rotary, part", "k and v", "output, residual"]
)
def test_gradients_of_the_reference_are_those_of_differences(name):
    case = ProjectionCase(**{**vars(BY_NAME[name]), "B": 1, "L": 3, "E": 8, "D": 8, "D_in": BY_NAME[name].D_in and 4})
    case = ProjectionCase(**{**vars(case), "R": min(case.R, 6)})
    kwargs = make(case, torch.float64, requires_grad=True)
    names = [name for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*tensors):
        return tuple(x for x in call(case, kwargs | dict(zip(names, tensors, strict=True))).values() if x.numel())

    assert torch.autograd.gradcheck(function, tuple(kwargs[name] for name in names))


# ---- rotary alone -------------------------------------------------------------------------------------------------


def rotary_call(dtype, interleaved, layout, requires_grad=False):
    shape = (2, 3, 70, 40) if layout == "BHLD" else (2, 70, 3, 40)
    q, k = (torch.randn(shape).to(dtype) for _ in range(2))
    if layout == "BLHD":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angles = torch.outer(torch.arange(100.0), 100 ** -torch.linspace(0, 1, 12))
    return q.requires_grad_(requires_grad), k[:, :1].clone(), pyattn.Rotary(angles.cos(), angles.sin(), interleaved)


@by_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_apply_rotary(layout, interleaved, dtype, engine):
    q, k, rotary = rotary_call(dtype, interleaved, layout, requires_grad=True)
    positions = torch.randint(0, 100, (2, 70))
    with engine.at_work(2):
        turned, turned_k = pyattn.apply_rotary(q, k, rotary, positions, backend=engine.backend)
        grad = torch.randn_like(turned)
        (back,) = torch.autograd.grad(turned, q, grad)
    assert turned.stride() == q.stride() and turned_k.shape == k.shape
    cos, sin = (table[positions][:, None] for table in rotary[:2])
    for x, y in ((q, turned), (k, turned_k)):
        truth = eager_rotary(x.detach().double(), cos.double(), sin.double(), interleaved)
        assert_close(y.detach(), [eager_rotary(x.detach().float(), cos, sin, interleaved).to(dtype)], truth)
    truth = eager_rotary(grad.double(), cos.double(), -sin.double(), interleaved)
    assert_close(back, [eager_rotary(grad.float(), cos, -sin, interleaved).to(dtype)], truth)


def test_positions_of_none_are_those_from_0_on(any_engine):
    q, k, rotary = rotary_call(torch.float32, False, "BHLD")
    with any_engine.at_work():
        plain = pyattn.apply_rotary(q, k, rotary, backend=any_engine.backend)
        given = pyattn.apply_rotary(q, k, rotary, torch.arange(70, dtype=torch.int32), backend=any_engine.backend)
    assert torch.equal(plain[0], given[0]) and torch.equal(plain[1], given[1])


def test_projecting_with_rotary_is_projecting_and_then_rotary(engine):
    case = BY_NAME["rotary, part"]
    kwargs = make(case, torch.float32)
    bare = {name: x for name, x in kwargs.items() if name not in ("rotary", "positions")}
    with engine.at_work(2):
        fused, apart = (call(case, k, engine.backend) for k in (kwargs, bare))
        q, k = pyattn.apply_rotary(apart["q"], apart["k"], kwargs["rotary"], kwargs["positions"])
    torch.testing.assert_close((fused["q"], fused["k"]), (q, k), atol=1e-6, rtol=1e-6)


@by_dtype
@pytest.mark.parametrize("seed", range(3))
def test_projecting_and_attending_equals_the_composition(seed, dtype, engine):
    case = ProjectionCase("block", heads=(4, 2, 2), D=32, E=64, L=90, norms="qk", R=32)
    kwargs = make(case, dtype, seed=seed)
    weight = torch.randn(64, 128) * 128**-0.5

    def block(dtype, backend):
        inputs = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        q, k, v = pyattn.qkv_projection(**inputs, num_heads=4, num_kv_heads=2, backend=backend)
        out = pyattn.attention(q, k, v, causal=True, backend=backend)
        return pyattn.output_projection(out, weight.to(kwargs["x"].dtype).to(dtype), backend=backend)

    with engine.at_work(2):
        actual = block(dtype, engine.backend)
    assert_close(actual, [block(dtype, "reference")], block(torch.float64, "reference"))


def test_last_strides_other_than_1(any_engine):
    """Of every tensor that there are rows of."""
    kwargs = make(BY_NAME["output, residual"], torch.float32)
    apart = {name: torch.stack([x, x * torch.nan], -1)[..., 0] for name, x in kwargs.items()}
    with any_engine.at_work():
        expected = pyattn.output_projection(**kwargs, backend=any_engine.backend)
        assert torch.equal(pyattn.output_projection(**apart, backend=any_engine.backend), expected)


@by_dtype
@pytest.mark.parametrize("L", [5, 70], ids=["few rows", "blocks"])
def test_what_an_earlier_call_left_behind_does_not_show(L, dtype, engine):
    """Beside the last element of an odd depth lies what an even one had there."""
    case = ProjectionCase("odd depth", heads=(2, 1, 1), D=48, L=L, B=2, E=129, layout="transposed")
    kwargs = make(case, dtype)
    even = make(dataclasses.replace(case, E=130), dtype)
    even["x"].fill_(torch.nan)
    with engine.at_work(1):
        expected = call(case, kwargs, engine.backend)
        call(case, kwargs | even, engine.backend)
        found = call(case, kwargs, engine.backend)
    for name, x in expected.items():
        assert x.isfinite().all() and torch.equal(found[name], x)


# ---- a packed weight ----------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("name", ["blocks", "blocks, plain", "blocks, odd depth", "blocks, output", "odd head"])
def test_a_packed_weight_gives_the_same_bits(name, dtype, engine):
    case = BY_NAME[name]
    kwargs = make(case, dtype)
    spec, t = projection_cases.prepare(case, kwargs)
    with engine.at_work(2):
        packed = t._replace(packed=kernels.pack_weight(t.weight))
        x, *_ = outputs = projection_ops.projection(spec, packed, "cpu")
        assert all(map(torch.equal, outputs, projection_ops.projection(spec, t, "cpu")))
        zeros = t._replace(packed=torch.zeros_like(packed.packed))  # that it is the packed one that is read
        assert not torch.equal(projection_ops.projection(spec, zeros, "cpu")[0], x)


# ---- torch --------------------------------------------------------------------------------------------------------


def qkv(**overrides):
    """Arguments of a legal call, with some replaced."""
    angles = torch.outer(torch.arange(20.0), torch.tensor([1.0, 0.1]))
    arguments = {"x": torch.randn(2, 6, 12), "weight": torch.randn(32, 12), "num_heads": 4, "num_kv_heads": 2}
    return arguments | {"rotary": pyattn.Rotary(angles.cos(), angles.sin())} | overrides


def op_arguments(requires_grad):
    spec, t = projection._qkv(**qkv(q_norm=torch.ones(4), positions=torch.zeros(6, dtype=torch.int64)))
    leaf = {name: getattr(t, name).clone().requires_grad_(requires_grad) for name in ("x", "weight", "q_norm")}
    return *t._replace(**leaf), *spec


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend):
    torch.use_deterministic_algorithms(False)  # opcheck compares what nobody has written, too
    for requires_grad in (False, True):
        torch.library.opcheck(torch.ops.pyattn.projection, (*op_arguments(requires_grad), False, backend))
    q, k, _, saved = torch.ops.pyattn.projection(*op_arguments(False), True, backend)
    arguments = (*op_arguments(False), saved, q, k, k, [True, True, False], backend)
    torch.library.opcheck(torch.ops.pyattn.projection_backward, arguments)
    tables = qkv()["rotary"]
    for x in (torch.randn(2, 3, 6, 4), torch.randn(2, 6, 3, 4).transpose(1, 2).requires_grad_()):
        torch.library.opcheck(torch.ops.pyattn.rotary, (x, *tables[:2], None, False, True, backend))


def gradients(function, tensors):
    outputs = function(*tensors)
    return *(x.detach() for x in outputs), *torch.autograd.grad(sum(x.square().sum() for x in outputs), tensors)


def whole(x, weight, out_weight):
    q, k, v = pyattn.qkv_projection(x, weight, num_heads=4, num_kv_heads=2, rotary=qkv()["rotary"])
    q, k = pyattn.apply_rotary(q, k, qkv()["rotary"])
    return q, k, v, pyattn.output_projection(pyattn.attention(q, k, v), out_weight, residual=x)


def leaves():
    shapes = ((2, 6, 12), (32, 12), (12, 16))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def test_compile():
    torch._dynamo.reset()
    tensors = leaves()
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, tensors), gradients(whole, tensors))


def test_compiled_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    for length in (6, 7, 40):
        tensors = (torch.randn(2, length, 12, requires_grad=True), *leaves()[1:])
        if length <= 20:
            torch._dynamo.mark_dynamic(tensors[0], 1)
            torch.testing.assert_close(gradients(compiled, tensors), gradients(whole, tensors))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, weight, out_weight):
            return whole(x, weight, out_weight)

    tensors = leaves()
    exported = torch.export.export(Model(), tensors)
    torch.testing.assert_close(exported.module()(*tensors), whole(*tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, weight, out_weight = leaves()
    with torch.autocast("cpu", dtype):
        q, _, v = pyattn.qkv_projection(x, weight, num_heads=4, num_kv_heads=2)
        out = pyattn.output_projection(q, out_weight, residual=x)
    assert q.dtype == v.dtype == dtype
    assert out.dtype == torch.float32  # as torch adds a wider residual
    same = pyattn.qkv_projection(x.to(dtype), weight.to(dtype), num_heads=4, num_kv_heads=2)
    assert torch.equal(q, same[0]) and torch.equal(v, same[2])
    out.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def test_func_grad_and_vmap():
    x, weight, _ = (x.detach() for x in leaves())

    def loss(weight, x):
        return pyattn.qkv_projection(x[None], weight, num_heads=4, num_kv_heads=2)[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for i in range(2):
        torch.testing.assert_close(per_sample[i], torch.func.grad(loss)(weight, x[i]))
    rotary, q = qkv()["rotary"], torch.randn(3, 2, 4, 6, 4)
    turned = torch.func.vmap(lambda q: pyattn.apply_rotary(q, q, rotary)[0])(q)
    assert torch.equal(turned, torch.stack([pyattn.apply_rotary(x, x, rotary)[0] for x in q]))


def test_flops_are_those_of_the_products():
    x, weight, _ = leaves()

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def step(x, weight):
        q, k, v = pyattn.qkv_projection(x, weight, num_heads=4, num_kv_heads=2)
        return lambda: (q.sum() + k.sum() + v.sum()).backward()

    product = 2 * 12 * 12 * 32
    assert counted(lambda: step(x.detach(), weight.detach())) == product
    for tensors, products in (((x, weight), 2), ((x, weight.detach()), 1), ((x.detach(), weight), 1)):
        assert counted(step(*tensors)) == products * product


def test_derivatives_that_there_are_not_raise():
    x, weight, _ = leaves()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: pyattn.qkv_projection(x, weight, num_heads=4, num_kv_heads=2)[0], (x,), (x,))
    q = pyattn.qkv_projection(x, weight, num_heads=4, num_kv_heads=2)[0]
    (grad,) = torch.autograd.grad(q.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        grad.sum().backward()


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, _ = leaves()
    frozen = weight.detach()
    q, _, _ = pyattn.qkv_projection(x, frozen, num_heads=4, num_kv_heads=2)
    q.sum().backward()
    assert frozen.grad is None and x.grad is not None


def test_explanation_and_log(capfd, engine):
    kwargs = qkv()
    explained = pyattn.explain_projection(**kwargs)
    assert explained.chosen == {"forward": engine.backend}
    assert explained.flops == 2 * 12 * 12 * 32 and explained.bytes == 4 * (2 * 6 * 12 + 32 * 12 + 2 * 6 * 32)
    assert "projection float32 on cpu: x [2, 1, 6, 12], weight [32, 12]" in str(explained)
    assert f"{engine}, " in str(explained)
    needs = pyattn.explain_projection(torch.randn(2, 4, 6, 4), torch.randn(12, 16, requires_grad=True))
    assert needs.chosen == {"forward": engine.backend, "backward": engine.backend}
    with pyattn.logging():
        pyattn.qkv_projection(**kwargs)
    assert "pyattn: projection forward float32 on cpu" in capfd.readouterr().err


def test_float64_and_devices_have_reasons():
    double = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in qkv().items()}
    assert pyattn.explain_projection(**double).chosen == {"forward": "reference"}
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot compute this forward: computes in float32"):
        pyattn.qkv_projection(**double, backend="cpu")
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot compute this forward: computes attention"):
        pyattn.qkv_projection(**qkv(), backend="cuda")


@by_dtype
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (2, 5, 0)])
def test_nothing_to_do(shape, dtype, any_engine):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(32, shape[2], dtype=dtype, requires_grad=True), torch.randn(32, dtype=dtype)
    with any_engine.at_work():
        q, k, v = pyattn.qkv_projection(x, weight, bias, num_heads=4, num_kv_heads=2, backend=any_engine.backend)
        assert q.shape == (*shape[:1], 4, shape[1], 4)
        if q.numel():
            assert torch.equal(v.transpose(1, 2).flatten(2), bias[24:].expand(2, 5, 8))
        (q.sum() + k.sum() + v.sum()).backward()
    assert weight.grad.shape == weight.shape and not weight.grad.any()
    assert x.grad.shape == x.shape


def test_scratch_does_not_grow_with_rows_or_columns(engine):
    peaks = []
    for scale in (1, 2):
        x, weight = torch.randn(1, 768 * scale, 512), torch.randn(1536 * scale, 512)
        with engine.at_work(2):
            cpu.scratch_peak_bytes(reset=True)
            pyattn.qkv_projection(x, weight, num_heads=8 * scale, backend=engine.backend)
            peaks.append(cpu.scratch_peak_bytes())
    assert peaks[0] == peaks[1] and 0 < peaks[0] < 8e6


# ---- bad input ----------------------------------------------------------------------------------------------------

z = torch.zeros
TABLE = torch.ones(20, 2)
BAD_QKV = [
    (TypeError, "x must be a tensor, got list", {"x": [1]}),
    (TypeError, "x must be float32 or .* got int64", {"x": z(2, 6, 12, dtype=torch.int64)}),
    (ValueError, r"x must have shape \[B, L, E\], got \[6, 12\]", {"x": z(6, 12)}),
    (ValueError, r"weight must have shape .* with 12 columns, got \[32, 11\]", {"weight": z(32, 11)}),
    (TypeError, "weight must be float32, got bfloat16", {"weight": z(32, 12, dtype=torch.bfloat16)}),
    (ValueError, "weight must be on the device of x", {"weight": z(32, 12, device="meta")}),
    (ValueError, r"weight must have shape .*, a multiple of 8 rows, got \[33, 12\]", {"weight": z(33, 12)}),
    (ValueError, r"bias must have shape \[rows of weight\] = \[32\], got \[31\]", {"bias": z(31)}),
    (TypeError, "num_heads must be an int, got float", {"num_heads": 4.0}),
    (ValueError, "num_heads must be at least 1, got 0", {"num_heads": 0}),
    (ValueError, "num_kv_heads must be at least 1, got -2", {"num_kv_heads": -2}),
    (ValueError, "num_heads must be a multiple of num_kv_heads = 3, got 4", {"num_kv_heads": 3}),
    (ValueError, r"q_norm must have shape \[D\] = \[4\], got \[5\]", {"q_norm": z(5)}),
    (ValueError, r"k_norm must have shape \[D\] = \[4\], got \[2, 4\]", {"k_norm": z(2, 4)}),
    (ValueError, "eps must be at least 0, got -1", {"eps": -1}),
    (TypeError, "rotary must be a pyattn.Rotary, got tuple", {"rotary": (TABLE, TABLE)}),
    (ValueError, r"rotary.cos must have shape .* R at most the head dim 4, .* got \[20, 3\]",
     {"rotary": pyattn.Rotary(z(20, 3), z(20, 3))}),
    (ValueError, "rotary.sin must have shape", {"rotary": pyattn.Rotary(TABLE, z(19, 2))}),
    (TypeError, "rotary.interleaved must be a bool", {"rotary": pyattn.Rotary(TABLE, TABLE, 1)}),
    (NotImplementedError, "rotary.cos must not require a gradient",
     {"rotary": pyattn.Rotary(z(20, 2, requires_grad=True), TABLE)}),
    (ValueError, "rotary must have at least the 6 positions of x, got 5",
     {"rotary": pyattn.Rotary(TABLE[:5], TABLE[:5])}),
    (ValueError, "positions must come with rotary", {"positions": z(6, dtype=torch.int64), "rotary": None}),
    (TypeError, "positions must be int32 or int64, got float32", {"positions": z(6)}),
    (ValueError, r"positions must have shape \[L\] = \[6\] or .* got \[5\]", {"positions": z(5, dtype=torch.int64)}),
    (ValueError, r"positions must lie in \[0, 19\]", {"positions": torch.full((6,), 20)}),
    (ValueError, r"positions must lie in \[0, 19\]", {"positions": torch.full((2, 6), -1)}),
    (ValueError, "backend must be None or one of", {"backend": "gpu"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD_QKV, ids=[case[1] for case in BAD_QKV])
def test_bad_qkv(error, match, overrides):
    with pytest.raises(error, match=match):
        pyattn.qkv_projection(**qkv(**overrides))


BAD_OUTPUT = [
    (ValueError, r"attn_out must have shape \[B, H, L, D\], got \[2, 6, 16\]", {"attn_out": z(2, 6, 16)}),
    (ValueError, r"weight must have shape \[E, H \* D\] with 16 columns, got \[9, 15\]", {"weight": z(9, 15)}),
    (ValueError, r"residual must have shape \[B, L, E\] = \[2, 6, 9\], got \[2, 6, 8\]", {"residual": z(2, 6, 8)}),
    (TypeError, "residual must be float32, got float16", {"residual": z(2, 6, 9, dtype=torch.float16)}),
]


@pytest.mark.parametrize(("error", "match", "overrides"), BAD_OUTPUT, ids=[case[1] for case in BAD_OUTPUT])
def test_bad_output(error, match, overrides):
    with pytest.raises(error, match=match):
        pyattn.output_projection(**{"attn_out": z(2, 4, 6, 4), "weight": z(9, 16)} | overrides)


def test_bad_rotary():
    q, rotary = z(2, 4, 6, 4), qkv()["rotary"]
    with pytest.raises(TypeError, match=r"rotary must be a pyattn.Rotary, got NoneType"):
        pyattn.apply_rotary(q, q, None)
    with pytest.raises(ValueError, match="k must have the sizes of q"):
        pyattn.apply_rotary(q, z(2, 4, 7, 4), rotary)
    with pytest.raises(ValueError, match=r"q must have shape \[B, H, L, D\]"):
        pyattn.apply_rotary(q[0], q, rotary)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 19\]"):
        pyattn.apply_rotary(q, q, rotary, torch.arange(15, 21))


def test_the_op_itself_checks_positions():
    spec, t = ProjectionSpec(1), ProjectionTensors(z(1, 1, 3, 4), z(4, 4), cos=TABLE, sin=TABLE)
    with pytest.raises(ValueError, match="positions must lie in"):
        torch.ops.pyattn.projection(*t._replace(positions=torch.tensor([[0, 5, 20]])), *spec, False, "auto")
