"""``pyattn.install``: every call of torch's scaled_dot_product_attention, and nothing left of it afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyattn
from pyattn import compare
from pyattn.integrations import sdpa as takeover

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def nothing_is_left():
    torch._dynamo.reset()
    before = torch._C._dispatch_dump("aten::scaled_dot_product_attention"), torch.backends.mha.get_fastpath_enabled()
    yield
    pyattn.uninstall()
    after = torch._C._dispatch_dump("aten::scaled_dot_product_attention"), torch.backends.mha.get_fastpath_enabled()
    assert after == before


@pytest.fixture
def ours(monkeypatch):
    """How many calls pyattn has computed."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return pyattn.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(takeover.sdpa, "scaled_dot_product_attention", counted)
    return calls


def randn(*shape, dtype=torch.float32, requires_grad=False):
    return torch.randn(shape).to(dtype).requires_grad_(requires_grad)


def forward_backward(function, *tensors, **kwargs):
    tensors = [x.detach().clone().requires_grad_() if x.requires_grad else x for x in tensors]
    torch.manual_seed(0)
    out = function(*tensors, **kwargs)
    leaves = [x for x in tensors if x.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, weights) if leaves else ()
    return [out.detach(), *grads]


def assert_close(results, expected):
    for x, y in zip(results, expected, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[y.dtype]
        size = y.abs().max().item() if y.numel() else 0
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * max(size, 1))


CALLS = {
    "plain": ([(2, 3, 5, 8)] * 3, {}),
    "causal": ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {"is_causal": True}),
    "scale": ([(2, 3, 5, 8)] * 3, {"scale": 0.3}),
    "grouped": ([(2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)], {"enable_gqa": True}),
    "v head dim": ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)], {}),
    "three dimensions": ([(3, 5, 8)] * 3, {}),
    "two dimensions": ([(5, 8)] * 3, {}),
    "five dimensions": ([(2, 2, 3, 5, 8)] * 3, {}),
    "no keys": ([(2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)], {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name, requires_grad, dtype, ours):
    shapes, kwargs = CALLS[name]
    tensors = [randn(*shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]
    expected = forward_backward(F.scaled_dot_product_attention, *tensors, **kwargs)
    with pyattn.installed():
        result = forward_backward(F.scaled_dot_product_attention, *tensors, **kwargs)
    assert len(ours) == 1
    assert_close(result, expected)
    after = forward_backward(F.scaled_dot_product_attention, *tensors, **kwargs)
    assert len(ours) == 1 and all(torch.equal(x, y) for x, y in zip(after, expected, strict=True))


def test_a_mask_with_a_gradient(ours):
    q, mask = randn(2, 3, 5, 8, requires_grad=True), randn(3, 5, 5, requires_grad=True)
    expected = forward_backward(F.scaled_dot_product_attention, q, q, q, mask)
    with pyattn.installed():
        result = forward_backward(F.scaled_dot_product_attention, q, q, q, mask)
    assert len(ours) == 1
    assert_close(result, expected)


def test_dropout(ours):
    q, v = randn(1, 1, 64, 8), torch.ones(1, 1, 64, 8)
    with pyattn.installed():
        torch.manual_seed(0)
        out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
        torch.manual_seed(0)
        again = F.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
    assert len(ours) == 2 and torch.equal(out, again)
    assert out.std() > 0 and abs(out.mean() - 1) < 0.2


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}], ids=str)
def test_strides_are_those_of_torch(order, kwargs):
    sizes = (2, 3, 5, 8)
    q = randn(*(sizes[i] for i in order)).permute([order.index(i) for i in range(4)])
    expected = F.scaled_dot_product_attention(q, q, q, **kwargs)
    with pyattn.installed():
        assert F.scaled_dot_product_attention(q, q, q, **kwargs).stride() == expected.stride()


# ---- through torch's machinery -------------------------------------------------------------------------------


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_autocast(ours):
    q = randn(2, 3, 5, 8)
    with pyattn.installed(), torch.autocast("cpu", torch.bfloat16):
        assert attend(q, q, q).dtype == torch.bfloat16
    assert len(ours) == 1


