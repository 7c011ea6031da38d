"""The CUDA backend: on a GPU if there is one (``pytest -m gpu``), otherwise on the emulator.

The emulator watches every word of shared memory, so a missing wait or barrier fails whatever the order of threads; its
modes change that order all the same: copies that land late, and warps that race ahead.
"""

from __future__ import annotations

import ctypes.util
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import emulator
import pytest
import torch
from gpu_kernels import DEVICE, GPU, MAX_HEAD_DIM, ON_GPU, Kernels, assert_modes_give_the_same_bits, assert_same_bits

import pyattn
from pyattn import dispatch, jit
from pyattn.backends import cuda
from pyattn.backends.cuda import call, hopper, launch
from pyattn.backends.cuda.kernels import LEAST_SHARED_BYTES, SHARED_BYTES, kernel_of, unordered
from pyattn.testing import CASES, OUTPUTS, Case, check_case, make_inputs

if not ON_GPU and not emulator.supported():
    pytest.skip("the emulator runs on x86-64", allow_module_level=True)
pytestmark = GPU
on_emulator = pytest.mark.skipif(ON_GPU, reason="looks at what the emulator sees")
TYPES = (torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in CASES}
COMPUTED = [case for case in CASES if max(case.D, case.Dv or 0) <= MAX_HEAD_DIM]


def check(case, dtype):
    Kernels("cuda", dtype).check(case)


def kernels_of(case):
    """Those that a case asks for."""
    kwargs = make_inputs(case, torch.bfloat16, requires_grad=case.differentiable)
    problem = pyattn.explain(**kwargs).problem
    target = launch.target_of(problem.device)
    launches = list(cuda.forward_plan(problem, target, problem.query.stride, True).launches)
    if case.differentiable:
        sizes = (1, 1, 1, 1) if case.mask and case.mask.startswith("float") else None
        strides = tuple(x.stride for x in (problem.query, problem.query, *problem.tensors[:3]))
        launches += cuda.backward_plan(problem._replace(op="backward"), target, strides, sizes, True, True)
    return {x.kernel for x in launches}


@pytest.fixture(scope="session")
def libraries():
    """All kernels that the cases need, compiled on every core."""
    if ON_GPU:
        return
    with emulator.installed() as gpu:
        kernels = set().union(*(kernels_of(case) for case in COMPUTED))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda kernel: gpu.cubin(kernel.file, kernel.defines, "sm_80"), kernels))


@pytest.fixture(params=[False, True], ids=["late", "racing"])
def racing(request):
    return request.param


@pytest.fixture
def at_work(libraries):
    with Kernels("cuda", torch.bfloat16).at_work(small_tiles=False):
        yield


def configure(racing):
    if not ON_GPU:
        launch.gpu.configure(racing, seed=1)


# ---- conformance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_case(index, at_work):
    """Each case in one type and one mode: neighbours differ in both."""
    configure(racing=bool(index // 2 % 2))
    check(CASES[index], TYPES[index % 2])


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_case(case, dtype, racing, at_work):
    configure(racing)
    check(case, dtype)


@pytest.mark.parametrize("head_dim", [2, 65, 97, 160, 200, 256])
def test_head_dims(head_dim, at_work):
    """Those that are padded, and rows that cannot be copied by 16 bytes."""
    case = Case("head dim", B=1, Hq=2, Hkv=1, Lq=40, Lk=150, D=head_dim, Dv=head_dim - 1, causal=True)
    check(case, torch.float16)


@pytest.mark.parametrize(("D", "Dv"), [(64, 128), (96, 256), (80, 120), (128, 64)])
@pytest.mark.parametrize("queries", [2, 40])
def test_v_head_dims(D, Dv, queries, at_work):
    """What warps along the keys merge in the end takes more shared memory than keys and values where Dv is larger."""
    case = Case("v head dim", B=1, Hq=8, Hkv=4, Lq=queries, Lk=600, D=D, Dv=Dv, causal=True)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
def test_kernels_fit_the_gpu(arch, monkeypatch):
    limit = SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)
    for D, Dv, mask in itertools.product((64, 96, 128, 192, 256), (64, 96, 128, 192, 256), (0, 3)):
        macros = dict.fromkeys(emulator.FLAGS, 0) | {"ROWS": 1, "MASK": mask}
        macros.pop("GRADIENTS")
        kernels = [kernel_of(op, (D, Dv), macros) for op in ("forward", "decode", "tall decode", "dkdv", "dq")]
        assert all(kernel.shared_bytes <= LEAST_SHARED_BYTES for kernel in kernels), (D, Dv)
        both = unordered(kernels[3], (D, Dv), macros, arch)
        assert both is None or both.shared_bytes <= limit
        assert both or (max(D, Dv) > 128 and limit == LEAST_SHARED_BYTES), (D, Dv)


def test_every_case_up_to_head_dim_256_is_computed(at_work):
    for case in CASES:
        kwargs = make_inputs(case, torch.bfloat16, DEVICE, requires_grad=case.differentiable)
        problem = pyattn.explain(**kwargs).problem
        for op in ("forward", "backward") if case.differentiable else ("forward",):
            assert bool(dispatch.why_not(problem._replace(op=op), "cuda")) == (case not in COMPUTED), case.name


def test_unaligned_addresses(at_work):
    """A view that begins in the middle of 16 bytes is copied element by element, and gives the same bits.

    Those of the kernels for sm_80, which alone can do so.
    """
    case = Case("unaligned", B=1, Hq=2, Hkv=1, Lq=70, Lk=140, D=64, causal=True)
    kwargs = make_inputs(case, torch.bfloat16, DEVICE, requires_grad=True)
    moved = dict(kwargs)
    for name in ("query", "key", "value"):
        x = kwargs[name].detach()
        moved[name] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape).requires_grad_()
        assert moved[name].data_ptr() % 16
    kernels = Kernels("cuda", torch.bfloat16)
    with mock.patch.object(hopper, "why_not", lambda *_: ["held to those for sm_80"]), emulator.cleared():
        assert_same_bits(kernels.results(moved, OUTPUTS), kernels.results(kwargs, OUTPUTS))


