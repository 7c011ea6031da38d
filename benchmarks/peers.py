"""Other programs' attention, ready to be timed.

A peer is prepared with query, key, value ``[B, H, L, D]`` and causal. It gives a call that computes attention
and returns its output, or a sentence that says why it cannot. It runs with torch's number of threads. Laying
inputs out as it likes them is not timed. The output of one call may be overwritten by the next.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pyattn

Prepared = Callable[[], Tensor] | str


def prepare(name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    try:
        return PEERS[name](query, key, value, causal)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def ours(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    return lambda: pyattn.attention(query, key, value, causal=causal)


def naive(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    return lambda: pyattn.naive_attention(query, key, value, causal=causal)


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def flex(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # compiled code keeps the number of threads it was compiled for
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        L = query.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, L, device=query.device.type)
    return lambda: compiled(query, key, value, block_mask=mask)


def onnxruntime(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if query.dtype != torch.float32 or query.is_cuda:
        return "its MultiHeadAttention on the CPU is for float32"
    B, H, L, D = query.shape
    shape = (B, L, H * D)
    names = ("query", "key", "value")
    node = helper.make_node(
        "MultiHeadAttention",
        names,
        ("out",),
        domain="com.microsoft",
        num_heads=H,
        unidirectional=int(causal),
    )
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*names, "out")}
    graph = helper.make_graph([node], "attention", [infos[name] for name in names], [infos["out"]])
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow whoever is next
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    inputs = [x.transpose(1, 2).reshape(shape).contiguous() for x in (query, key, value)]
    for name, x in zip(names, inputs, strict=True):
        binding.bind_input(name, "cpu", 0, np.float32, shape, x.data_ptr())
    out = torch.empty(shape)
    binding.bind_output("out", "cpu", 0, np.float32, shape, out.data_ptr())

    def run(_inputs_stay_alive: list[Tensor] = inputs) -> Tensor:
        session.run_with_iobinding(binding)
        return out.view(B, L, H, D).transpose(1, 2)

    return run


def openvino(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Prepared:
    import openvino as ov
    from openvino import opset13

    types = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}
    if query.dtype not in types or query.is_cuda:
        return "measured on the CPU, in float32 and bfloat16"
    dtype = types[query.dtype]
    shape = list(query.shape)
    parameters = [opset13.parameter(shape, dtype) for _ in range(3)]
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
        return ov.Tensor(array, shape, dtype)

    out = torch.empty_like(query)
    for i, x in enumerate((query, key, value)):
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
    "torch SDPA": sdpa,
    "naive": naive,
    "FlexAttention": flex,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "flash-attn": flash_attn,
    "xFormers": xformers,
}
