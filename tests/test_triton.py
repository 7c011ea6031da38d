"""The Triton backend: on a GPU if there is one (``pytest -m gpu``), otherwise in Triton's interpreter.

In the interpreter an operation takes the same time whatever its size, so a case of ``make test`` is small, with small
tiles; ``make test-all`` runs the cases as they are.
"""

from __future__ import annotations

import functools

import pytest
import torch
from gpu_kernels import DEVICE, GPU, ON_GPU, Kernels, triton_tiles
from mutants import load_mutant

import pyattn
from pyattn import dispatch
from pyattn.testing import CASES, DTYPES, Case, check_case, make_inputs, run

pytest.importorskip("triton")
from pyattn.backends import triton as backend

pytestmark = GPU
BY_NAME = {case.name: case for case in CASES}
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_some_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def small(case):
    """The same features, three tiles long."""
    return case.small(longest=48, head_dim_step=4)


@pytest.fixture
def small_tiles():
    with Kernels("triton", torch.float32).at_work():
        yield


def check(case, dtype):
    Kernels("triton", dtype).check(case)


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
    return functools.partial(load_mutant, monkeypatch, tmp_path)


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


# ---- how it is computed ------------------------------------------------------------------------------------


@by_some_dtype
@pytest.mark.parametrize("mask", [None, "float"])
def test_more_rows_than_one_tile_of_16(mask, dtype):
    """float32 and masks take several tiles of 16 rows: one of 64 rows does not fit every GPU."""
    case = Case("rows", B=1, Hq=8, Hkv=1, Lq=5, Lk=90, D=16, causal=True, mask=mask)
    kwargs = make_inputs(case, dtype, DEVICE)
    with backend.use_tiles(decode=triton_tiles()["decode"]):
        plan = str(pyattn.explain(**kwargs, backend="triton"))
        check_case(Kernels("triton", dtype).results(kwargs), case, dtype)
    rows = 16 if mask or dtype == torch.float32 else 64
    assert f"parts of 32 keys, tiles of {rows} rows" in plan


def test_products_of_float32_are_exact_unless_torch_allows_tf32():
    assert backend.precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert backend.precision(torch.float32) == "tf32"
        assert backend.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


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
