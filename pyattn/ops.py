"""The ops of ``torch.ops.pyattn``: schemas, kernels, fakes, autograd, autocast, vmap.

An op chooses its backend inside, when it runs, so an exported graph holds no machine's choice. The kernels are
registered with ``Library.define`` and ``impl``: ``torch.library.custom_op`` costs several times as much a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nested._internal.nested_tensor import NestedTensor

from pyattn import batching, dispatch, flops, log, nested
from pyattn.checks import check_gradients, check_values
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, empty_output, lse_dtype, lse_shape

_TENSORS = "Tensor query, Tensor key, Tensor value, " + ", ".join(
    f"Tensor? {name}" for name in AttentionTensors._fields[3:]
).replace("Tensor? q_offset", "Tensor? q_offsets")
_SPEC = (
    "float scale, SymInt? window_left, SymInt? window_right, SymInt? q_offset, float softcap, float dropout_p, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)
_NUM_TENSORS = len(AttentionTensors._fields)
_ALIBI_SLOPES, _BLOCK_TABLE = (AttentionTensors._fields.index(name) for name in ("alibi_slopes", "block_table"))
_NUM_ARGS = _NUM_TENSORS + len(AttentionSpec._fields)

_library = torch.library.Library("pyattn", "DEF")
_library.define(f"attention_forward({_TENSORS}, {_SPEC}, str backend) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward({_TENSORS}, {_SPEC}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    "bool needs_mask_grad, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward_op = torch.ops.pyattn.attention_forward.default
_backward_op = torch.ops.pyattn.attention_backward.default


def _unpack(args: tuple[Any, ...]) -> tuple[AttentionSpec, AttentionTensors]:
    """Tensors and spec of an op's arguments, with last strides of 1: kernels take any other stride."""
    query, key, value = args[:3]
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        args = (*(x if x.stride(-1) == 1 else x.contiguous() for x in args[:3]), *args[3:])
    return AttentionSpec._make(args[_NUM_TENSORS:_NUM_ARGS]), AttentionTensors._make(args[:_NUM_TENSORS])


# ---- forward ------------------------------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    spec, tensors = _unpack(args)
    check_values(tensors, spec.max_seqlen_q, spec.max_seqlen_k)
    problem = Problem.of("forward", spec, tensors)
    backend = dispatch.select(problem, args[-1])
    if log.depth:
        return log.timed(problem, args[-1], lambda: backend.forward(spec, tensors))
    return backend.forward(spec, tensors)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    _, t = _unpack(args)
    return (
        empty_output(t.query, t.value.shape[-1]),
        t.query.new_empty(lse_shape(t.query), dtype=lse_dtype(t.query.dtype)),
    )


# ---- backward -----------------------------------------------------------------------------------------------


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, tensors = _unpack(args)
    problem = Problem.of("backward", spec, tensors)
    backend = dispatch.select(problem, args[-1])

    def run() -> Gradients:
        return backend.backward(spec, tensors, *args[_NUM_ARGS:-1])

    dq, dk, dv, dmask, dsinks = log.timed(problem, args[-1], run) if log.depth else run()
    # An op cannot return an optional tensor: an empty one stands for "no gradient".
    nothing = [tensors.query.new_empty(0) for _ in range(2)]
    return dq, dk, dv, nothing[0] if dmask is None else dmask, nothing[1] if dsinks is None else dsinks


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, t = _unpack(args)
    dq, dk, dv = (torch.empty_like(x) for x in (t.query, t.key, t.value))
    needs_mask_grad = args[-2]
    dmask = t.attn_mask.new_empty(t.attn_mask.shape) if needs_mask_grad else t.query.new_empty(0)  # type: ignore[union-attr]
    dsinks = t.query.new_empty(0) if t.sinks is None else torch.empty_like(t.sinks)
    return dq, dk, dv, dmask, dsinks


# ---- autograd -----------------------------------------------------------------------------------------------


