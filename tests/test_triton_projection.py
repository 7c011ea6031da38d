"""Projections by the Triton kernels: on a GPU if there is one (``pytest -m gpu``), otherwise interpreted.

Everything is held to the reference in both ways of a forward: fused, and with torch's product.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import projection_cases
import pytest
import torch
from gpu_kernels import DEVICE, GPU, ON_GPU
from mutants import load_mutant
from projection_cases import CASES, ProjectionCase, make, prepare, results
from recorded import BENCHMARKS

import pyattn
from pyattn import dispatch, projection_ops, reference_projection
from pyattn.spec import ProjectionProblem, ProjectionSpec, ProjectionTensors
from pyattn.testing import DTYPES, assert_close, check_results

pytest.importorskip("triton")
from pyattn.backends.triton import projection as backend
from pyattn.kernels.launch import block_dim
from pyattn.kernels.projection import ProjectionTiles, product_tiles

pytestmark = GPU
WAYS = ["fused", "split"]
SMALL = ProjectionTiles(32, 32, 16, num_warps=4, num_stages=1)
# Several heads a tile, several tiles of rows in a group and more than a group, and a rest of everything.
LARGE = [
    ProjectionCase("tiles", heads=(8, 4, 4), D=32, L=170, B=1, E=72, norms="qk", R=32),
    ProjectionCase("tiles, part", heads=(4, 4, 4), D=16, L=45, B=4, E=40, norms="qk", R=8, positions="per token"),
    ProjectionCase("tiles, output", D=200, E=96, D_in=32, L=75, B=2, residual=True),
    ProjectionCase("tiles, output, odd", D=130, E=90, D_in=18, L=75, B=2, residual=True, layout="BLHD"),
    ProjectionCase("one token", heads=(2, 2, 2), D=64, L=1, B=1, E=100, norms="qk", R=64),
    ProjectionCase("head of 256", heads=(2, 1, 1), D=256, L=9, E=24, norms="k", R=256, interleaved=True),
    ProjectionCase("wide heads", heads=(2, 1, 1), D=300, L=9, E=24, norms="qk", R=48),
    ProjectionCase("one wide head", heads=(1, 0, 0), D=600, L=9, E=24, norms="q"),
]
BY_NAME = {case.name: case for case in CASES + LARGE}
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_way = pytest.mark.parametrize("way", WAYS)


def small_rows_tiles(head_dim):
    return ProjectionTiles(32, block_dim(head_dim), 0, num_warps=4, num_stages=1)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(backend.kernels, "rows_tiles", small_rows_tiles)
    with backend.use(tiles=SMALL):
        yield


def check(case, dtype):
    projection_cases.check(case, dtype, "triton", device=DEVICE)


# ---- conformance -------------------------------------------------------------------------------------------


def check_in_one_type(case, way):
    """In one dtype after the other, so that each is seen in both ways."""
    with backend.use(way):
        check(case, DTYPES[(list(BY_NAME).index(case.name) + WAYS.index(way)) % len(DTYPES)])


@pytest.mark.parametrize("case", CASES, ids=str)
@by_way
def test_case_in_small_tiles(way, case, small_tiles):
    check_in_one_type(case, way)


@pytest.mark.parametrize("case", LARGE, ids=str)
@by_way
def test_larger_case(way, case):
    check_in_one_type(case, way)


@pytest.mark.exhaustive
@by_dtype
@pytest.mark.parametrize("tiles", [None, SMALL, ProjectionTiles(32, 64, 32, 4, 2)], ids=["default", "small", "32x64"])
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
@by_way
def test_case(way, case, tiles, dtype):
    with backend.use(way, tiles):
        check(case, dtype)


REAL = [
    ProjectionCase("model", heads=(16, 16, 16), D=128, L=700, B=2, E=2048, norms="qk", R=128),
    ProjectionCase("model, gqa", heads=(32, 8, 8), D=64, L=1111, B=1, E=1000, R=64, interleaved=True),
    ProjectionCase("model, part", heads=(8, 8, 8), D=128, L=300, B=1, E=1024, norms="qk", R=32),
    ProjectionCase("model, output", D=2048, E=2048, D_in=128, L=700, B=2, residual=True),
    ProjectionCase("model, few tokens", heads=(16, 2, 2), D=128, L=1, B=3, E=2048, norms="qk", R=128),
]


@pytest.mark.skipif(not ON_GPU, reason="the tiles of real sizes take a GPU")
@by_dtype
@pytest.mark.parametrize("case", REAL, ids=str)
@by_way
def test_case_of_real_size(way, case, dtype):
    with backend.use(way):
        check(case, dtype)


# ---- layouts, edges and what surrounds the tensors ---------------------------------------------------------


def surrounded(x):
    """The same values, not contiguous, amidst NaN: in front, behind, and between the rows."""
    shape = [n + 3 for n in x.shape[:-1]] + [x.shape[-1] + 24]
    inner = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    for dim, n in enumerate(x.shape):
        inner = inner.narrow(dim, 8 if dim == x.dim() - 1 else 1, n)
    return inner.copy_(x.detach()).requires_grad_(x.requires_grad)


def check_surrounded(case, dtype):
    kwargs = make(case, dtype, requires_grad=True, device=DEVICE)
    kwargs |= {
        name: surrounded(x) for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if "rotary" in kwargs:
        kwargs["rotary"] = kwargs["rotary"]._replace(cos=surrounded(kwargs["rotary"].cos))
    check_results(results(case, kwargs, dtype, "triton"), *projection_cases.expected(case, dtype, device=DEVICE))


@pytest.mark.parametrize("name", ["everything, interleaved", "rotary, part", "odd head", "output, residual"])
@by_way
def test_what_lies_around_a_tensor_never_shows(way, name, small_tiles):
    with backend.use(way):
        check_surrounded(BY_NAME[name], torch.float32)


@by_way
def test_transposed_vectors_and_residual(way, small_tiles):
    """Last strides other than 1 where kernels want 1."""
    case = BY_NAME["output, residual"]
    kwargs = make(case, torch.float32, requires_grad=True, device=DEVICE)
    for name in ("residual", "weight", "attn_out"):
        kwargs[name] = kwargs[name].detach().mT.contiguous().mT.requires_grad_()
    kwargs["bias"] = kwargs["bias"].detach().repeat_interleave(2)[::2].requires_grad_()
    with backend.use(way):
        found = results(case, kwargs, torch.float32, "triton")
    check_results(found, *projection_cases.expected(case, torch.float32, device=DEVICE))


@by_way
def test_expanded_gradients_and_positions(way, small_tiles):
    case = BY_NAME["everything, interleaved"]
    kwargs = make(case, torch.float32, requires_grad=True, device=DEVICE)
    kwargs["positions"] = torch.arange(case.L, dtype=torch.int32, device=DEVICE)[None].expand(case.B, -1)

    def gradients(backend):
        outputs = projection_cases.call(case, kwargs, backend)
        wanted = [kwargs[name] for name in ("x", "weight", "q_norm")]
        return *outputs.values(), *torch.autograd.grad(sum(x.sum() for x in outputs.values()), wanted)

    with backend.use(way):
        actual = gradients("triton")
    torch.testing.assert_close(actual, gradients("reference"), atol=2e-5, rtol=1e-5)


@by_dtype
@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (2, 5, 0)])
@by_way
def test_nothing_to_do(way, shape, dtype):
    x = torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.randn(32, shape[2], dtype=dtype, device=DEVICE, requires_grad=True)
    bias, norm = torch.randn(32, dtype=dtype, device=DEVICE), torch.randn(4, device=DEVICE, requires_grad=True)
    with backend.use(way):
        q, k, v = pyattn.qkv_projection(
            x, weight, bias, num_heads=4, num_kv_heads=2, q_norm=norm, eps=0.0, backend="triton"
        )
        assert q.shape == (*shape[:1], 4, shape[1], 4)
        if q.numel():
            assert torch.equal(v.transpose(1, 2).flatten(2), bias[24:].expand(2, 5, 8))
        (k.sum() + v.sum()).backward()
        out = pyattn.output_projection(q.detach(), q.new_ones(7, 16), q.new_ones(7), backend="triton")
    assert weight.grad.shape == weight.shape and not weight.grad.any() and not norm.grad.any()
    assert x.grad.shape == x.shape and out.shape == (*shape[:2], 7)


def test_norm_without_eps(small_tiles):
    """In the rows of a tile beyond the last token the norm would divide by zero."""
    case = ProjectionCase("no eps", norms="qk", eps=0.0, L=19, B=1)
    check(case, torch.float32)


def buffer(n, tmp_path):
    """Memory of n elements of which hardly any is touched: on the CPU a file with a hole."""
    if ON_GPU:
        return torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
    return torch.from_file(str(tmp_path / "hole"), shared=True, size=n, dtype=torch.bfloat16)


@by_way
def test_offsets_beyond_32_bits(way, small_tiles, tmp_path):
    """Of the third row of x, of the weight and of the gradient of q."""
    E, step = 16, 2**30 if ON_GPU else 2**31  # the interpreter knows nothing of the strides' declared types
    memory = buffer(3 * step, tmp_path)
    far = memory.as_strided((3, 3 * E), (step, 1))
    far.copy_(torch.randn(3, 3 * E))
    x, weight, grad = far.split(E, 1)  # [3, E] each
    spec = ProjectionSpec(1, 1, 1)
    table = torch.randn(3, 1, device=DEVICE)
    t = ProjectionTensors(
        x[None, None], weight, q_norm=torch.ones(1, device=DEVICE), cos=table[:, :0], sin=table[:, :0]
    )
    near = t._replace(x=t.x.clone(), weight=weight.clone())
    grads = (grad[None, None, :, :1], *(grad[None, None, :, :1].clone() for _ in range(2)))
    with backend.use(way):
        *heads, saved = backend.projection(spec, t, True)
        for actual, truth in zip(heads, reference_projection.projection(spec, near, False), strict=False):
            torch.testing.assert_close(actual, truth)
        found = backend.projection_backward(spec, t, saved, grads, (True, True, False))
    expected = reference_projection.projection_backward(
        spec, near, saved, tuple(grad.clone() for grad in grads), (True, True, False)
    )
    torch.testing.assert_close(found, expected)
    turned = backend.rotary(spec, ProjectionTensors(x[None, None], cos=table, sin=table), False)
    expected = reference_projection.rotary(spec, ProjectionTensors(near.x, cos=table, sin=table), False)
    torch.testing.assert_close(turned, expected)


@by_way
def test_what_is_saved(way, small_tiles):
    """The heads of q and k before norm and rotary, as the op promises."""
    for name in ("everything, interleaved", "norm of k", "q alone", "output"):
        spec, t = prepare(BY_NAME[name], make(BY_NAME[name], torch.float32, device=DEVICE))
        with backend.use(way):
            *_, saved = torch.ops.pyattn.projection(*t, *spec, True, "triton")
        *_, truth = torch.ops.pyattn.projection(*t, *spec, True, "reference")
        assert saved.is_contiguous()
        torch.testing.assert_close(saved, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["everything, interleaved", "output, residual"])
@by_way
def test_opcheck(way, name):
    torch.use_deterministic_algorithms(False)  # opcheck compares what nobody has written, too
    case = dataclasses.replace(BY_NAME[name], heads=(1, 1, 1), B=1, L=3)
    spec, t = prepare(case, make(case, torch.float32, device=DEVICE))
    with backend.use(way):
        torch.library.opcheck(torch.ops.pyattn.projection, (*t, *spec, True, "triton"))
        q, k, v, saved = torch.ops.pyattn.projection(*t, *spec, True, "triton")
        arguments = (*t, *spec, saved, q, k, v, [True, True, False], "triton")
        torch.library.opcheck(torch.ops.pyattn.projection_backward, arguments)


@by_way
def test_the_same_bits_again_and_in_a_larger_batch(way, small_tiles):
    case = ProjectionCase("rows", L=50, B=1, heads=(4, 2, 2), norms="qk", R=16)
    kwargs = make(case, torch.bfloat16, requires_grad=True, device=DEVICE)
    with backend.use(way):
        once, again = (results(case, kwargs, torch.bfloat16, "triton") for _ in range(2))
        part = projection_cases.call(case, kwargs | {"x": kwargs["x"][:, :17]}, "triton")
    for name, x in once.items():
        assert torch.equal(again[name], x), name
    if way == "fused":  # torch chooses among products by their sizes
        for name, x in part.items():
            assert torch.equal(once[name][:, :, :17], x), name


# ---- rotary alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("layout", "D", "R", "dtype"),
    [
        ("BHLD", 40, 24, torch.float32),
        ("BLHD", 40, 24, torch.bfloat16),
        ("BLHD", 64, 64, torch.float16),
        ("BHLD", 33, 32, torch.bfloat16),
    ],
)
def test_apply_rotary(layout, D, R, interleaved, dtype, small_tiles):
    """Turned, and its gradient, which is turned back."""
    shape = (2, 2, 45, D) if layout == "BHLD" else (2, 45, 2, D)
    q, grad = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    q, grad = (x.transpose(1, 2) if layout == "BLHD" else x for x in (q, grad))
    angles = torch.outer(torch.arange(100.0, device=DEVICE), 100 ** -torch.linspace(0, 1, R // 2, device=DEVICE))
    rotary = pyattn.Rotary(angles.cos(), angles.sin(), interleaved)
    positions = torch.randint(0, 100, (2, 45), device=DEVICE)

    def turned(x, dtype, name):
        x, g = x.to(dtype).requires_grad_(), grad.to(dtype)
        out, other = pyattn.apply_rotary(x, x[:, :1], rotary, positions, backend=name)
        assert out.stride() == x.stride() and torch.equal(other, out[:, :1])
        return out.detach(), *torch.autograd.grad(out, x, g)

    for actual, emulated, truth in zip(
        turned(q, dtype, "triton"), turned(q, dtype, "reference"), turned(q, torch.float64, "reference"), strict=True
    ):
        assert_close(actual, [emulated], truth)


def test_positions_that_are_not_in_the_table_are_those_at_its_ends():
    """Nothing beyond it is read. On a CPU the op refuses them before a kernel sees them."""
    x, table = torch.randn(1, 2, 4, 6, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    positions = torch.tensor([[-7, 4, 5, 2**40]], device=DEVICE)
    t = ProjectionTensors(x, cos=table, sin=table, positions=positions)
    torch.testing.assert_close(
        backend.rotary(ProjectionSpec(0), t, False), reference_projection.rotary(ProjectionSpec(0), t, False)
    )


# ---- how it is computed ------------------------------------------------------------------------------------


def plan(case, dtype=torch.bfloat16, op="forward"):
    spec, t = prepare(case, make(case, dtype, device=DEVICE))
    problem = ProjectionProblem.of(op, spec, t)
    assert not dispatch.why_not(problem, "triton")
    return backend.describe(problem)


def test_the_way_is_explained():
    case, deep = BY_NAME["gqa"], ProjectionCase("deep", L=backend.FEW_ROWS, E=backend.FUSED_DEPTH + 1)
    assert plan(case).startswith("product and epilogue in tiles of ")
    assert plan(deep).startswith("product by torch, epilogue in tiles of 64 tokens x 16 columns")
    assert plan(case, torch.float32).startswith("product by torch, epilogue in ")
    assert plan(BY_NAME["wide heads"]).startswith("product by torch, epilogue in tiles of 8 tokens x 512 columns")
    sizes = [(4096, 2048), (16384, 1024), (16384, 2048), (4096, 4096), (512, 4096)]  # as measured
    ways = [backend.way(torch.bfloat16, *size, 128, False) for size in sizes]
    assert ways == ["fused", "fused", "split", "split", "fused"]
    with backend.use("split"):
        assert plan(case).startswith("product by torch, epilogue in ") and plan(BY_NAME["output"]) == "product by torch"
    with backend.use("fused", SMALL):
        assert plan(deep) == "product and epilogue in tiles of 32 tokens x 32 columns x 16 deep, 4 warps, 1 stages"
        assert plan(BY_NAME["wide heads"]).startswith("product by torch")  # no tile holds a whole one
    assert plan(case, op="backward") == "epilogue in tiles of 64 tokens x 16 columns, 4 warps; products by torch"
    rotary = ProjectionProblem.of(
        "rotary", ProjectionSpec(0), ProjectionTensors(torch.empty(1, 2, 3, 128, device=DEVICE))
    )
    assert backend.describe(rotary) == "rotary alone, tiles of 32 tokens x 128 columns, 4 warps"
    kwargs = make(case, torch.bfloat16, device=DEVICE)
    explained = str(pyattn.explain_projection(**kwargs, num_heads=4, num_kv_heads=2, backend="triton"))
    assert "forward  triton     chosen  product and epilogue in tiles of" in explained


@pytest.mark.parametrize("way", WAYS)
def test_the_way_that_is_explained_is_gone(way, monkeypatch):
    launched = []
    monkeypatch.setattr(backend.triton, "start", lambda kind, launches, *_: launched.extend(launches()))
    case = BY_NAME["gqa"]
    with backend.use(way):
        projection_ops.projection(*prepare(case, make(case, torch.bfloat16, device=DEVICE)), "triton")
    kernel = {"fused": "_projection_fwd_kernel", "split": "_projection_epilogue_kernel"}[way]
    assert [launch.kernel.__name__ for launch in launched] == [kernel]


def test_what_it_cannot_has_reasons():
    def reasons(case, dtype=torch.float32):
        kwargs = make(case, dtype, device=DEVICE)
        return dispatch.why_not(ProjectionProblem.of("forward", *prepare(case, kwargs)), "triton")

    assert reasons(BY_NAME["gqa"], torch.float64) == ("computes in float32, the input is float64",)
    elsewhere = ProjectionTensors(torch.empty(1, 1, 3, 4, device="meta"), torch.empty(6, 4, device="meta"))
    assert (
        "these are on meta"
        in dispatch.why_not(ProjectionProblem.of("forward", ProjectionSpec(3), elsewhere), "triton")[0]
    )
    wide = ProjectionCase("too wide", heads=(1, 1, 1), D=1025, E=4)
    assert reasons(wide) == ("D must lie in [1, 1024], it is 1025",)
    assert reasons(ProjectionCase("one matrix", heads=(1, 0, 0), D=1025, E=4)) == ()


def test_tiles_get_smaller_until_there_are_enough_of_them():
    spec, columns = ProjectionSpec(16, 16, 16), 48 * 128
    tiles = [product_tiles("sm_90", torch.bfloat16, rows, columns, spec, False, False)[:2] for rows in (16384, 512, 64)]
    assert tiles == [(128, 256), (128, 128), (32, 128)]
    uneven = product_tiles("sm_90", torch.bfloat16, 16384, 18 * 64, ProjectionSpec(14, 2, 2), False, False)
    assert uneven.BLOCK_N == 128  # two heads: with four k and v would share a tile
    assert product_tiles("sm_90", torch.bfloat16, 4096, 512, ProjectionSpec(2), False, False)[:2] == (64, 256)


@pytest.mark.skipif(ON_GPU, reason="with a GPU it measures")
def test_the_benchmark_says_that_it_needs_a_gpu():
    found = subprocess.run([sys.executable, BENCHMARKS / "gpu_projection.py"], capture_output=True, text=True)
    assert found.returncode == 1 and "torch finds no GPU" in found.stderr


# ---- mutants -----------------------------------------------------------------------------------------------

_TURN = """    if tables.COS is not None:
        if i_head < num_q + num_k:
            b_a, b_b = turn(b_a, b_b, tables, tokens, R, INVERSE, BLOCK_D)
