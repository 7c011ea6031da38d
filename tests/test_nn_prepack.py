"""Packed weights of modules: the same bits, and an error once they are old."""

from __future__ import annotations

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

from pyattn.backends import cpu
from pyattn.backends.cpu import projection as kernels
from pyattn.nn import (
    CrossAttention,
    GroupedQueryAttention,
    MultiheadAttention,
    RotaryEmbedding,
    convert,
    prepack,
    unpack,
)
from pyattn.testing import DTYPES

E = 64
MANY = kernels._native.FEW_ROWS + 1
pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="packing is for the CPU's kernels")
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def grouped(**arguments):
    return GroupedQueryAttention(E, 4, 2, rotary=RotaryEmbedding(8, 200), qk_norm=True, bias=True, **arguments)


def multihead(**arguments):
    return MultiheadAttention(E, 4, batch_first=True, **arguments)


def cross(**arguments):
    return CrossAttention(E, 4, **arguments)


def out_of(module, x, *others):
    if isinstance(module, CrossAttention):
        return module(x, module.project(x), residual=x)
    if isinstance(module, MultiheadAttention):
        return module(x, *(others or (x, x)), need_weights=False)[0]
    return module(x, residual=x)


def check_used(module, call, expected):
    """The same bits, and from every packed weight: with one made zero it is another result."""
    prepack(module)
    with mock.patch.object(kernels, "pack_weight", wraps=kernels.pack_weight) as pack:
        assert torch.equal(call(), expected)
        packs = pack.call_count
        assert packs >= len(module._packed_weights)
        assert torch.equal(call(), expected)
        assert pack.call_count == packs
    for name in list(module._packed_weights):
        prepack(module)
        call()
        for part in module._packed_weights[name]._parts.values():
            part.zero_()
        assert not torch.equal(call(), expected), name


@by_dtype
@pytest.mark.parametrize("make", [multihead, grouped, cross])
def test_the_same_bits(make, dtype, engine):
    module = make(dtype=dtype)
    x = torch.randn(2, MANY, E).to(dtype)
    with engine.at_work(2):
        check_used(module, lambda: out_of(module, x), out_of(module, x))