def _below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    """Calls ``op`` from the inside of an autograd.Function, which records it.

    The Function has turned grad mode off. For tensors of ``torch.func`` it is that of the level below, whose own
    kernel must record the op too: without it nested derivatives would be zero.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return op(*args)


# A kernel of the Autograd key runs once for each level of torch.func, with that level's tensors. So it needs the
# Function of one level; torch.autograd.Function would start over at the top of the levels.


class _Attention(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        if ctx.needs_input_grad[_ALIBI_SLOPES] or args[_BLOCK_TABLE] is not None:
            # Those of a call inside vmap show only here: there no tensor says that it requires a gradient.
            needed = [
                name
                for name, need in zip(AttentionTensors._fields, ctx.needs_input_grad[:_NUM_TENSORS], strict=True)
                if need
            ]
            check_gradients(needed, paged=args[_BLOCK_TABLE] is not None)
        out, lse = _below_autograd(_forward_op, args)
        ctx.save_for_backward(*args[:_NUM_TENSORS], out, lse)
        ctx.numbers = args[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        *spec, backend = ctx.numbers
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs_mask_grad = ctx.needs_input_grad[3]
        gradients = _backward_op(*tensors, *spec, out, lse, grad_out, grad_lse, needs_mask_grad, backend)
        dq, dk, dv, dmask, dsinks = gradients
        grads: list[Tensor | None] = [None] * (_NUM_ARGS + 1)
        for i, grad in ((0, dq), (1, dk), (2, dv), (3, dmask), (5, dsinks)):
            if ctx.needs_input_grad[i]:
                grads[i] = grad
        return tuple(grads)


class _AttentionBackward(torch.autograd.function._SingleLevelFunction):
    """The gradients, which remember that they depend on their inputs, and say so when that is needed."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return _below_autograd(_backward_op, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError("pyattn::attention_backward has no derivative: second derivatives are not supported")


def _differentiable(op: Any, function: Any) -> Any:
    """The kernel of the Autograd key: records ``function`` where a gradient may be asked for, refuses a tangent."""

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        if forward_ad._current_level >= 0:
            for x in args:
                if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                    raise NotImplementedError(
                        f"{op.name()} has no forward-mode derivative: jvp and dual tensors are not supported"
                    )
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        with enable_single_level_autograd_function():
            return function.apply(*args)

    return kernel


# ---- autocast -----------------------------------------------------------------------------------------------


def _forward_autocast(device_type: str) -> Any:
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """Query, key and value in the autocast dtype; masks, slopes and sinks keep theirs."""
        dtype = torch.get_autocast_dtype(device_type)
        qkv = [x if x.dtype == torch.float64 else x.to(dtype) for x in args[:3]]
        mask = args[3]
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, qkv[0].dtype):
            mask = mask.to(qkv[0].dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _forward_op(*qkv, mask, *args[4:])

    return forward


# ---- vmap ---------------------------------------------------------------------------------------------------


def _vmapped(op: Any, rule: Any) -> Any:
    def kernel(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], int]:
        return rule(op, info.batch_size, in_dims, args), 0

    return kernel


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_forward", _differentiable(_forward_op, _Attention), "Autograd")
_library.impl("attention_backward", _differentiable(_backward_op, _AttentionBackward), "Autograd")
_library.impl("attention_forward", _forward_autocast("cpu"), "AutocastCPU")
_library.impl("attention_forward", _forward_autocast("cuda"), "AutocastCUDA")
torch.library.register_fake("pyattn::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("pyattn::attention_backward", _backward_fake, lib=_library)
torch.library.register_vmap("pyattn::attention_forward", _vmapped(_forward_op, batching.forward), lib=_library)
torch.library.register_vmap("pyattn::attention_backward", _vmapped(_backward_op, batching.backward), lib=_library)
flops.register()


@torch.library.register_torch_dispatch("pyattn::attention_forward", NestedTensor, lib=_library)
def _forward_nested(cls: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Reached when only some are nested: ``functional`` unpacks the others. A check there would cost every call."""
    nested.refuse(*args[:3])


def attention(spec: AttentionSpec, t: AttentionTensors, backend: str) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``torch.ops.pyattn.attention_forward``, differentiable."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # inside vmap requires_grad is always False
        or forward_ad._current_level >= 0
        or t.query.requires_grad
        or t.key.requires_grad
        or t.value.requires_grad
        or (t.attn_mask is not None and t.attn_mask.requires_grad)
        or (t.sinks is not None and t.sinks.requires_grad)
    ):
        return _forward_op(*t, *spec, backend)
    with torch._C._AutoDispatchBelowAutograd():  # nothing to record: saves the way through Python's autograd kernel
        return _forward_op(*t, *spec, backend)
