"""The library of torch's ops that pyattn's are defined in, and what the kernels of all of them share.

``Library.define`` and ``impl`` register them: ``torch.library.custom_op`` costs several times as much a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad, profiler

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)

library = torch.library.Library("pyattn", "DEF")


def below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    """Calls ``op`` from the inside of an autograd.Function, which records it.

    The Function has turned grad mode off. For tensors of ``torch.func`` it is that of the level below, whose own
    kernel must record the op too: without it nested derivatives would be zero.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def differentiable(op: Any, apply: Any) -> Any:
    """The kernel of the Autograd key: ``apply`` records where a gradient may be asked for; a tangent is refused."""

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
            return apply(args)
        with enable_single_level_autograd_function():
            return apply(args)

    return kernel


def register(name: str, op: Any, *, compute: Any, fake: Any, differentiable: Any, vmap: Any) -> None:
    """The kernels of the op ``name``; ``vmap(op, batch_size, in_dims, args)`` returns outputs batched at 0."""

    def vmapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], int]:
        return vmap(op, info.batch_size, in_dims, args), 0

    library.impl(name, compute, "CompositeExplicitAutograd")
    library.impl(name, differentiable, "Autograd")
    torch.library.register_fake(f"pyattn::{name}", fake, lib=library)
    torch.library.register_vmap(f"pyattn::{name}", vmapped, lib=library)


def unobserved(tensors: Iterable[Any]) -> bool:
    """Whether an op on them may be computed at once: nobody would see it pass torch's dispatcher.

    That takes 5 microseconds and more. It is in eager mode, on dense tensors of a CPU or GPU: no subclass, mode,
    tracer, profiler or functorch level, no autocast, no lazy negation.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if (
            type(x) not in _TENSOR_TYPES
            or not (x.is_cpu or x.is_cuda)
            or x.is_neg()
            or x.is_nested
            or x.layout is not torch.strided
        ):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_any_autocast_enabled()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not profiler._is_profiler_enabled
    )
