"""The Triton kernels of ``pyattn.kernels``, on every GPU that Triton knows.

With ``TRITON_INTERPRET=1`` set before Triton is imported the kernels run in its interpreter, on CPU tensors and very
slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyattn import tuning
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, TensorMeta, empty_output, lse_shape, sink_gradient

try:
    import triton

    from pyattn.kernels import attention_bwd, attention_decode, attention_fwd
    from pyattn.kernels.launch import INTERPRETED, Launch, Plan, Tiles, allows_tf32, default_tiles, tensor_arguments
except ImportError as error:  # reported by `unavailable`, never at import
    _import_error = str(error)
else:
    _import_error = ""

OLDEST = (3, 6)  # release of Triton
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # rows and keys are counted in 32 bits, with room for an offset
DECODE_ROWS = 64  # query heads times queries of a key head, up to which keys are split
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced: dict[str, Tiles] = {}


@contextlib.contextmanager
def use_tiles(**by_op: Tiles) -> Iterator[None]:
    """Other tiles within a ``with`` block, by op ("forward", "decode", "dkdv", "dq"): for tests and tuning."""
    before = dict(_forced)
    _forced.update(by_op)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def arch(device: torch.device) -> str:
    """The architecture of a device, as the tables of ``pyattn.tuning`` are named."""
    if INTERPRETED:
        return "interpreter"
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def tiles_for(op: str, arch: str, dtype: torch.dtype, head_dim: int, causal: bool, masked: bool) -> Tiles:
    """The measured tiles of a kernel, or the heuristic's; calls with a mask have not been measured."""
    if op in _forced:
        return _forced[op]
    version = ".".join(triton.__version__.split(".")[:2])
    name = str(dtype).removeprefix("torch.")
    measured = None if masked else tuning.table(arch).get(tuning.key(op, name, head_dim, causal, version))
    return Tiles(**measured) if measured else default_tiles(op, arch, dtype, head_dim, masked)


def unavailable() -> list[str]:
    if _import_error:
        return [f"triton cannot be imported ({_import_error})"]
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return [f"needs triton {'.'.join(map(str, OLDEST))} or later, this is {triton.__version__}"]
    if not INTERPRETED and not torch.cuda.is_available():
        return ["torch finds no GPU"]
    return []