"""
# What is changed, and the case that sees it: file, old text, new text, case. With "NaN around" x has NaN around it.
MUTANTS = {
    "rotary's sign": ("projection_tile.py", "b_b * b_cos + b_a * b_sin", "b_b * b_cos - b_a * b_sin", "rotary"),
    "rotary of v": ("projection_tile.py", _TURN, _TURN.replace("num_k:", "num_k + 1:"), "rotary"),
    "rotary not turned back": ("projection_tile.py", "b_sin = -b_sin", "b_sin = b_sin", "rotary, interleaved"),
    "positions of the first sample": (
        "projection_tile.py",
        "tokens.o_b * tables.stride_pb + o_pos",
        "o_pos",
        "rotary, part, interleaved",
    ),
    "rest of a part": ("projection_tile.py", "tl.where(o_j < HALF, HALF, REST)", "HALF", "rotary, part"),
    "angle of another row": ("projection_tile.py", "tables.max_pos - 1", "tables.max_pos - 9", "rotary, part"),
    "norm's head boundary": (
        "projection_tile.py",
        "if i_head < num_q:\n            b_a, b_b = normalise(b_a, b_b, q_norm",
        "if i_head <= num_q:\n            b_a, b_b = normalise(b_a, b_b, q_norm",
        "many rows",
    ),
    "norm after rotary": (
        "projection_tile.py",
        "    if q_norm is not None:\n",
        _TURN + "        tables = Tables(None, None, None, 0, 0)\n    if q_norm is not None:\n",
        "everything, interleaved",
    ),
    "no eps": ("projection_tile.py", " / D + eps)", " / D)", "norms, eps"),
    "mean over the padding": ("projection_tile.py", " / D + eps)", " / b_a.shape[2] / 2 + eps)", "odd head"),
    "norm's weights swapped": (
        "projection_tile.py",
        "b_a * b_rstd * b_wa, b_b * b_rstd * b_wb",
        "b_a * b_rstd * b_wb, b_b * b_rstd * b_wa",
        "mqa, norms",
    ),
    "k not saved": (
        "projection_tile.py",
        "if i_head < num_q + num_k:\n            store_pairs(saved.p",
        "if i_head < num_q:\n            store_pairs(saved.p",
        "mqa, norms",
    ),
    "samples of another length": ("projection_tile.py", "return o_r // L", "return o_r // (L + 1)", "plain"),
    "bias of the first head": ("projection.py", "o_rows = (o_h * D)[None", "o_rows = (o_h * 0)[None", "plain"),
    "residual of one sample": ("projection.py", "Heads(RESIDUAL, stride_rb", "Heads(RESIDUAL, 0", "output, residual"),
    "heads side by side": ("projection.py", "o_k // D_IN * stride_xh + o_k % D_IN", "o_k", "output"),
    "depth not masked": ("projection.py", "m_m[:, None] & (o_k < depth)", "m_m[:, None]", "NaN around"),
    "tiles beyond the group": ("projection.py", "- i_group * GROUP_M, GROUP_M)", ", GROUP_M) * 0 + GROUP_M", "plain"),
    "no mean in the norm's gradient": ("projection.py", "b_a - b_ya * b_mean", "b_a", "mqa, norms"),
    "one tile's sums": ("projection.py", "i_m.to(tl.int64) * (num_q", "0 * i_m.to(tl.int64) * (num_q", "many rows"),
    "half without weight": ("projection.py", "= b_a * b_wa, b_b * b_wb", "= b_a * b_wa, b_b", "mqa, norms"),
    "gradient of k not normed": ("projection.py", "if (i_head >= num_q) & (", "if (i_head > num_q) & (", "norm of k"),
}  # fmt: skip


@pytest.fixture
def mutate(monkeypatch, tmp_path, small_tiles):
    def load(*replacement):
        load_mutant(monkeypatch, tmp_path, *replacement)
        monkeypatch.setattr(backend.kernels, "rows_tiles", small_rows_tiles)

    return load


def check_mutant(name):
    """What the kernels as they are pass above."""
    if name == "NaN around":
        with backend.use("fused"):
            check_surrounded(BY_NAME["odd head"], torch.float32)
    else:
        check_in_one_type(BY_NAME[name], "fused")


def test_a_mutant_without_a_bug_passes(mutate):
    mutate("projection.py", "GROUP_M = 8", "GROUP_M  = 8")  # changes nothing
    check_mutant("mqa, norms")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, mutate):
    file, old, new, case = MUTANTS[mutant]
    mutate(file, old, new)
    with pytest.raises(AssertionError, match=r"error|differ|infinite|NaN"):
        check_mutant(case)
