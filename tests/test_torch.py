"""pyattn inside torch: opcheck, autocast, fake tensors, checkpoints, flops, threads, forks, warnings, imports."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import pyattn
from pyattn import functional
from pyattn.backends import cpu
from pyattn.testing import CASES, forward_and_gradients, make_inputs, run

BY_NAME = {case.name: case for case in CASES}
SOME = ["causal", "gqa", "head dim 80, v 48", "BLHD", "float mask", "padding both, window",
        "offset per sample", "sinks", "dropout", "packed", "everything"]  # fmt: skip


def op_arguments(case, **make):
    """The arguments with which the public function calls the op."""
    captured = []

    def capture(*call_and_tensors):
        captured.append(call_and_tensors)
        return None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional.ops, "attention", capture)
        run(make_inputs(case, torch.float32, **make))
    call, tensors = captured[0]
    return (*tensors, *call.spec, "auto")


@pytest.mark.parametrize("name", [*SOME, "paged"])
def test_opcheck(name):
    case = BY_NAME[name]
    differentiable = case.page_size is None
    forward = torch.ops.pyattn.attention_forward.default
    backward = torch.ops.pyattn.attention_backward.default
    arguments = op_arguments(case, requires_grad=differentiable)
    torch.library.opcheck(forward, arguments)
    if differentiable:
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        out, lse = forward(*detached)
        grads = torch.randn_like(out), torch.randn_like(lse)
        torch.library.opcheck(backward, (*detached[:-1], out, lse, *grads, case.mask == "float", "auto"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """As torch's own function does: query, key and value in the autocast dtype, so also the output."""
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", dtype):
        actual = pyattn.attention(q, k.to(dtype), v, attn_mask=mask)
        torchs = torch.nn.functional.scaled_dot_product_attention(q, k.to(dtype), v, attn_mask=mask)
    assert actual.dtype == torchs.dtype == dtype
    explicit = pyattn.attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask)
    assert torch.equal(actual, explicit)
    torch.testing.assert_close(actual, torchs, rtol=3e-2, atol=2e-2)


def test_autocast_backward_gives_gradients_of_the_inputs_dtype():
    q = torch.randn(2, 4, 9, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        pyattn.attention(q, q, q).sum().backward()
    assert q.grad.dtype == torch.float32
    assert q.grad.isfinite().all()


def check_shapes(q, k, v):
    out, lse = pyattn.attention(q, k, v, causal=True, dropout_p=0.5, return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, 5, 24), (2, 4, 5), torch.float32)
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert (gradient.shape, gradient.device, gradient.dtype) == (x.shape, x.device, x.dtype)


def test_fake_and_meta_tensors():
    shapes = ((2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 24))
    with FakeTensorMode():
        check_shapes(*(torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes))
    check_shapes(*(torch.empty(shape, device="meta", requires_grad=True) for shape in shapes))


def test_modules_on_the_meta_device():
    """As large models are made; with a mask."""
    x, mask = torch.empty(2, 5, 16, device="meta"), torch.empty(5, 5, dtype=torch.bool, device="meta")
    module = pyattn.nn.MultiheadAttention(16, 4, batch_first=True, device="meta")
    assert module(x, x, x, attn_mask=mask, need_weights=False)[0].shape == x.shape
    block = pyattn.nn.GroupedQueryAttention(16, 4, 2, device="meta")
    assert block(x, mask, residual=x).shape == x.shape


# ---- checkpoints and flops ---------------------------------------------------------------------------------


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the forwards that run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.pyattn.attention_forward.default
        return function(*args, **(kwargs or {}))


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, [torch.ops.pyattn.attention_forward.default])


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"use_reentrant": False}, 2),
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False, "context_fn": SELECTIVE}, 1),
    ],
    ids=["checkpoint", "reentrant", "selective"],
)
def test_checkpoint(options, forwards):
    """The recomputed forward drops the same entries; a selective one that keeps attention does not recompute it."""
    leaves = [torch.randn(2, 4, 20, 8, requires_grad=True) for _ in range(3)]

    def function(q, k, v):
        return pyattn.attention(q.sin(), k, v, causal=True, dropout_p=0.3).cos()

    def gradients(function):
        torch.manual_seed(0)
        for x in leaves:
            x.grad = None
        function(*leaves).sum().backward()
        return [x.grad for x in leaves]

    expected = gradients(function)
    with Calls() as calls:
        actual = gradients(lambda *x: checkpoint(function, *x, **options))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert calls.count == forwards


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return tuple(counts.get(getattr(torch.ops.pyattn, f"attention_{op}"), 0) for op in ("forward", "backward"))


