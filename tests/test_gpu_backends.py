"""What the backends for GPUs promise alike: equal bits, nothing read that is not in use, torch's machinery.

``test_triton.py`` and ``test_cuda.py`` hold each to the reference.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_kernels import DEVICE, GPU, ON_GPU, assert_same_bits, in_one_type, in_two_types

import pyattn
from pyattn import functional
from pyattn.testing import (
    CASES,
    OUTPUTS,
    Case,
    check_case,
    forward_and_gradients,
    make_inputs,
    random_grads,
    run,
    to_pages,
)

pytestmark = GPU
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def kernels(request):
    with request.param.at_work():
        yield request.param


# ---- the same bits, whatever lies around -------------------------------------------------------------------


@in_two_types
@pytest.mark.parametrize("length", [4, 40], ids=["decode", "forward"])
def test_bits_of_a_sample_do_not_depend_on_its_batch(length, kernels):
    case = Case("batch", B=2, Hq=2, Hkv=1, Lq=length, Lk=50, D=16, causal=True, mask="float", mask_shape="B1QK",
                kv_lengths=(50, 37))  # fmt: skip
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=True)
    batch = kernels.results(kwargs, OUTPUTS)
    assert_same_bits(kernels.results(kwargs, OUTPUTS), batch)
    grads = random_grads(batch)
    for b in range(case.B):
        sample = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        alone = kernels.results(sample, OUTPUTS, {name: x[b : b + 1] for name, x in grads.items()})
        assert_same_bits(alone, {name: x[b : b + 1] for name, x in batch.items()})


@in_two_types
@pytest.mark.parametrize("length", [2, 40], ids=["decode", "forward"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_pages_do_not_change_the_bits(page_size, length, kernels):
    """Wherever they lie, and whatever lies in the pages, and stands in the table, past the lengths."""
    case = Case("pages", B=2, Hq=4, Hkv=2, Lq=length, Lk=90, D=16, Dv=24, causal=True, kv_lengths=(90, 41))
    kwargs = make_inputs(case, kernels.dtype, DEVICE)
    assert_same_bits(kernels.results(to_pages(kwargs, page_size)), kernels.results(kwargs))


@in_two_types
def test_packed_sequences_are_the_sequences_one_by_one(kernels):
    lengths = ((1, 30), (33, 40), (0, 5), (7, 9), (20, 0), (16, 16))
    case = Case("packed", Hq=4, Hkv=2, D=24, packed=lengths, causal=True, alibi=True, softcap=5.0)
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=True)
    packed = kernels.results(kwargs, OUTPUTS)
    grads = random_grads(packed)
    cu_q, cu_k = (kwargs[f"cu_seqlens_{side}"].tolist() for side in "qk")
    for b in range(len(lengths)):
        q, k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = kwargs | {"cu_seqlens_q": torch.tensor([0, lengths[b][0]], dtype=torch.int32, device=DEVICE)}
        alone["cu_seqlens_k"] = torch.tensor([0, lengths[b][1]], dtype=torch.int32, device=DEVICE)
        for name, part in (("query", q), ("key", k), ("value", k)):
            alone[name] = kwargs[name].detach()[part].requires_grad_()
        single = kernels.results(alone, OUTPUTS, {"out": grads["out"][q], "lse": grads["lse"][:, q]})
        assert torch.equal(packed["lse"][:, q], single["lse"])
        for name, part in (("out", q), ("grad of query", q), ("grad of key", k), ("grad of value", k)):
            assert torch.equal(packed[name][part], single[name]), f"{name} of sequence {b}"


@in_one_type
def test_few_packed_queries_are_split(kernels):
    """Who says how long the longest sequence is gets the kernel of few queries."""
    case = Case("decode", Hq=4, Hkv=2, D=16, packed=((1, 60), (2, 33), (0, 9), (2, 70)), causal=True, sinks=True)
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=True)
    with_lengths = kwargs | {"max_seqlen_q": 2, "max_seqlen_k": 70}
    assert "parts of 32 keys" in str(pyattn.explain(**with_lengths, backend=kernels.name))
    check_case(kernels.results(with_lengths, OUTPUTS), case, kernels.dtype, OUTPUTS)


LAYOUTS = {
    "BLHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": lambda x: torch.stack([x, x * torch.nan], -1)[..., 0],
    "expanded rows": lambda x: x[:, :, :1].expand_as(x),
    "sliced": lambda x: torch.cat([x * torch.nan, x, x * torch.nan], 2)[:, :, x.shape[2] : 2 * x.shape[2]],
}


@in_two_types
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_the_bits(layout, kernels):
    """Of what comes in, and of the gradients of out and lse as autograd leaves them.

    Triton adds up a row as its loads are wide, which is as 16 elements divide the strides: there they always do.
    """
    change = LAYOUTS[layout]
    D, Dv = (16, 32) if kernels.name == "triton" else (12, 20)
    kwargs = make_inputs(
        Case("layout", B=1, Hq=2, Hkv=2, Lq=20, Lk=20, D=D, Dv=Dv), kernels.dtype, DEVICE, requires_grad=True
    )
    grads = {name: change(x) for name, x in random_grads(kernels.results(kwargs)).items()}
    changed = {n: change(kwargs[n].detach()) for n in ("query", "key", "value")}
    dense = {n: x.contiguous().requires_grad_() for n, x in changed.items()}
    changed = {n: x.requires_grad_() for n, x in changed.items()}
    expected = kernels.results(kwargs | dense, OUTPUTS, {name: x.contiguous() for name, x in grads.items()})
    assert_same_bits(kernels.results(kwargs | changed, OUTPUTS, grads), expected)


# ---- what must not be read, and what must be -----------------------------------------------------------------


@in_two_types
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_what_is_not_in_use_never_shows(fill, kernels):
    case = Case("padding", B=2, Hq=2, Hkv=1, Lq=20, Lk=50, D=16, kv_lengths=(50, 13), kv_starts=(17, 3))
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=True)
    keys = torch.arange(case.Lk, device=DEVICE)
    unused = (keys < kwargs["kv_starts"][:, None]) | (keys >= kwargs["kv_lengths"][:, None])
    unused = unused[:, None, :, None]
    poisoned = {n: kwargs[n].detach().masked_fill(unused, fill).requires_grad_() for n in ("key", "value")}
    actual = kernels.results(kwargs | poisoned, OUTPUTS)
    assert_same_bits(actual, kernels.results(kwargs, OUTPUTS))
    for name in ("grad of key", "grad of value"):
        assert not actual[name][unused.expand_as(actual[name])].any()


@in_one_type
def test_lengths_out_of_range_lead_nowhere(monkeypatch, kernels):
    """Their values are not looked at on a device: the kernels clamp them."""
    monkeypatch.setattr("pyattn.ops.check_values", lambda *args: None)
    kwargs = make_inputs(Case("lengths", B=2, Hq=2, Hkv=2, Lq=20, Lk=33, D=16, causal=True), kernels.dtype, DEVICE)
    wrong = {"kv_lengths": [99, -5], "kv_starts": [-7, 2**30], "q_offset": [2**62, -(2**62)]}
    clamped = {"kv_lengths": [33, 0], "kv_starts": [0, 33], "q_offset": [2**40, -(2**40)]}
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        a, b = ({n: torch.tensor([min(max(v, info.min), info.max) for v in x]).to(DEVICE, dtype)
                 for n, x in values.items()} for values in (wrong, clamped))  # fmt: skip
        for name in wrong:
            assert_same_bits(kernels.results(kwargs | {name: a[name]}), kernels.results(kwargs | {name: b[name]}))
    packed = make_inputs(Case("packed", Hq=2, Hkv=2, D=16, packed=((20, 20), (13, 13))), kernels.dtype, DEVICE)
    for values in ([0, 99, 33], [-5, 20, 33], [0, 25, 20], [-(2**31), 2**31 - 1, 0]):
        cu_seqlens = torch.tensor(values, dtype=torch.int32, device=DEVICE)
        kernels.results(packed | {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens})


@in_one_type
@pytest.mark.parametrize("q_offset", [2**40, -(2**40), 2**62, -(2**62)])
@pytest.mark.parametrize("window", [(2**40, None), (2**62, 2**62), (None, 2**40), (3, 2**62)])
def test_far_offsets_and_windows(window, q_offset, kernels):
    kernels.check(Case("far", B=1, Hq=1, Hkv=1, Lq=5, Lk=20, D=8, window=window, q_offset=q_offset))


@in_one_type
@pytest.mark.parametrize("sizes", [{"B": 0}, {"Lq": 0}, {"Lk": 0}, {"Hq": 0, "Hkv": 0}], ids=str)
def test_nothing_to_do(sizes, kernels):
    case = Case("empty", **({"B": 2, "Hq": 2, "Hkv": 2, "Lq": 20, "Lk": 20, "D": 16} | sizes))
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=True)
    for name, x in kernels.results(kwargs, OUTPUTS).items():
        assert not x.any() or (name == "lse" and (x == -torch.inf).all())


@in_one_type
def test_finite_biases_of_any_size(kernels):
    """A row of the lowest number gives the mean of the values, as in torch; so do its gradients stay finite."""
    kwargs = make_inputs(Case("bias", B=1, Hq=1, Hkv=1, Lq=3, Lk=20, D=8), kernels.dtype, DEVICE, requires_grad=True)
    for bias in (torch.finfo(torch.float32).min, -1e38, 1e38, -1e9):
        mask = torch.full((3, 20), bias, device=DEVICE)
        actual = kernels.results(kwargs | {"attn_mask": mask}, OUTPUTS)
        mean = kwargs["value"].mean(2, keepdim=True).expand_as(actual["out"])
        if abs(bias) > 1e30:  # beside it the scores are lost in rounding
            torch.testing.assert_close(actual["out"], mean)
        assert all(x.isfinite().all() for x in actual.values())


# ---- torch -------------------------------------------------------------------------------------------------


@in_one_type
@pytest.mark.parametrize("name", ["causal", "float mask", "packed", "paged"])
def test_opcheck(name, kernels):
    case = dataclasses.replace(BY_NAME[name].small(), Hq=2, Hkv=1)
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=case.differentiable)
    prepare = functional.dense if case.packed is None else functional._packed
    spec, tensors = prepare(**kwargs)
    torch.library.opcheck(torch.ops.pyattn.attention_forward.default, (*tensors, *spec, kernels.name))


@in_one_type
def test_compile(kernels):
    kwargs = make_inputs(BY_NAME["gqa"].small(longest=48, head_dim_step=4), kernels.dtype, DEVICE, requires_grad=True)
    compiled = torch.compile(lambda k: run(k, backend=kernels.name, return_lse=True), backend="aot_eager")
    torch._dynamo.reset()
    actual = forward_and_gradients(kwargs, compiled)
    assert_same_bits(actual, kernels.results(kwargs, OUTPUTS))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@in_one_type
def test_cuda_graph(kernels):
    kwargs = make_inputs(Case("graph", Lq=1, Lk=3000, Hkv=2, causal=True), kernels.dtype, DEVICE)
    kernels.run(kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.run(kwargs)
    kwargs["query"].mul_(0.5)
    graph.replay()
    assert torch.equal(out, kernels.run(kwargs))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@in_one_type
def test_the_current_stream(kernels):
    kwargs = make_inputs(BY_NAME["causal"], kernels.dtype, DEVICE)
    expected = kernels.run(kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        late["query"].zero_()
        torch.cuda._sleep(10_000_000)
        late["query"].copy_(kwargs["query"])
        out = kernels.run(late)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@in_one_type
def test_the_tensors_device(kernels):
    kwargs = make_inputs(BY_NAME["causal"], kernels.dtype, "cuda:1")
    check_case({"out": kernels.run(kwargs)}, BY_NAME["causal"], kernels.dtype)


@in_two_types
@pytest.mark.parametrize("length", [1, 40], ids=["decode", "forward"])
def test_a_later_call_of_the_same_kind_takes_its_own_tensors(length, kernels):
    """What is kept of the first call, in which one tensor is query, key and value, is no tensor of it."""
    case = Case("again", B=1, Hq=2, Hkv=2, Lq=length, Lk=length, D=16)
    kwargs = make_inputs(case, kernels.dtype, DEVICE, requires_grad=True)
    one = kwargs["query"].detach().requires_grad_()
    for inputs in (kwargs | {"query": one, "key": one, "value": one}, kwargs):
        grads = random_grads(kernels.results(inputs))
        actual = kernels.results(inputs, OUTPUTS, grads)
        expected = forward_and_gradients(inputs, lambda k: run(k, backend="reference", return_lse=True), OUTPUTS, grads)
        for name, x in expected.items():
            torch.testing.assert_close(actual[name].float(), x.float(), atol=0.03, rtol=0.03, msg=name)