UNORDERED = [case for case in COMPUTED if case.differentiable and case.name.startswith(("tiles", "packed", "head dim"))]


@pytest.mark.parametrize("case", UNORDERED[::3])
def test_gradients_in_any_order(case, racing, at_work):
    """Blocks add to the query's gradient as they come; the tolerance is the same."""
    torch.use_deterministic_algorithms(False)
    configure(racing)
    kwargs = make_inputs(case, torch.float16, DEVICE, requires_grad=True) | {"deterministic": False}
    if not ON_GPU:
        plan = str(pyattn.explain(**kwargs, backend="cuda"))
        assert "in any order" in plan
    check_case(Kernels("cuda", torch.float16).results(kwargs, OUTPUTS), case, torch.float16, OUTPUTS)


def test_torch_may_insist_on_an_order(at_work):
    """With ``torch.use_deterministic_algorithms(True)``, as in all tests, the option changes nothing."""
    kwargs = make_inputs(BY_NAME["tiles, gqa"], torch.bfloat16, DEVICE, requires_grad=True)
    kernels = Kernels("cuda", torch.bfloat16)
    assert_same_bits(kernels.results(kwargs | {"deterministic": False}, OUTPUTS), kernels.results(kwargs, OUTPUTS))


@on_emulator
def test_modes_do_not_change_the_bits(at_work):
    assert_modes_give_the_same_bits()


# ---- mutants -----------------------------------------------------------------------------------------------

