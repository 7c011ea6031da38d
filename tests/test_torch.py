"""pyattn inside torch: opcheck, compile, autocast, fake tensors, threads, forks, warnings and imports."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn
from pyattn import functional
from pyattn.backends import cpu
from pyattn.testing import CASES, make_inputs, run

BY_NAME = {case.name: case for case in CASES}
SOME = ["causal", "gqa", "head dim 80, v 48", "BLHD", "float mask", "padding both, window",
        "offset per sample", "sinks", "dropout", "packed", "everything"]  # fmt: skip


def op_arguments(case, **make):
    """The arguments with which the public function calls the op."""
    captured = []

    def capture(*spec_and_tensors_and_name):
        captured.append(spec_and_tensors_and_name)
        return None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional.ops, "attention", capture)
        run(make_inputs(case, torch.float32, **make))
    spec, tensors, _ = captured[0]
    return (*tensors, *spec, "auto")


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


def forward_backward(kwargs, function):
    leaves = {n: x for n, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    out, lse = function(kwargs)
    loss = out.float().square().sum() + torch.where(lse == -torch.inf, 0, lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, tuple(leaves.values()))


def attention_with_lse(kwargs):
    function = pyattn.attention_varlen if "cu_seqlens_q" in kwargs else pyattn.attention
    return function(**kwargs, return_lse=True)


def check_compiled(name, backend):
    kwargs = make_inputs(BY_NAME[name], torch.float32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attention_with_lse, backend=backend, fullgraph=True)
    results = []
    for function in (attention_with_lse, compiled):
        torch.manual_seed(0)
        results.append(forward_backward(kwargs, function))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", SOME)
def test_compile(name):
    check_compiled(name, "aot_eager")


def test_compile_with_inductor():
    check_compiled("gqa", "inductor")


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(pyattn.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for Lq, Lk in ((5, 9), (8, 8), (70, 100)):
        q, k = torch.randn(2, 4, Lq, 16), torch.randn(2, 2, Lk, 16)
        torch.testing.assert_close(compiled(q, k, k, causal=True), pyattn.attention(q, k, k, causal=True))


def test_compile_of_the_drop_in():
    torch._dynamo.reset()
    compiled = torch.compile(pyattn.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(3, 7, 16)
    torch.testing.assert_close(
        compiled(q, q, q, is_causal=True), pyattn.scaled_dot_product_attention(q, q, q, is_causal=True)
    )


def test_an_exported_graph_holds_no_backend():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return pyattn.attention(q, k, v, causal=True)

    q = torch.randn(2, 4, 8, 16)
    program = torch.export.export(Module(), (q, q, q))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.pyattn.attention_forward.default]
    assert len(calls) == 1
    assert calls[0].args[-1] == "auto"
    torch.testing.assert_close(program.module()(q, q, q), pyattn.attention(q, q, q, causal=True))


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


def test_fake_tensors():
    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 5, 16), torch.empty(2, 2, 9, 16), torch.empty(2, 2, 9, 24)
        out, lse = pyattn.attention(q, k, v, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 4, 5, 24), (2, 4, 5))


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


def test_many_threads_at_once():
    kwargs = make_inputs(BY_NAME["gqa"], torch.float32)
    expected = run(kwargs)
    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(lambda _: pyattn.attention(**kwargs), range(64)):
            assert torch.equal(out, expected)


def _attention_in_child(queue, q):
    queue.put(float(pyattn.attention(q, q, q, causal=True).sum()))


def test_a_forked_child_computes():
    """Neither hangs, as an OpenMP region of the parent's pool would, nor crashes."""
    torch.set_num_threads(2)
    # Work for two threads, but too little for torch's own operators to use them.
    q = torch.randn(2, 4, 100, 16)
    # The parent starts the threads that a child does not inherit.
    expected = float(pyattn.attention(q, q, q, causal=True).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_attention_in_child, args=(queue, q.detach()))
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