def test_inference_mode(ours):
    q = randn(2, 3, 5, 8)
    with pyattn.installed(), torch.inference_mode():
        attend(q, q, q)
    assert len(ours) == 1


def test_vmap_and_grad(ours):
    q = randn(4, 2, 3, 5, 8)
    expected = torch.vmap(attend)(q, q, q)
    gradient = torch.func.grad(lambda x: attend(x, q[0], q[0]).sum())
    expected_gradient = gradient(q[0])
    with pyattn.installed():
        torch.testing.assert_close(torch.vmap(attend)(q, q, q), expected)
        assert len(ours) == 1
        torch.testing.assert_close(gradient(q[0]), expected_gradient)
        assert len(ours) == 2
        each = torch.stack([gradient(x) for x in q])
        torch.testing.assert_close(torch.vmap(gradient)(q), each)


def operators(graph_module):
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_compile(mode):
    """The graphs hold pyattn's operators, and no others' attention."""
    graphs = []

    def backend(graph_module, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph_module, inputs):
            graphs.append(operators(graph_module))
            return make_boxed_func(graph_module.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph_module, inputs)

    guards = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    q = randn(2, 3, 5, 8, requires_grad=mode == "grad")
    expected = attend(q, q, q).detach()
    with pyattn.installed(), guards[mode]():
        out = torch.compile(attend, backend=backend, fullgraph=True)(q, q, q)
        if mode == "grad":
            out.sum().backward()
    torch.testing.assert_close(out.detach(), expected)
    assert len(graphs) == (2 if mode == "grad" else 1)
    for graph, op in zip(graphs, ("forward", "backward"), strict=False):
        assert f"pyattn.attention_{op}.default" in graph
        assert not any("scaled_dot_product" in name or "softmax" in name for name in graph)


def test_what_was_compiled_before_is_not_found_again():
    """Compiled graphs are kept on disk, by what Dynamo has seen: the same call, installed or not."""
    q = randn(2, 3, 5, 8)
    tags = [torch.compiler.config.cache_key_tag]
    with pyattn.installed():
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] != tags[1] and torch.compiler.config.cache_key_tag == tags[0]
    attend(q, q, q)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q):
            return attend(q, q, q)

    q = randn(2, 3, 5, 8)
    with pyattn.installed():
        program = torch.export.export(Module(), (q,)).run_decompositions()
    assert "pyattn.attention_forward.default" in operators(program.graph_module)
    torch.testing.assert_close(program.module()(q), attend(q, q, q))