FIRST_WAIT = "prim::copy_wait<0>();\n    prim::sync();  // the keys are there"
SECOND_SYNC = "prim::sync();  // the values are there"
DKDV_SYNC = "prim::sync();  // this tile is there"
# What is changed: file, old text, new text; the case that sees it, and what is said: by the emulator, or of a number.
RACE, NUMBER = r"shared word|under way|different banks", r"error|differ|infinite|NaN"
MUTANTS = {
    "missing wait": ("attention_fwd.cuh", FIRST_WAIT, FIRST_WAIT.partition("\n")[2], "gqa", RACE),
    "missing barrier": ("attention_fwd.cuh", "prim::sync();  // the keys are there", "//", "gqa", RACE),
    "missing release": ("attention_fwd.cuh", SECOND_SYNC, "//", "gqa", RACE),
    "missing release, backward": ("attention_bwd_dkdv.cuh", DKDV_SYNC, "//", "tiles, gqa", RACE),
    "late release": ("attention_bwd_dq.cuh", "(i + 1) % 2 * Stage::BYTES", "i % 2 * Stage::BYTES",
        "tiles, gqa", RACE),
    "missing commit": ("attention_fwd.cuh", "(tiles.begin + n); });\n  prim::copy_commit();", "(tiles.begin + n); });",
        "gqa", RACE),
    "missing barrier, merge": ("attention_fwd.cuh", "prim::sync();  // the tiles are no longer needed", "",
        "decode", RACE),
    "conflicting banks": ("tile.cuh", "? row & 7 :", "? row & 3 :", "gqa", RACE),
    "wrong swizzle": ("tile.cuh", "((cols % PANEL * 2) ^ twist)", "((cols % PANEL * 2) + twist)",
        "gqa", f"{RACE}|{NUMBER}|beyond"),
    "missing shuffle": ("softmax.cuh", "top = fmaxf(top, prim::shuffle_xor(top, 2));", "", "gqa", NUMBER),
    "missing rescale": ("attention_fwd.cuh", "rescale(out, shrink);", "",
        "tiles, gqa", NUMBER),
    "sum not rescaled": ("softmax.cuh", "rows.sum[m][half] * alpha + sum", "rows.sum[m][half] + sum",
        "tiles, gqa", NUMBER),
    "mask off by one": ("softmax.cuh", "k >= range.hi", "k > range.hi", "padding right", NUMBER),
    "window off by one": ("tile.cuh", "offset - smaller(p.window_left", "offset + 1 - smaller(p.window_left",
        "window, both sides", NUMBER),
    "dropped tile": ("attention_fwd.cuh", "first_key < tiles.end; first_key += BLOCK_N",
        "first_key + BLOCK_N < tiles.end; first_key += BLOCK_N", "tiles, gqa", NUMBER),
    "part forgotten": ("attention_decode.cuh", "split < p.num_splits ?", "split < p.num_splits - 1 ?", "decode",
        NUMBER),
    "warp forgotten": ("attention_fwd.cuh", "other < WARPS_N - 1", "other < WARPS_N - 2", "decode", NUMBER),
    "page off by one": ("tile.cuh", "n % size * stride_l", "(n + 1) % size * stride_l", "paged", NUMBER),
    "wrong philox block": ("attention_bwd_dkdv.cuh", "first_key / 8 + lane() / 16", "first_key / 8",
        "tiles, dropout", NUMBER),
    "any order, missing barrier": ("attention_bwd_dkdv.cuh", "prim::sync();\n  const uint32_t l = lane()",
        "const uint32_t l = lane()", "tiles, head dim 40, v 104", RACE),
    "any order, lost keys": ("attention_bwd_dkdv.cuh", "k < BLOCK_N; k += 16", "k < WARP_KEYS; k += 16",
        "tiles, head dim 40, v 104", NUMBER),
    "no gradient of lse": ("attention_bwd_preprocess.cuh", "sum - (p.grad_lse ? p.grad_lse[i_row] : 0)", "sum",
        "gqa", NUMBER),
    "group's other heads": ("attention_bwd_dkdv.cuh", "num_tiles = per_head * group", "num_tiles = per_head",
        "gqa", NUMBER),
    "no derivative of softcap": ("gradient.cuh", "biased * score.derivative", "biased", "softcap", NUMBER),
    "mask's samples": ("attention_bwd_dmask.cuh", "if (mask_size != size)", "if (mask_size > size)",
        "tiles, float mask 1HQK", NUMBER),
}  # fmt: skip


@on_emulator
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, tmp_path):
    file, old, new, case, complaint = MUTANTS[mutant]
    sources = emulator.plant(tmp_path / "cuda", file, old, new)
    kernels, backward = Kernels("cuda", torch.float16), "bwd" in file or file == "gradient.cuh"
    ordered = not mutant.startswith("any order")
    torch.use_deterministic_algorithms(ordered)
    with emulator.installed(sources), pytest.raises((AssertionError, RuntimeError), match=complaint):
        kernels.check(BY_NAME[case], backward, deterministic=ordered)


@on_emulator
def test_a_scale_that_is_a_little_off_is_caught(at_work, monkeypatch):
    monkeypatch.setattr(call, "_LOG2E", call._LOG2E * 1.002)
    with pytest.raises(AssertionError, match=NUMBER):
        check(BY_NAME["gqa"], torch.float16)


# ---- launches ----------------------------------------------------------------------------------------------


def test_the_fields_of_params_are_those_of_the_header():
    """``_numbers`` asserts it of pointers; a number's order is the header's."""
    numbers = list(launch.numbers())
    assert numbers[0] == "query_b" and numbers[-1] == "grad_scale" and len(numbers) > 60
    sizes = [{"q": 8, "i": 4, "f": 4}[code] for code in launch.numbers().values()]
    assert sizes == sorted(sizes, reverse=True), "a field of 4 bytes before one of 8 would be padded"
    with pytest.raises(AssertionError, match=r"params.cuh has no .*nonsense"):
        launch.pack_numbers({"nonsense": 1})


@on_emulator
def test_a_plain_call_is_one_launch(at_work):
    kwargs = make_inputs(BY_NAME["causal"], torch.bfloat16)
    configure(racing=False)
    Kernels("cuda", torch.bfloat16).run(kwargs)
    assert launch.gpu.launches() == 1
    configure(racing=False)
    Kernels("cuda", torch.bfloat16).run(make_inputs(BY_NAME["decode"], torch.bfloat16))
    assert launch.gpu.launches() == 2  # the parts, and their sum


