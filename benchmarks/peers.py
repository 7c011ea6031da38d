"""Other programs' attention, ready to be timed.

A peer is prepared with query ``[B, Hq, Lq, D]``, key and value ``[B, Hkv, Lk, D]`` and causal, which needs Lq = Lk:
peers differ in what it means otherwise. It gives a call that computes attention and returns its output, or a sentence
that says why it cannot. Where query, key and value require gradients, the output has a graph. It runs with torch's
number of threads. Laying inputs out as it likes them is not timed. The output of one call may be overwritten by the
next.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyattn

Prepared = Callable[[], Tensor] | str
INFERENCE_ONLY = "an inference engine: it has no backward"
PAGE_SIZE = 16


def prepare(name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    try:
        return (PEERS | ON_GPUS)[name](query, key, value, causal)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    return lambda: pyattn.attention(query, key, value, causal=causal)


def ours_by(backend: str, **options: Any) -> Callable[[Tensor, Tensor, Tensor, bool], Prepared]:
    def prepare(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
        return lambda: pyattn.attention(query, key, value, causal=causal, backend=backend, **options)

    return prepare


def ours_paged(*, shuffled: bool, backend: str | None = None) -> Callable[[Tensor, Tensor, Tensor, bool], Prepared]:
    """The same keys and values in pages: as a cache takes them, or in random order, as after many texts have come."""

    def prepare(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
        B, _, L, _ = key.shape
        if L % PAGE_SIZE:
            return f"the keys must fill pages of {PAGE_SIZE}"
        numbers = (torch.randperm if shuffled else torch.arange)(B * L // PAGE_SIZE)
        table = numbers.to(torch.int32).view(B, -1).to(key.device)
        # [B, Hkv, L, D] -> [B, pages of a sample, Hkv, PAGE_SIZE, D] -> [pages, Hkv, PAGE_SIZE, D]
        pages = [x.unflatten(2, (-1, PAGE_SIZE)).transpose(1, 2).flatten(0, 1) for x in (key, value)]
        order = table.flatten().argsort()
        key_pages, value_pages = (x[order] for x in pages)
        lengths = torch.full((B,), L, dtype=torch.int32, device=key.device)
        arguments = {"block_table": table, "kv_lengths": lengths, "causal": causal, "backend": backend}
        if pyattn.explain(query, key_pages, value_pages, **arguments).chosen["forward"] == "reference":
            return "pyattn has no kernel for pages here"
        return lambda: pyattn.attention(query, key_pages, value_pages, **arguments)

    return prepare


def naive(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    return lambda: pyattn.naive_attention(query, key, value, causal=causal)


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    grouped = query.shape[1] != key.shape[1]
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


def sdpa_by(backend: str) -> Callable[[Tensor, Tensor, Tensor, bool], Prepared]:
    """torch's SDPA held to one of its kernels for GPUs; the call raises where that kernel refuses."""

    def prepare(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        call = sdpa(query, key, value, causal)

        def run() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return call()  # type: ignore[operator]

        return run

    return prepare


def flex(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if query.requires_grad and not query.is_cuda:
        return "NotImplementedError: it does not support backward on CPU"
    torch.compiler.reset()  # compiled code keeps the number of threads it was compiled for
    torch._functorch.config.donated_buffer = False  # a graph is kept: its backward runs more than once
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        L = query.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, L, device=query.device.type)
    grouped = query.shape[1] != key.shape[1]
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=grouped)


def onnxruntime(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if query.requires_grad:
        return INFERENCE_ONLY
    if query.dtype != torch.float32 or query.is_cuda:
        return "its attention on the CPU is for float32"
    heads, kv_heads = query.shape[1], key.shape[1]
    # [B, H, L, D] -> [B, L, H * D]
    inputs = [x.transpose(1, 2).flatten(2).contiguous() for x in (query, key, value)]
    out = torch.empty_like(inputs[0])
    names = ("query", "key", "value")
    if query.shape[2] == key.shape[2]:
        domain, op = "com.microsoft", "MultiHeadAttention"
        attributes = {"num_heads": heads, "unidirectional": int(causal)}
    else:  # with few queries its other operator is the faster one, and it takes grouped heads
        domain, op = "", "Attention"
        attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    node = helper.make_node(op, names, ("out",), domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)
        for name, x in zip((*names, "out"), (*inputs, out), strict=True)
    ]
    graph = helper.make_graph([node], "attention", infos[:3], infos[3:])
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow whoever is next
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, x in zip(names, inputs, strict=True):
        binding.bind_input(name, "cpu", 0, np.float32, x.shape, x.data_ptr())
    binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.data_ptr())

    def run(_inputs_stay_alive: list[Tensor] = inputs) -> Tensor:
        session.run_with_iobinding(binding)
        return out.unflatten(2, (heads, -1)).transpose(1, 2)

    return run


def openvino(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    import openvino as ov
    from openvino import opset13

    types = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}
    if query.requires_grad:
        return INFERENCE_ONLY
    if query.dtype not in types or query.is_cuda:
        return "measured on the CPU, in float32 and bfloat16"
    if key.shape[1] not in (1, query.shape[1]):
        return "it takes one key head, or as many as query heads"
    dtype = types[query.dtype]
    inputs = (query, key, value)
    parameters = [opset13.parameter(list(x.shape), dtype) for x in inputs]
    model = ov.Model([opset13.scaled_dot_product_attention(*parameters, causal=causal)], parameters)
    settings = {
        "INFERENCE_PRECISION_HINT": dtype.get_type_name(),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # it would pin this process's threads, which belong to all
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def shared(x: Tensor) -> ov.Tensor:  # numpy has no bfloat16: the bits go through int16
        array = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
        return ov.Tensor(array, list(x.shape), dtype)

    out = torch.empty_like(query)
    for i, x in enumerate(inputs):
        request.set_input_tensor(i, shared(x))
    request.set_output_tensor(0, shared(out))

    def run() -> Tensor:
        request.infer()
        return out

    return run


def flash_attn(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    from flash_attn import flash_attn_func

    if not query.is_cuda or query.dtype == torch.float32:
        return "for half precision on a GPU"
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return lambda: flash_attn_func(q, k, v, causal=causal).transpose(1, 2)


def xformers(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if not query.is_cuda:
        return "for a GPU"
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    bias = LowerTriangularMask() if causal else None
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Prepared]] = {
    "pyattn": ours,
    "pyattn, pages": ours_paged(shuffled=False),
    "pyattn, shuffled pages": ours_paged(shuffled=True),
    "torch SDPA": sdpa,
    "naive": naive,
    "FlexAttention": flex,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "flash-attn": flash_attn,
    "xFormers": xformers,
}
ON_GPUS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Prepared]] = {
    "pyattn, cuda": ours_by("cuda"),
    "pyattn, triton": ours_by("triton"),
    "pyattn, cuda, any order": ours_by("cuda", deterministic=False),
    "pyattn, cuda, pages": ours_paged(shuffled=True, backend="cuda"),
    "pyattn, triton, pages": ours_paged(shuffled=True, backend="triton"),
    "SDPA flash": sdpa_by("FLASH_ATTENTION"),
    "SDPA cuDNN": sdpa_by("CUDNN_ATTENTION"),
    "SDPA efficient": sdpa_by("EFFICIENT_ATTENTION"),
}