def torchs_flops(Lq, Lk, B=1):
    q, k, v, out = (B, 6, Lq, 16), (B, 2, Lk, 16), (B, 2, Lk, 24), (B, 6, Lq, 24)
    return sdpa_flop_count(q, k, v), sdpa_backward_flop_count(out, q, k, v)


def test_flops_are_counted_as_torch_counts_its_own():
    q, k, v = (torch.randn(3, h, n, d, requires_grad=True) for h, n, d in ((6, 5, 16), (2, 9, 16), (2, 9, 24)))
    expected = torchs_flops(5, 9, 3)
    assert flops(lambda: pyattn.attention(q, k, v, causal=True).sum().backward()) == expected
    with torch.no_grad():
        assert flops(lambda: pyattn.attention(q, k, v)) == (expected[0], 0)
        pages = torch.randn(7, 2, 4, 16), torch.randn(7, 2, 4, 24)
        table, lengths = torch.zeros(3, 2, dtype=torch.int32), torch.full((3,), 3)
        paged = flops(lambda: pyattn.attention(q, *pages, block_table=table, kv_lengths=lengths))
        assert paged == (torchs_flops(5, 8, 3)[0], 0)


def test_flops_of_packed_input():
    """By the lengths; where these cannot be read, by the longest that they can be."""
    q, k, v = (torch.randn(n, h, d, requires_grad=True) for n, h, d in ((9, 6, 16), (7, 2, 16), (7, 2, 24)))
    cu_q, cu_k = torch.tensor([0, 2, 9], dtype=torch.int32), torch.tensor([0, 6, 7], dtype=torch.int32)

    def call(*args, **longest):
        return lambda: pyattn.attention_varlen(*args, **longest).sum().backward()

    by_sequence = zip(torchs_flops(2, 6), torchs_flops(7, 1), strict=True)
    assert flops(call(q, k, v, cu_q, cu_k)) == tuple(map(sum, by_sequence))
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in (q, k, v, cu_q, cu_k)]
    assert flops(call(*meta, max_seqlen_q=8, max_seqlen_k=6)) == torchs_flops(8, 6, 2)
    assert flops(call(*meta)) == torchs_flops(9, 7, 2)


@pytest.mark.parametrize(
    "imports",
    ["import pyattn; import torch.utils.flop_counter", "import torch.utils.flop_counter; import pyattn"],
)
def test_flop_formulas_whichever_is_imported_first(imports):
    code = f"""
import torch
{imports}
q = torch.randn(1, 1, 2, 4)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    pyattn.attention(q, q, q)
print(counter.get_total_flops())
"""
    process = python(code)
    assert process.stdout.strip() == str(4 * 2 * 2 * 4), process.stderr


# ---- gradients, threads, forks -----------------------------------------------------------------------------


def test_only_what_asks_for_a_gradient_gets_one():
    q, mask, sinks = torch.randn(1, 2, 5, 8), torch.randn(5, 5), torch.randn(2)
    assert pyattn.attention(q, q, q, attn_mask=mask, sinks=sinks).grad_fn is None
    with torch.no_grad():
        assert pyattn.attention(q.clone().requires_grad_(), q, q).grad_fn is None
    for leaf, arguments in ((mask, {"attn_mask": mask}), (sinks, {"sinks": sinks})):
        leaf.requires_grad_()
        pyattn.attention(q, q, q, **arguments).sum().backward()
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.any()
    assert q.grad is None