def test_scripted_code_is_called_from_cpp(ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(attend)
    q = randn(2, 3, 5, 8)
    expected = attend(q, q, q)
    with pyattn.installed():
        torch.testing.assert_close(scripted(q, q, q), expected)
    assert len(ours) >= 1


# ---- what is left to torch -----------------------------------------------------------------------------------


def test_kernels_that_are_asked_for(ours):
    q = randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    with pyattn.installed():
        with sdpa_kernel(SDPBackend.MATH):
            first = torch.autograd.grad(attend(q, q, q).square().sum(), q, create_graph=True)[0]
            torch.autograd.grad(first.sum(), q)  # the math kernel has second derivatives
        assert not ours
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attend(q, q, q)
        assert len(ours) == 1


def test_nested_tensors_and_other_devices(ours):
    q = randn(2, 3, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([randn(3, n, 8) for n in (2, 5)])
    with pyattn.installed():
        assert attend(q.to("meta"), q.to("meta"), q.to("meta")).shape == q.shape
        F.scaled_dot_product_attention(nested, nested, nested)
    assert not ours


def test_refusals_name_the_argument():
    q = randn(2, 3, 5, 8)
    with pyattn.installed(), pytest.raises(ValueError, match="key must have the head dim of query"):
        F.scaled_dot_product_attention(q, q[..., :4], q)


def test_nothing_is_compared_with_itself():
    with pyattn.installed(), pytest.raises(RuntimeError, match="in the place of torch's SDPA"):
        compare.environment()
    assert compare.environment()["torch"] == torch.__version__


# ---- installing ----------------------------------------------------------------------------------------------


def test_install_and_uninstall(ours):
    q = randn(2, 3, 5, 8)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    pyattn.uninstall()  # of nothing is nothing
    handle = pyattn.install()  # uninstalling must not wait until nobody has it
    assert pyattn.install() is handle
    with pyattn.installed():
        pass
    attend(q, q, q)
    assert len(ours) == 1, "it was installed before the block, and is after it"
    assert not torch.backends.mha.get_fastpath_enabled()
    pyattn.uninstall()
    attend(q, q, q)
    assert len(ours) == 1 and torch.backends.mha.get_fastpath_enabled() == fastpath


def test_an_exception_uninstalls(ours):
    with pytest.raises(ZeroDivisionError), pyattn.installed():
        raise ZeroDivisionError
    q = randn(2, 3, 5, 8)
    attend(q, q, q)
    assert not ours


@pytest.mark.skipif(not hasattr(torch.nn.attention, "activate_flash_attention_impl"), reason="an older torch")
def test_an_implementation_for_torch(ours):
    attention = torch.nn.attention
    q = randn(2, 3, 5, 8)
    attention.activate_flash_attention_impl("pyattn")
    assert attention.current_flash_attention_impl() == "pyattn"
    attend(q, q, q)
    attention.restore_flash_attention_impl()
    attend(q, q, q)
    assert len(ours) == 1


# ---- clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(training, need_weights, ours):
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    x, padding = randn(3, 7, 16), torch.arange(7) >= torch.tensor([[7], [5], [2]])
    arguments = {"key_padding_mask": padding, "need_weights": need_weights}
    expected = module(x, x, x, **arguments)[0]
    with pyattn.installed():
        torch.testing.assert_close(module(x, x, x, **arguments)[0], expected)
    assert len(ours) == (not need_weights), "torch multiplies by itself where weights are wanted"


@pytest.mark.parametrize("training", [True, False])
def test_transformer(training, ours):
    model = torch.nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    source, target = randn(3, 7, 16), randn(3, 5, 16)
    mask = model.generate_square_subsequent_mask(5)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [2]])
    arguments = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's fast path speaks of nested tensors
        expected = model(source, target, **arguments)
        with pyattn.installed():
            result = model(source, target, **arguments)
    torch.testing.assert_close(result, expected)
    assert len(ours) == 2 + 2 * 2, "each layer of the encoder, and of the decoder twice"


def test_samples_of_torch():
    code = (ROOT / "tests" / "torch_samples.py").read_text()
    python(code)


# ---- the environment -----------------------------------------------------------------------------------------


def python(code, path=(), **environment):
    paths = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYATTN_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done


CALL = "x = torch.ones(1, 1, 2, 2); torch.nn.functional.scaled_dot_product_attention(x, x, x)"


def test_the_environment_installs():
    logged = "pyattn: attention forward"
    for imports in ("import torch", "import pyattn, torch", "from torch import nn; import torch"):
        done = python(f"{imports}; {CALL}", PYATTN_INSTALL="1", PYATTN_LOG="1")
        assert logged in done.stderr, imports
    assert logged not in python(f"import pyattn, torch; {CALL}", PYATTN_LOG="1").stderr


def test_without_the_variable_nothing_is_imported():
    code = "import torch, sys; print(*[name for name in sys.modules if name.split('.')[0] == 'pyattn'])"
    assert python(code).stdout.strip() == ""
    assert "pyattn" in python(code, PYATTN_INSTALL="1").stdout


def test_a_failure_is_reported_and_torch_is_imported(tmp_path):
    (tmp_path / "pyattn").mkdir()
    (tmp_path / "pyattn" / "__init__.py").write_text("raise ValueError('a broken installation')")
    done = python("import torch; print(torch.ones(1).sum().item())", path=[tmp_path], PYATTN_INSTALL="1")
    assert done.stdout.strip() == "1.0"
    assert "PYATTN_INSTALL" in done.stderr and "a broken installation" in done.stderr