@pytest.mark.parametrize("arguments", [{}, {"kdim": 48, "vdim": 40}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_every_way_to_project(arguments, shared):
    module = multihead(**arguments)
    x, key = torch.randn(2, MANY, E), torch.randn(2, 80, module.kdim)
    value = torch.randn(2, 80, module.vdim) if "vdim" in arguments or not shared else key
    check_used(module, lambda: out_of(module, x, key, value), out_of(module, x, key, value))


def test_few_rows_read_the_weight_itself():
    module = multihead()
    x = torch.randn(1, MANY - 1, E)
    expected = out_of(module, x)
    prepack(module)
    with mock.patch.object(kernels, "pack_weight", side_effect=AssertionError):
        assert torch.equal(out_of(module, x), expected)


def test_what_is_named_keeps_to_torch():
    """Naive modules pack nothing, and one that becomes naive does not read what was packed."""
    module = multihead()
    x = torch.randn(2, MANY, E)
    prepack(module)
    module.attention = "naive"
    with mock.patch.object(kernels, "pack_weight", side_effect=AssertionError):
        out_of(module, x)


# ---- changes ----------------------------------------------------------------------------------------------------


def step(module):
    out_of(module, torch.randn(2, MANY, E)).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()


CHANGES = {
    "an optimizer": step,
    "a state dict": lambda module: module.load_state_dict(module.state_dict()),
    "a state dict, assigned": lambda module: module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True),
    "in place": lambda module: module.out_proj.weight.detach().mul_(2),
    "data": lambda module: setattr(module.out_proj.weight, "data", module.out_proj.weight.data.clone()),
    "data, transposed": lambda module: setattr(module.out_proj.weight, "data", module.out_proj.weight.data.T),
    "another parameter": lambda module: setattr(module.out_proj, "weight", nn.Parameter(torch.randn(E, E))),
}


@pytest.mark.parametrize("make", [multihead, grouped])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_detected(change, make):
    module, x = make(), torch.randn(2, MANY, E)
    prepack(module)
    out_of(module, x)
    change(module)
    with pytest.raises(ValueError, match=r"weights changed since prepack: .*weight; call pyattn.nn.prepack"):
        out_of(module, x)
    prepack(module)
    found = out_of(module, x)
    unpack(module)
    assert torch.equal(out_of(module, x), found)
    change(module)
    out_of(module, x)


def test_a_change_before_the_first_call_is_detected():
    module = multihead()
    prepack(module)
    module.in_proj_weight.data = module.in_proj_weight.data + 1
    with pytest.raises(ValueError, match="weights changed since prepack: in_proj_weight"):
        out_of(module, torch.randn(2, MANY, E))


@pytest.mark.skipif(len(cpu.available_isas()) < 2, reason="this processor runs one instruction set")
def test_another_instruction_set_is_detected():
    module, x = multihead(), torch.randn(2, MANY, E)
    first, second = cpu.available_isas()[:2]
    with cpu.use_isa(first):
        prepack(module)
    with cpu.use_isa(second), pytest.raises(ValueError, match=f"is packed for {first}, but {second} is in use"):
        out_of(module, x)


def test_gradients_are_those_of_the_weight():
    for make in (multihead, grouped):
        module, x = make(), torch.randn(2, MANY, E, requires_grad=True)
        out_of(module, x).square().sum().backward()
        expected = [x.grad, *(p.grad.clone() for p in module.parameters())]
        module.zero_grad()
        x.grad = None
        prepack(module)
        out_of(module, x).square().sum().backward()
        for found, grad in zip([x.grad, *(p.grad for p in module.parameters())], expected, strict=True):
            assert torch.equal(found, grad)


# ---- copies and casts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [multihead, grouped])
def test_copies_and_files_are_not_packed(make):
    module, x = make(), torch.randn(2, MANY, E)
    names, expected = list(module.state_dict()), out_of(module, x)
    prepack(module)
    out_of(module, x)
    assert list(module.state_dict()) == names and len(list(module.buffers())) == 2 * (make is grouped)
    file = io.BytesIO()
    torch.save(module, file)
    assert len(file.getvalue()) < 2 * sum(4 * p.numel() for p in module.parameters())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert other._packed_weights is None
        assert torch.equal(out_of(other, x), expected)
        with torch.no_grad():
            (other if type(other) is not type(module) else copy.deepcopy(other)).out_proj.weight.mul_(1.0)
    assert module._packed_weights is not None and torch.equal(out_of(module, x), expected)


@pytest.mark.parametrize("make", [multihead, grouped])
def test_casting_unpacks(make):
    module, x = make(), torch.randn(2, MANY, E)
    prepack(module)
    out_of(module, x)
    module.to("cpu").to(torch.float32).requires_grad_(False).eval()
    assert module._packed_weights is not None  # nothing has changed
    plain = copy.deepcopy(module)
    whole = nn.ModuleList([module])
    whole.to(torch.bfloat16)
    assert module._packed_weights is None
    assert torch.equal(out_of(module, x.bfloat16()), out_of(plain.bfloat16(), x.bfloat16()))
    # Back again, where the allocator may give the address that the packed weight came from.
    prepack(module)
    out_of(module, x.bfloat16())
    whole.float()
    assert torch.equal(out_of(module, x), out_of(plain.float(), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_own_weights(dtype):
    module, x = grouped(), torch.randn(2, MANY, E)
    with torch.autocast("cpu", dtype):
        expected = out_of(module, x)
        prepack(module)
        assert torch.equal(out_of(module, x), expected)


def test_graphs_and_functional_calls_do_without():
    torch._dynamo.reset()
    module, x = grouped(), torch.randn(2, MANY, E)
    expected = out_of(module, x)
    prepack(module)
    compiled = torch.compile(lambda x: out_of(module, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(module, (x,), {"residual": x})
    torch.testing.assert_close(exported.module()(x, residual=x), expected)
    parameters = {name: 2 * p.detach() for name, p in module.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).sum())(parameters)
    assert grads["out_proj.weight"].shape == (E, E)
    with pytest.raises(ValueError, match="weights changed since prepack"):
        torch.func.functional_call(module, parameters, (x,))


# ---- what is packed ---------------------------------------------------------------------------------------------


def test_modules_are_found_wherever_they_are():
    model = nn.Transformer(E, 4, 1, 1, 48, 0.0, batch_first=True).eval()
    model.extra = nn.ModuleList([grouped(), multihead(attention="naive"), nn.Linear(E, E)])
    convert(model)
    src, tgt = torch.randn(2, MANY, E), torch.randn(2, MANY + 7, E)
    expected = model(src, tgt)
    prepack(model)
    assert torch.equal(model(src, tgt), expected)
    parts = [
        model.encoder.layers[0].self_attn,
        model.decoder.layers[0].self_attn,
        model.decoder.layers[0].multihead_attn,
    ]
    assert [len(part._packed_weights["in_proj_weight"]._parts) for part in parts] == [1, 1, 2]
    assert model.extra[0]._packed_weights is not None and model.extra[1]._packed_weights is None
    unpack(model)
    assert all(getattr(part, "_packed_weights", None) is None for part in model.modules())


def test_bad_input():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got NoneType"):
        prepack(None)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got str"):
        unpack("module")
    for nothing in (nn.Linear(2, 2), multihead(attention="torch"), nn.MultiheadAttention(E, 4)):
        with pytest.raises(
            ValueError, match=r'module must hold a module of pyattn.nn with attention="pyattn", got none'
        ):
            prepack(nothing)
    with torch.inference_mode():
        inference = multihead()
    parametrized = nn.utils.parametrizations.weight_norm(multihead(), "in_proj_weight")
    reasons = {
        "it is on meta": multihead(device="meta"),
        "kernels do not compute in torch.float64": multihead(dtype=torch.float64),
        "it was made in inference mode": inference,
        "it is a Tensor, which something else may make anew": parametrized,
    }
    for reason, module in reasons.items():
        model = nn.ModuleList([grouped(), module])
        with pytest.raises(NotImplementedError, match=f"1.in_proj_weight cannot be packed: .*{reason}"):
            prepack(model)
        assert model[0]._packed_weights is None
