"""The Triton backend: on a GPU if there is one (``pytest -m gpu``), otherwise in Triton's interpreter.

In the interpreter an operation takes the same time whatever its size, so a case of ``make test`` is small, with small
tiles; ``make test-all`` runs the cases as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import pyattn
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
    to_pages,
)

pytest.importorskip("triton")
from pyattn.backends import triton as backend
from pyattn.kernels.launch import Tiles

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if ON_GPU:
    pytestmark = pytest.mark.gpu

# Not square, so that rows taken for keys show; several parts of the keys.
SMALL_TILES = {
    "forward": Tiles(32, 16, 4, 1),
    "decode": Tiles(16, 16, 4, 1, SPLIT=32),
    "dkdv": Tiles(16, 32, 4, 1),
    "dq": Tiles(32, 16, 4, 1),
}
BY_NAME = {case.name: case for case in CASES}
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_some_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def small(case):
    """The same features, three tiles long."""
    return case.small(longest=48, head_dim_step=4)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(backend, "DECODE_ROWS", 8)
    with backend.use_tiles(**SMALL_TILES):
        yield


def results(kwargs, through=(), grads=None):
    return forward_and_gradients(kwargs, lambda k: run(k, backend="triton", return_lse=True), through, grads)


def check(case, dtype):
    """Forward and gradients, if the backend computes the case."""
    through = OUTPUTS if case.differentiable else ()
    kwargs = make_inputs(case, dtype, DEVICE, requires_grad=case.differentiable)
    if reasons := dispatch.why_not(pyattn.explain(**kwargs).problem, "triton"):
        assert max(case.D, case.Dv or 0) > backend.MAX_HEAD_DIM, reasons  # skips hide no hole
        pytest.skip("; ".join(reasons))
    check_case(results(kwargs, through), case, dtype, through)


# ---- conformance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_small(index, small_tiles):
    check(small(CASES[index]), DTYPES[index % len(DTYPES)])


@pytest.mark.exhaustive
@by_dtype
@pytest.mark.parametrize("case", CASES)
def test_case(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("head_dim", [2, 17, 96, 160, 256])
def test_head_dims(head_dim, small_tiles):
    check(Case("head dim", B=1, Hq=2, Hkv=1, Lq=20, Lk=40, D=head_dim, Dv=head_dim - 1, causal=True), torch.float32)


def test_every_case_up_to_head_dim_256_is_computed():
    for case in CASES:
        explanation = pyattn.explain(**make_inputs(case, torch.bfloat16, DEVICE, requires_grad=case.differentiable))
        for op in ("forward", "backward") if case.differentiable else ("forward",):
            problem = explanation.problem._replace(op=op)
            assert bool(dispatch.why_not(problem, "triton")) == (max(case.D, case.Dv or 0) > 256), case.name


# ---- mutants -----------------------------------------------------------------------------------------------

# What is changed, and the case that sees it: file, old text, new text, case.
MUTANTS = {
    "mask off by one": ("tile.py", "m_live = o_n < hi\n", "m_live = o_n <= hi\n", "padding right"),
    "window off by one": ("tile.py", "(o_n >= lo)", "(o_n > lo)", "window, both sides"),
    "missing rescale": ("attention_fwd.py", "b_acc * b_alpha[:, None]", "b_acc", "gqa"),
    "sum not rescaled": ("tile.py", "b_sum * b_alpha + tl.sum", "b_sum + tl.sum", "gqa"),
    "wrong alignment": ("tile.py", "offset = (length - Lq)", "offset = (Lk - Lq)", "padding right"),
    "top-left": ("tile.py", "offset = (length - Lq)", "offset = (length - length)", "gqa"),
    "dropped tile": ("tile.py", "return n_full, n_left, n_left + n_right", "return n_full, n_left, n_left", "gqa"),
    "wrong philox counter": ("tile.py", "o_h + zero, sample.i_b + zero", "sample.i_b + zero, o_h + zero", "dropout"),
    "philox of another tile": ("tile.py", "start_n // 8 + tl.arange", "tl.arange", "dropout"),
    "wrong key head": ("attention_fwd.py", "i_kh = i_head // GROUP", "i_kh = i_head % (Hq // GROUP)", "gqa"),
    "scale 0.2% off": ("launch.py", "else scale * _LOG2E", "else scale * _LOG2E * 1.002", "gqa"),
    "part forgotten": (
        "attention_decode.py",
        "top = tl.max(b_max, 0)",
        "num_splits -= 1\n    top = tl.max(b_max, 0)",
        "decode",
    ),
    "page off by one": ("tile.py", "o_row = (o_n % PAGE_SIZE)", "o_row = ((o_n + 1) % PAGE_SIZE)", "paged"),
    "no gradient of lse": ("attention_bwd.py", "b_delta -= tl.load", "b_delta += 0 * tl.load", "gqa"),
    "group's other heads": ("attention_bwd.py", "range(n * GROUP)", "range(n)", "gqa"),
    "sign of the scale": (
        "attention_bwd.py",
        '"grad_scale": abs(spec.scale)',
        '"grad_scale": spec.scale',
        "scale negative",
    ),
    "no derivative of softcap": ("tile.py", "b_slope = 1.0 - b_tanh * b_tanh", "b_slope = 1.0", "softcap"),
    "mask's samples": (
        "attention_bwd.py",
        "tl.where(mask_B == 1, B, 1)",
        "tl.where(mask_B == 1, 1, 1)",
        "tiles, float mask 1HQK",
    ),
}


@pytest.fixture
def mutate(monkeypatch, tmp_path):
    """Loads the kernels with a text replaced in one file, and gives them to the backend."""
    folder = Path(importlib.util.find_spec("pyattn.kernels").origin).parent

    def load(file, old, new):
        names = ["launch", "tile", "attention_fwd", "attention_decode", "attention_bwd"]
        for name in names:
            text = (folder / f"{name}.py").read_text()
            if file == f"{name}.py":
                assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
                text = text.replace(old, new)
            path = tmp_path / f"{name}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(f"pyattn.kernels.{name}", path)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, spec.name, module)
            monkeypatch.setattr(pyattn.kernels, name, module)
            spec.loader.exec_module(module)
            if name.startswith("attention"):
                monkeypatch.setattr(backend, name, module)

    return load


@pytest.mark.parametrize("name", dict.fromkeys(case for *_, case in MUTANTS.values()))
def test_what_the_mutants_are_held_to_passes(name, mutate, small_tiles):
    mutate("tile.py", "LOG2E = ", "LOG2E  = ")  # changes nothing
    check(small(BY_NAME[name]), torch.float32)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, mutate, small_tiles):
    file, old, new, case = MUTANTS[mutant]
    mutate(file, old, new)
    with pytest.raises(AssertionError, match=r"error|differ|infinite|NaN"):
        check(small(BY_NAME[case]), torch.float32)


# ---- the same bits, whatever lies around -------------------------------------------------------------------


def assert_same_bits(actual, expected):
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), f"{name}: {int((x != expected[name]).sum())} elements differ"


@by_some_dtype
@pytest.mark.parametrize("length", [4, 40], ids=["decode", "forward"])
def test_bits_of_a_sample_do_not_depend_on_its_batch(length, dtype, small_tiles):
    case = Case("batch", B=2, Hq=2, Hkv=1, Lq=length, Lk=50, D=16, causal=True, mask="float", mask_shape="B1QK",
                kv_lengths=(50, 37))  # fmt: skip
    kwargs = make_inputs(case, dtype, DEVICE, requires_grad=True)
    batch = results(kwargs, OUTPUTS)
    assert_same_bits(results(kwargs, OUTPUTS), batch)
    grads = random_grads(batch)
    for b in range(case.B):
        sample = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        alone = results(sample, OUTPUTS, {name: x[b : b + 1] for name, x in grads.items()})
        assert_same_bits(alone, {name: x[b : b + 1] for name, x in batch.items()})


@by_some_dtype
@pytest.mark.parametrize("length", [2, 40], ids=["decode", "forward"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_pages_do_not_change_the_bits(page_size, length, dtype, small_tiles):
    """Wherever they lie, and whatever lies in the pages, and stands in the table, past the lengths."""
    case = Case("pages", B=2, Hq=4, Hkv=2, Lq=length, Lk=90, D=16, Dv=24, causal=True, kv_lengths=(90, 41))
    kwargs = make_inputs(case, dtype, DEVICE)
    assert_same_bits(results(to_pages(kwargs, page_size)), results(kwargs))


@by_some_dtype
def test_packed_sequences_are_the_sequences_one_by_one(dtype, small_tiles):
    lengths = ((1, 30), (33, 40), (0, 5), (7, 9), (20, 0), (16, 16))
    case = Case("packed", Hq=4, Hkv=2, D=24, packed=lengths, causal=True, alibi=True, softcap=5.0)
    kwargs = make_inputs(case, dtype, DEVICE, requires_grad=True)
    packed = results(kwargs, OUTPUTS)
    grads = random_grads(packed)
    cu_q, cu_k = (kwargs[f"cu_seqlens_{side}"].tolist() for side in "qk")
    for b in range(len(lengths)):
        q, k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = kwargs | {"cu_seqlens_q": torch.tensor([0, lengths[b][0]], dtype=torch.int32, device=DEVICE)}
        alone["cu_seqlens_k"] = torch.tensor([0, lengths[b][1]], dtype=torch.int32, device=DEVICE)
        for name, part in (("query", q), ("key", k), ("value", k)):
            alone[name] = kwargs[name].detach()[part].requires_grad_()
        single = results(alone, OUTPUTS, {"out": grads["out"][q], "lse": grads["lse"][:, q]})
        assert torch.equal(packed["lse"][:, q], single["lse"])
        for name, part in (("out", q), ("grad of query", q), ("grad of key", k), ("grad of value", k)):
            assert torch.equal(packed[name][part], single[name]), f"{name} of sequence {b}"


def test_few_packed_queries_are_split(small_tiles):
    """Who says how long the longest sequence is gets the kernel of few queries."""
    case = Case("decode", Hq=4, Hkv=2, D=16, packed=((1, 60), (2, 33), (0, 9), (2, 70)), causal=True, sinks=True)
    kwargs = make_inputs(case, torch.float32, DEVICE, requires_grad=True)
    with_lengths = kwargs | {"max_seqlen_q": 2, "max_seqlen_k": 70}
    assert "parts of 32 keys" in str(pyattn.explain(**with_lengths, backend="triton"))
    check_case(results(with_lengths, OUTPUTS), case, torch.float32, OUTPUTS)


@by_some_dtype
@pytest.mark.parametrize("mask", [None, "float"])
def test_more_rows_than_one_tile_of_16(mask, dtype):
    """float32 and masks take several tiles of 16 rows: one of 64 rows does not fit every GPU."""
    case = Case("rows", B=1, Hq=8, Hkv=1, Lq=5, Lk=90, D=16, causal=True, mask=mask)
    kwargs = make_inputs(case, dtype, DEVICE)
    with backend.use_tiles(decode=SMALL_TILES["decode"]):
        plan = str(pyattn.explain(**kwargs, backend="triton"))
        check_case(results(kwargs), case, dtype)
    rows = 16 if mask or dtype == torch.float32 else 64
    assert f"parts of 32 keys, tiles of {rows} rows" in plan


LAYOUTS = {
    "BLHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": lambda x: torch.stack([x, x * torch.nan], -1)[..., 0],
    "expanded rows": lambda x: x[:, :, :1].expand_as(x),
    "sliced": lambda x: torch.cat([x * torch.nan, x, x * torch.nan], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
}


@by_some_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_the_bits(layout, dtype, small_tiles):
    """Of what comes in, and of the gradients of out and lse as autograd leaves them."""
    change = LAYOUTS[layout]
    kwargs = make_inputs(Case("layout", B=1, Hq=2, Hkv=2, Lq=20, Lk=20, D=12, Dv=20), dtype, DEVICE, requires_grad=True)
    grads = {name: change(x) for name, x in random_grads(results(kwargs)).items()}
    changed = {n: change(kwargs[n].detach()) for n in ("query", "key", "value")}
    dense = {n: x.contiguous().requires_grad_() for n, x in changed.items()}
    changed = {n: x.requires_grad_() for n, x in changed.items()}
    expected = results(kwargs | dense, OUTPUTS, {name: x.contiguous() for name, x in grads.items()})
    assert_same_bits(results(kwargs | changed, OUTPUTS, grads), expected)


# ---- what must not be read, and what must be -----------------------------------------------------------------


@by_some_dtype
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_what_is_not_in_use_never_shows(fill, dtype, small_tiles):
    case = Case("padding", B=2, Hq=2, Hkv=1, Lq=20, Lk=50, D=16, kv_lengths=(50, 13), kv_starts=(17, 3))
    kwargs = make_inputs(case, dtype, DEVICE, requires_grad=True)
    keys = torch.arange(case.Lk, device=DEVICE)
    unused = (keys < kwargs["kv_starts"][:, None]) | (keys >= kwargs["kv_lengths"][:, None])
    unused = unused[:, None, :, None]
    poisoned = {n: kwargs[n].detach().masked_fill(unused, fill).requires_grad_() for n in ("key", "value")}
    actual = results(kwargs | poisoned, OUTPUTS)
    assert_same_bits(actual, results(kwargs, OUTPUTS))
    for name in ("grad of key", "grad of value"):
        assert not actual[name][unused.expand_as(actual[name])].any()


def test_lengths_out_of_range_lead_nowhere(monkeypatch, small_tiles):
    """Their values are not looked at on a device: the kernels clamp them."""
    monkeypatch.setattr("pyattn.ops.check_values", lambda *args: None)
    kwargs = make_inputs(Case("lengths", B=2, Hq=2, Hkv=2, Lq=20, Lk=33, D=16, causal=True), torch.float32, DEVICE)
    wrong = {"kv_lengths": [99, -5], "kv_starts": [-7, 2**30], "q_offset": [2**62, -(2**62)]}
    clamped = {"kv_lengths": [33, 0], "kv_starts": [0, 33], "q_offset": [2**40, -(2**40)]}
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        a, b = ({n: torch.tensor([min(max(v, info.min), info.max) for v in x]).to(DEVICE, dtype)
                 for n, x in values.items()} for values in (wrong, clamped))  # fmt: skip
        for name in wrong:
            assert_same_bits(results(kwargs | {name: a[name]}), results(kwargs | {name: b[name]}))
    packed = make_inputs(Case("packed", Hq=2, Hkv=2, D=16, packed=((20, 20), (13, 13))), torch.float32, DEVICE)
    for values in ([0, 99, 33], [-5, 20, 33], [0, 25, 20], [-(2**31), 2**31 - 1, 0]):
        cu_seqlens = torch.tensor(values, dtype=torch.int32, device=DEVICE)
        results(packed | {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens})


@pytest.mark.parametrize("q_offset", [2**40, -(2**40), 2**62, -(2**62)])
@pytest.mark.parametrize("window", [(2**40, None), (2**62, 2**62), (None, 2**40), (3, 2**62)])
def test_far_offsets_and_windows(window, q_offset, small_tiles):
    check(Case("far", B=1, Hq=1, Hkv=1, Lq=5, Lk=20, D=8, window=window, q_offset=q_offset), torch.float32)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"Lq": 0}, {"Lk": 0}, {"Hq": 0, "Hkv": 0}], ids=str)
def test_nothing_to_do(sizes, small_tiles):
    case = Case("empty", **({"B": 2, "Hq": 2, "Hkv": 2, "Lq": 20, "Lk": 20, "D": 16} | sizes))
    kwargs = make_inputs(case, torch.float32, DEVICE, requires_grad=True)
    for name, x in results(kwargs, OUTPUTS).items():
        assert not x.any() or (name == "lse" and (x == -torch.inf).all())


def test_finite_biases_of_any_size(small_tiles):
    """A row of the lowest number gives the mean of the values, as in torch; so do its gradients stay finite."""
    kwargs = make_inputs(Case("bias", B=1, Hq=1, Hkv=1, Lq=3, Lk=20, D=8), torch.float32, DEVICE, requires_grad=True)
    for bias in (torch.finfo(torch.float32).min, -1e38, 1e38, -1e9):
        mask = torch.full((3, 20), bias, device=DEVICE)
        actual = results(kwargs | {"attn_mask": mask}, OUTPUTS)
        mean = kwargs["value"].mean(2, keepdim=True).expand_as(actual["out"])
        if abs(bias) > 1e30:  # beside it the scores are lost in rounding
            torch.testing.assert_close(actual["out"], mean)
        assert all(x.isfinite().all() for x in actual.values())


# ---- torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "float mask", "packed", "paged"])
def test_opcheck(name, small_tiles):
    case = dataclasses.replace(BY_NAME[name].small(), Hq=2, Hkv=1)
    kwargs = make_inputs(case, torch.float32, DEVICE, requires_grad=case.differentiable)
    prepare = functional._dense if case.packed is None else functional._packed
    spec, tensors = prepare(**kwargs)
    torch.library.opcheck(torch.ops.pyattn.attention_forward.default, (*tensors, *spec, "triton"))


def test_compile(small_tiles):
    kwargs = make_inputs(small(BY_NAME["gqa"]), torch.float32, DEVICE, requires_grad=True)
    compiled = torch.compile(lambda k: run(k, backend="triton", return_lse=True), backend="aot_eager")
    torch._dynamo.reset()
    actual = forward_and_gradients(kwargs, compiled)
    assert_same_bits(actual, results(kwargs, OUTPUTS))


def test_products_of_float32_are_exact_unless_torch_allows_tf32():
    assert backend._precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert backend._precision(torch.float32) == "tf32"
        assert backend._precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_cuda_graph():
    kwargs = make_inputs(Case("graph", Lq=1, Lk=3000, Hkv=2, causal=True), torch.bfloat16, DEVICE)
    run(kwargs, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(kwargs, backend="triton")
    kwargs["query"].mul_(0.5)
    graph.replay()
    assert torch.equal(out, run(kwargs, backend="triton"))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_current_stream():
    kwargs = make_inputs(BY_NAME["causal"], torch.bfloat16, DEVICE)
    expected = run(kwargs, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        late["query"].zero_()
        torch.cuda._sleep(10_000_000)
        late["query"].copy_(kwargs["query"])
        out = run(late, backend="triton")
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device():
    kwargs = make_inputs(BY_NAME["causal"], torch.bfloat16, "cuda:1")
    check_case({"out": run(kwargs, backend="triton")}, BY_NAME["causal"], torch.bfloat16)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_nothing_is_compiled_again_because_a_length_changed():
    from pyattn.kernels import attention_fwd

    kernel = attention_fwd._attention_fwd_kernel
    lengths = [*range(65, 90), 128, 256, 1000, 1024, 4097]
    counts = []
    for length in lengths:
        run(make_inputs(Case("length", Lq=length, Lk=length, causal=True), torch.bfloat16, DEVICE), backend="triton")
        counts.append(len(kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] == counts[-1]
