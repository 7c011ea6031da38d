"""torch's own samples of scaled_dot_product_attention, computed by pyattn: a process of ``test_install.py``.

Importing them changes torch's and hypothesis's settings for the whole process, so they have one of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import pyattn

(INFO,) = [info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention"]


def forward_backward(*tensors, **kwargs):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = F.scaled_dot_product_attention(*tensors, **kwargs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights)]


def check_values(dtype):
    """As near to the truth as torch is, though scores are large.

    Samples with dropout have other entries dropped; ``check_gradients`` has them. Half precision rounds gradients
    inside, where torch's CPU kernels do not: those are held to our reference in other files.
    """
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p"):
            continue
        mask = sample.kwargs.pop("attn_mask", None)
        given = [sample.input, *sample.args, *([] if mask is None else [mask])]
        truth = forward_backward(*(x.double() for x in given), **sample.kwargs)
        theirs = forward_backward(*given, **sample.kwargs)
        with pyattn.installed():
            ours = forward_backward(*given, **sample.kwargs)
        count = 1 if dtype in (torch.float16, torch.bfloat16) else len(truth)
        for x, y, z in list(zip(ours, theirs, truth, strict=True))[:count]:
            error, other = ((u - z).abs().max().item() for u in (x, y))
            assert error <= 2 * other + 200 * torch.finfo(dtype).eps * max(z.abs().max().item(), 1), sample


def check_gradients():
    with pyattn.installed():
        for sample in INFO.sample_inputs("cpu", torch.float64, requires_grad=True):

            def function(*tensors, kwargs=sample.kwargs):
                return INFO.op(*tensors, **kwargs)  # which sets the seed

            assert torch.autograd.gradcheck(function, (sample.input, *sample.args), fast_mode=True)


if __name__ == "__main__":
    for dtype in sorted(INFO.dtypes, key=str):
        check_values(dtype)
    check_gradients()
