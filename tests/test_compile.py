"""torch.compile, torch.export and AOTInductor: one graph, any length, no backend in it."""

from __future__ import annotations

import pytest
import torch

import pyattn
from pyattn.testing import CASES, make_inputs

BY_NAME = {case.name: case for case in CASES}
SOME = ["causal", "gqa", "head dim 80, v 48", "BLHD", "float mask", "padding both, window",
        "offset per sample", "sinks", "dropout", "packed", "everything"]  # fmt: skip
LENGTHS = (5, 8, 33, 64, 100, 257)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


def forward_backward(kwargs, function):
    leaves = {n: x for n, x in kwargs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    out, lse = function(kwargs)
    loss = out.float().square().sum() + torch.where(lse == -torch.inf, 0, lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, tuple(leaves.values()))


def attention_with_lse(kwargs):
    function = pyattn.attention_varlen if "cu_seqlens_q" in kwargs else pyattn.attention
    return function(**kwargs, return_lse=True)


@pytest.mark.parametrize("name", SOME)
def test_compile(name):
    kwargs = make_inputs(BY_NAME[name], torch.float32, requires_grad=True)
    compiled = torch.compile(attention_with_lse, backend="aot_eager", fullgraph=True)
    results = []
    for function in (attention_with_lse, compiled):
        torch.manual_seed(0)
        results.append(forward_backward(kwargs, function))
    torch.testing.assert_close(results[1], results[0])


def dense(length):
    return [torch.randn(2, heads, length, 16, requires_grad=True) for heads in (4, 2, 2)]


def check_lengths(function, make, dim, backend):
    """``function`` of tensors that ``make`` makes of a length, compiled once for all; forward and backward."""
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for length in LENGTHS:
        tensors = make(length)
        leaves = [x for x in tensors if x.requires_grad]
        for x in leaves:
            torch._dynamo.mark_dynamic(x, dim)
        results = []
        for f in (function, compiled):
            torch.manual_seed(0)
            with torch._dynamo.config.patch(error_on_recompile=True):
                out = f(*tensors)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"causal": True},
        {"window": (7, 3), "q_offset": 2},
        {"causal": True, "kv_lengths": torch.tensor([5, 3]), "sinks": torch.ones(4), "softcap": 5.0},
        {"dropout_p": 0.5},
    ],
    ids=lambda x: ", ".join(x),
)
def test_no_recompilation_for_a_new_length(arguments):
    check_lengths(lambda q, k, v: pyattn.attention(q, k, v, **arguments), dense, 2, "aot_eager")


def test_no_recompilation_of_the_drop_in():
    def make(length):
        return [torch.randn(2, 4, length, 16, requires_grad=True) for _ in range(3)]

    def function(q, k, v):
        return pyattn.scaled_dot_product_attention(q, k, v, is_causal=True)

    check_lengths(function, make, 2, "aot_eager")


def test_no_recompilation_of_packed_input():
    def make(total):
        cu_seqlens = torch.tensor([0, total // 3, total], dtype=torch.int32)
        return [*(torch.randn(total, 2, 16, requires_grad=True) for _ in range(3)), cu_seqlens]

    def function(q, k, v, cu_seqlens):
        return pyattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)

    check_lengths(function, make, 0, "aot_eager")


def test_inductor():
    """Forward and backward between operators that are fused, for every length."""
    check_lengths(lambda q, k, v: pyattn.attention(q.sin(), k, v.exp(), causal=True).cos(), dense, 2, "inductor")


def test_a_recompilation_would_be_an_error():
    def function(q, k, v):
        return pyattn.attention(q, k, v, causal=q.shape[2] > 50)

    with pytest.raises(torch._dynamo.exc.RecompileError):
        check_lengths(function, dense, 2, "aot_eager")


def test_compile_of_transforms():
    q, k = torch.randn(3, 1, 4, 6, 8), torch.randn(1, 2, 6, 8)

    def loss(q):
        return pyattn.attention(q, k, k, causal=True).square().sum()

    function = torch.vmap(torch.func.grad(loss))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), function(q))


def test_derivatives_without_a_rule_raise_in_a_compiled_function():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    compiled = torch.compile(pyattn.attention, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()
    tangent = torch.compile(
        lambda x: torch.func.jvp(lambda y: pyattn.attention(y, y, y), (x,), (x,)), backend="aot_eager"
    )
    with pytest.raises(NotImplementedError, match="pyattn::attention_forward has no forward-mode derivative"):
        tangent(q.detach())


# ---- export ------------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    def forward(self, q, k, v):
        return pyattn.attention(q, k, v, causal=True, return_lse=True)


@pytest.fixture(scope="module")
def program():
    """A length of 9, exported for any."""
    length = torch.export.Dim("length", min=2, max=4096)
    return torch.export.export(Module(), tuple(x.detach() for x in dense(9)), dynamic_shapes=[{2: length}] * 3)


def check_exported(function):
    for length in LENGTHS:
        tensors = [x.detach() for x in dense(length)]
        torch.testing.assert_close(tuple(function(*tensors)), Module()(*tensors))


def test_an_exported_graph_holds_no_backend(program):
    calls = [node for node in program.graph.nodes if node.target is torch.ops.pyattn.attention_forward.default]
    assert len(calls) == 1
    assert calls[0].args[-1] == "auto"
    check_exported(program.module())


def test_an_exported_program_is_saved_and_loaded(program, tmp_path):
    torch.export.save(program, tmp_path / "attention.pt2")
    check_exported(torch.export.load(tmp_path / "attention.pt2").module())


def test_aot_inductor(program, tmp_path):
    fast_to_compile = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "attention.pt2"), inductor_configs=fast_to_compile
    )
    check_exported(torch._inductor.aoti_load_package(path))