def test_deterministic_algorithms():
    """Nothing that torch calls nondeterministic is used, in any of the backends."""
    for name in ("everything", "packed, family"):
        kwargs = make_inputs(BY_NAME[name], torch.float32, requires_grad=True)
        torch.use_deterministic_algorithms(True)
        first, second = (forward_and_gradients(kwargs, lambda k: run(k, return_lse=True)) for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_many_threads_at_once():
    kwargs = make_inputs(BY_NAME["gqa"], torch.float32, requires_grad=True)

    def compute(_):
        return forward_and_gradients(kwargs, lambda k: pyattn.attention(**k, return_lse=True))

    expected = compute(0)
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(compute, range(64)):
            assert all(torch.equal(results[name], expected[name]) for name in expected)


def _forward_and_backward(q):
    q = q.clone().requires_grad_()
    out = pyattn.attention(q, q, q, causal=True)
    out.square().sum().backward()
    return float(out.detach().sum()), float(q.grad.abs().sum())


def _compute_in_child(queue, q):
    queue.put(_forward_and_backward(q))


def test_a_forked_child_computes():
    """Neither hangs, as an OpenMP region of the parent's pool would, nor crashes."""
    torch.set_num_threads(2)
    # Work for two threads, but too little for torch's own operators to use them.
    q = torch.randn(2, 4, 100, 16)
    # The parent starts the threads that a child does not inherit.
    expected = _forward_and_backward(q)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_compute_in_child, args=(queue, q))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks under threads
        child.start()
    try:
        child.join(60)
        assert child.exitcode == 0, "the child hangs" if child.exitcode is None else "the child died"
        assert queue.get(timeout=10) == pytest.approx(expected)
    finally:
        if child.is_alive():
            child.kill()


def test_slow_path_warns_once_with_the_reasons():
    q = torch.zeros(1, 1, 1100, 1, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            pyattn.attention(q, q, q)
        pyattn.attention(q[:, :, :10], q, q)
        pyattn.attention(q.float(), q.float(), q.float(), backend="reference")
    slow = [str(w.message) for w in caught if issubclass(w.category, pyattn.SlowPathWarning)]
    assert len(slow) == 1
    assert "float64" in slow[0]
    assert "cpu" in slow[0]


# ---- imports and environment, each in a process of its own -------------------------------------------------


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


CALL = "import torch, pyattn; q = torch.randn(1, 1, 2, 4); pyattn.attention(q, q, q, backend={!r})"


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx512 "])
def test_an_unknown_isa_is_an_error(isa):
    process = python(CALL.format("cpu"), PYATTN_CPU_ISA=isa)
    assert process.returncode == 1
    assert "ValueError: PYATTN_CPU_ISA must be one of" in process.stderr
    assert repr(isa) in process.stderr
    assert "portable" in process.stderr


def test_a_forced_isa_is_used():
    for isa in cpu.available_isas():
        process = python("from pyattn.backends import cpu; print(cpu.isa())", PYATTN_CPU_ISA=isa)
        assert process.stdout.strip() == isa, process.stderr
    assert cpu.isa() in cpu.available_isas()
    with pytest.raises(ValueError, match="name must be one of"), cpu.use_isa("sse9"):
        pass


def test_import_works_without_the_extension():
    code = """
import sys
sys.modules["pyattn._native"] = None
import torch, pyattn
q = torch.randn(1, 1, 2, 4)
assert pyattn.attention(q, q, q).isfinite().all()
print(pyattn.explain(q, q, q))
try:
    pyattn.attention(q, q, q, backend="cpu")
except NotImplementedError as error:
    print(error)
"""
    process = python(code)
    assert process.returncode == 0, process.stderr
    table, _, error = process.stdout.strip().rpartition("\n")
    assert "reference  chosen" in table
    for text in (table, error):
        assert "the extension pyattn._native is missing" in text


def test_import_is_light():
    """Little more than ``import torch``: none of these, nor a backend before its first use."""
    code = """
import sys
import torch
before = set(sys.modules)
import pyattn
print(*sorted(set(sys.modules) - before))
"""
    process = python(code)
    assert process.returncode == 0, process.stderr
    new = process.stdout.split()
    assert "pyattn.functional" in new
    heavy = {"triton", "matplotlib", "rich", "numpy", "sympy", "torch._dynamo", "pyattn.backends.cpu"}
    assert not heavy & set(new)
    assert all(name.split(".")[0] in {"pyattn", "torch"} | sys.stdlib_module_names for name in new)


def test_seeds_come_from_torchs_generator():
    q = torch.randn(1, 2, 20, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(pyattn.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