@on_emulator
def test_lengths_and_offsets_need_no_other_kernel(at_work):
    """A specialisation follows from types, head dims and features: fifty lengths share one."""
    kernels = set()
    for length, causal in itertools.product([*range(65, 90), 128, 256, 1000, 4097], (False, True)):
        case = Case("length", B=1, Hq=1, Hkv=1, Lq=length, Lk=length, causal=causal)
        problem = pyattn.explain(**make_inputs(case, torch.bfloat16)).problem
        kernels |= {
            x.kernel
            for x in cuda.forward_plan(problem, launch.target_of(problem.device), problem.query.stride, True).launches
        }
    assert len(kernels) == 1


@on_emulator
def test_an_error_of_the_driver_is_raised(at_work):
    with pytest.raises(RuntimeError, match=r"cuLibraryLoadData: CUDA error 999.*nowhere"):
        launch._native.CudaKernel(b"/nowhere.so", "attention_fwd", 128, 0, 0)
    kernel = kernel_of("forward", (64, 64), dict.fromkeys(emulator.FLAGS, 0) | {"ROWS": 1})
    code = launch.gpu.cubin(kernel.file, kernel.defines, "sm_80")
    with pytest.raises(RuntimeError, match="there is no kernel attention_bwd"):
        launch._native.CudaKernel(code, "attention_bwd", 128, 0, 0)
    loaded = launch._native.CudaKernel(code, kernel.name, kernel.threads, kernel.shared_bytes, 0)
    with pytest.raises(RuntimeError, match=r"at most 2\^31 - 1 blocks"):
        loaded.launch(2**31, 0, bytes(2048))


def test_a_thread_that_has_not_used_the_gpu(at_work):
    """As autograd's are; what its current device was, it stays."""
    configure(racing=False)
    kwargs = make_inputs(Case("thread", B=1, Hq=1, Hkv=1, Lq=40, Lk=40, D=64), torch.bfloat16, DEVICE)
    with ThreadPoolExecutor(1) as pool:
        in_new_thread = pool.submit(pyattn.testing.run, kwargs, backend="cuda").result()
    assert torch.equal(in_new_thread, pyattn.testing.run(kwargs, backend="cuda"))


@on_emulator
def test_the_current_device_stays(at_work):
    driver = ctypes.CDLL(str(emulator.driver()))
    context, current = ctypes.c_void_p(), ctypes.c_void_p()
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)
    driver.cuCtxSetCurrent(context)
    try:
        pyattn.testing.run(make_inputs(BY_NAME["causal"], torch.bfloat16, DEVICE), backend="cuda")
        driver.cuCtxGetCurrent(ctypes.byref(current))
    finally:
        driver.cuCtxSetCurrent(None)
    assert current.value == context.value


def test_a_driver_that_is_not_there():
    with pytest.raises(RuntimeError, match="the CUDA driver cannot be opened"):
        launch._native.cuda_open("libcuda-that-is-not-there.so")
    with pytest.raises(RuntimeError, match="has no cuGetErrorString"):
        launch._native.cuda_open(ctypes.util.find_library("m") or "libm.so.6")


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_a_reason():
    assert dispatch.load("cuda").unavailable() == ["torch finds no GPU"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_triton_comes_first_where_it_was_faster(arch, monkeypatch):
    """On Hopper, where kernels for sm_80 compute more than a few queries."""
    monkeypatch.setattr(cuda, "unavailable", list)
    monkeypatch.setattr(cuda, "target_of", lambda device: launch.Target(arch))
    for name, unknown in {"causal": False, "decode": False, "packed": False, "tiles, dropout": True}.items():
        problem = pyattn.explain(**make_inputs(BY_NAME[name], torch.bfloat16)).problem
        on_gpu = [x and x._replace(device=torch.device("cuda", 0)) for x in problem.tensors]
        problem = problem._replace(tensors=tuple(on_gpu))
        for op in ("forward", "backward"):
            first = "triton" if unknown and arch == "sm_90a" else "cuda"
            assert dispatch.order(problem._replace(op=op))[0] == first, (name, op)


def test_reasons_are_named(at_work):
    query = torch.randn(1, 2, 5, 300, device=DEVICE)
    text = str(pyattn.explain(query, query, query, backend="cuda"))
    assert "multiplies bfloat16 and float16, the input is float32" in text
    assert "D must lie in [1, 256], it is 300" in text


def test_a_missing_nvrtc_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(jit, "unavailable", lambda: ["NVRTC cannot be loaded"])
    assert launch.Gpu().unavailable() == ["NVRTC cannot be loaded"]