def why_not_operand(meta: TensorMeta) -> list[str]:
    """Reasons against the device and the dtype of an operand."""
    reasons = []
    if INTERPRETED:
        if meta.device.type != "cpu":
            reasons.append(f"is in Triton's interpreter, which takes CPU tensors; these are on {meta.device.type}")
    elif meta.device.type != "cuda":
        reasons.append(f"runs on GPU tensors, these are on {meta.device.type}")
    elif torch.version.hip is None and (capability := torch.cuda.get_device_capability(meta.device)) < (8, 0):
        reasons.append(f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
    if meta.dtype not in _DTYPES:
        reasons.append(f"computes in float32, the input is {str(meta.dtype).removeprefix('torch.')}")
    return reasons


def why_not(problem: Problem) -> list[str]:
    query = problem.query
    reasons = why_not_operand(query)
    for name, meta in (("D", query), ("Dv", problem.value)):
        if not 1 <= meta.shape[-1] <= MAX_HEAD_DIM:
            reasons.append(f"{name} must lie in [1, {MAX_HEAD_DIM}], it is {meta.shape[-1]}")
    if max(problem.query_length, problem.key_length) >= MAX_LENGTH:
        reasons.append(f"takes at most {MAX_LENGTH - 1} rows and keys")
    if problem.op == "backward" and problem.has("block_table"):
        reasons.append("has no gradient of paged keys")
    return reasons


def _kind(spec: AttentionSpec, arch: str, query: Any, value: Any, masked: bool) -> tuple[Any, ...]:
    """What tiles depend on: all that ``tiles_for`` takes but the op."""
    return arch, query.dtype, max(query.shape[-1], value.shape[-1]), spec.window_right == 0, masked


def _decode_rows(spec: AttentionSpec, query: Any, key: Any, packed: bool) -> int | None:
    """Rows of a tile that holds all queries of a key head, if there are few enough for the keys to be split."""
    queries = spec.max_seqlen_q if packed else query.shape[2]
    if queries is None:
        return None  # nobody has said, and to look would be to wait for the GPU
    rows = queries * (query.shape[1] // max(key.shape[1], 1))
    return rows if rows <= DECODE_ROWS else None


def _decode_tiles(rows: int, arch: str, dtype: torch.dtype, head_dim: int, causal: bool, masked: bool) -> Tiles:
    """One tile for all rows, where its registers and shared memory allow; otherwise several of 16 rows."""
    tall = rows > 16 and dtype != torch.float32 and not masked
    return tiles_for("decode", arch, dtype, head_dim, causal, masked)._replace(BLOCK_M=DECODE_ROWS if tall else 16)


def describe(problem: Problem) -> str:
    query, key = problem.query, problem.key
    args = _kind(problem.spec, arch(query.device), query, problem.value, problem.has("attn_mask"))
    if problem.op == "backward":
        return f"keys: {tiles_for('dkdv', *args)}; queries: {tiles_for('dq', *args)}"
    rows = _decode_rows(problem.spec, query, key, problem.packed)
    if rows is None:
        return str(tiles_for("forward", *args))
    tiles = _decode_tiles(rows, *args)
    return f"parts of {tiles.SPLIT} keys, {tiles}"


# By kind of call. Kinds are as many as there are lengths, so an old one has to go some time.
_plans: dict[Any, Plan] = {}
_MAX_PLANS = 4096


def start(
    kind: tuple[Any, ...],
    launches: Callable[[], Sequence[Launch]],
    tensors: dict[str, Tensor | None],
    device: torch.device,
) -> None:
    """Runs launches on the current stream of ``device``, by the plan of an earlier call of this kind if there is one.

    Args:
        kind: all that the launches depend on but their tensors' addresses.
        launches: makes them.
        tensors: the arguments that the caller keeps, by the kernels' names for them.
        device: of the tensors.
    """
    aligned = tuple([x is None or x.data_ptr() % 16 == 0 for x in tensors.values()])
    key = (*kind, aligned, DECODE_ROWS, frozenset(_forced.items()) if _forced else None)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if plan := _plans.get(key):
            return plan.run(tensors, device)
        plan = Plan(launches(), tensors)
        if plan.complete:
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = plan


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def _max_keys(spec: AttentionSpec, t: AttentionTensors) -> int:
    if t.block_table is not None:
        return t.block_table.shape[1] * t.key.shape[2]
    if t.cu_seqlens_k is None:
        return t.key.shape[2]
    return t.key.shape[0] if spec.max_seqlen_k is None else spec.max_seqlen_k


def forward_launches(spec: AttentionSpec, t: AttentionTensors, out: Tensor, lse: Tensor, arch: str) -> list[Launch]:
    """The kernels that fill ``out`` and ``lse``."""
    args = _kind(spec, arch, t.query, t.value, t.attn_mask is not None)
    products = precision(t.query.dtype)
    rows = _decode_rows(spec, t.query, t.key, t.cu_seqlens_q is not None)
    if rows is None:
        return [attention_fwd.forward(spec, t, out, lse, tiles_for("forward", *args), products)]
    return attention_decode.decode(spec, t, out, lse, _max_keys(spec, t), _decode_tiles(rows, *args), products)


def forward(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    out = empty_output(t.query, t.value.shape[-1])
    lse = t.query.new_empty(lse_shape(t.query), dtype=torch.float32)
    device = t.query.device
    kind = Problem.of("forward", spec, t), precision(t.query.dtype)
    tensors = tensor_arguments(t) | {"OUT": out, "LSE": lse}
    start(kind, lambda: forward_launches(spec, t, out, lse, arch(device)), tensors, device)
    return out, lse


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of query, key, value, attn_mask, sinks


def backward_launches(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: Sequence[Tensor],
    grad_mask: Tensor | None,
    arch: str,
) -> list[Launch]:
    """The kernels that fill ``delta``, then ``grads`` of query, key and value, and the mask's."""
    args = _kind(spec, arch, t.query, t.value, t.attn_mask is not None)
    products = precision(t.query.dtype)
    common = (spec, t, lse, grad_out, delta)
    by_keys, by_queries = tiles_for("dkdv", *args), tiles_for("dq", *args)
    launches = [
        attention_bwd.preprocess(out, lse, grad_out, grad_lse, delta),
        attention_bwd.dkdv(*common, grads[1], grads[2], by_keys, products),
        attention_bwd.dq(*common, grads[0], by_queries, products),
    ]
    if grad_mask is not None:
        launches.append(attention_bwd.dmask(*common, grad_mask, by_queries, products))
    return launches


def backward(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
) -> Gradients:
    out, grad_out, lse = _dense_rows(out), _dense_rows(grad_out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    grads = torch.empty_like(t.query), torch.empty_like(t.key), torch.empty_like(t.value)
    grad_mask = None
    if needs_mask_grad:
        assert t.attn_mask is not None
        grad_mask = t.attn_mask.new_empty(t.attn_mask.shape)
    device = t.query.device
    tensors = tensor_arguments(t) | {
        "OUT": out,
        "LSE": lse,
        "DELTA": delta,
        "DO": grad_out,
        "DLSE": grad_lse,
        "DQ": grads[0],
        "DK": grads[1],
        "DV": grads[2],
        "DMASK": grad_mask,
    }
    # Where gradients lie follows from where the inputs do.
    kind = Problem.of("backward", spec, t), precision(t.query.dtype), out.stride(), grad_out.stride()
    arguments = (spec, t, out, lse, delta, grad_out, grad_lse, grads, grad_mask, arch(device))
    start((*kind, grad_lse is None, needs_mask_grad), lambda: backward_launches(*arguments), tensors, device)
    return *grads, grad_mask, None if t.sinks is None else sink_gradient(t.sinks, lse, delta)
