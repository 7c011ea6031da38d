"""One list of workloads for tests, benchmarks and tuning, and the rule by which a result is judged.

``CASES`` names the problems, ``make_inputs`` makes their tensors, ``run`` calls the right function,
``forward_and_gradients`` differentiates it, and ``assert_close`` holds a result to the float64 reference by a rule
instead of a number for each test; ``check_case`` does it for all that a case gives.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pyattn import functional, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels compute in; float64 is the reference's
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "sinks")
OUTPUTS = ("out", "lse")


@dataclass(frozen=True)
class Case:
    """One problem. Lengths, starts and offsets are one a sample; ``packed`` holds ``(Lq, Lk)`` of each sequence."""

    name: str
    B: int = 2
    Hq: int = 4
    Hkv: int = 4
    Lq: int = 70
    Lk: int = 70
    D: int = 64
    Dv: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | tuple[int, ...] | None = None
    mask: str | None = None  # "bool", "float" (of the query's dtype) or "float32"
    mask_shape: str = "BHQK"  # a letter replaced by 1 broadcasts; a small one is of full size, expanded (stride 0)
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    kv_lengths: tuple[int, ...] | None = None
    kv_starts: tuple[int, ...] | None = None
    page_size: int | None = None
    dropout_p: float = 0.0
    scale: float | None = None
    packed: tuple[tuple[int, int], ...] | None = None
    layout: str = "BHLD"  # memory order of query, key and value

    @property
    def batch(self) -> int:
        return self.B if self.packed is None else len(self.packed)

    @property
    def differentiable(self) -> bool:
        """Whether all its floating tensors may ask for a gradient: paged keys have none."""
        return self.page_size is None

    def small(self, longest: int = 6, head_dim_step: int = 32) -> Case:
        """The same features with at most about ``longest`` rows and keys, and head dims a ``head_dim_step``-th.

        By default small enough to go through one by one.
        """

        def shrink(x: Any, step: int) -> Any:
            if isinstance(x, tuple):
                return tuple(shrink(y, step) for y in x)
            return None if x is None else -(-x // step)

        step = max(self.Lq, self.Lk) // longest + 1 if self.packed is None else 16
        lengths = ("Lq", "Lk", "window", "q_offset", "kv_lengths", "kv_starts", "packed")
        changes = {name: shrink(getattr(self, name), step) for name in lengths}
        changes |= {"D": shrink(self.D, head_dim_step), "Dv": shrink(self.Dv, head_dim_step)}
        if self.page_size is not None:
            changes |= {"page_size": 2, "Lk": changes["Lk"] * 2}
        return dataclasses.replace(self, **changes)


CASES = [
    Case("full"),
    Case("causal", causal=True),
    Case("one query", Lq=1, Lk=300, causal=True),
    Case("one key", Lq=5, Lk=1),
    Case("long", B=1, Hq=2, Hkv=2, Lq=515, Lk=517),
    Case("long causal", B=1, Hq=2, Hkv=2, Lq=515, Lk=515, causal=True),
    Case("causal, more keys", Lq=33, Lk=130, causal=True),
    Case("causal, more queries", Lq=130, Lk=33, causal=True),
    Case("causal, top-left", Lq=33, Lk=130, causal=True, q_offset=0),
    Case("causal, offset beyond the keys", Lq=20, Lk=30, causal=True, q_offset=25),
    Case("causal, offset before the keys", Lq=40, Lk=30, causal=True, q_offset=-20),
    Case("gqa", Hq=6, Hkv=2, Lq=65, Lk=90, causal=True),
    Case("mqa", Hq=5, Hkv=1),
    Case("window", Lq=150, Lk=150, window=(40, 0)),
    Case("window, both sides", Lq=150, Lk=170, window=(17, 23)),
    Case("window, narrow", Lq=100, Lk=100, window=(0, 0)),
    Case("window, right only", Lq=90, Lk=70, window=(None, 9), q_offset=3),
    Case("window, rows past the keys", Lq=60, Lk=30, window=(5, 0), q_offset=10),
    Case("window, causal", Lq=100, Lk=300, window=(100, 7), causal=True),
    Case("head dim 1", D=1),
    Case("head dim 33", D=33, causal=True),
    Case("head dim 80, v 48", D=80, Dv=48),
    Case("head dim 128", D=128, causal=True),
    Case("head dim 192, v 128", B=1, D=192, Dv=128, causal=True),
    Case("head dim 512", B=1, Hq=2, Hkv=2, D=512),
    Case("head dim 7, v 300", D=7, Dv=300),
    Case("BLHD", layout="BLHD", causal=True, Hkv=2),
    Case("scale", scale=0.5),
    Case("scale negative", scale=-0.2, causal=True),
    Case("scale zero", scale=0.0, causal=True),
    Case("bool mask", mask="bool"),
    Case("bool mask, keys only", mask="bool", mask_shape="B11K", causal=True),
    Case("float mask", mask="float", Lk=90),
    Case("float mask, one for all", mask="float", mask_shape="11QK"),
    Case("float mask, rows only", mask="float", mask_shape="1HQ1", window=(30, 30)),
    Case("padding right", kv_lengths=(70, 13), causal=True),
    Case("padding left", kv_starts=(0, 31), causal=True),
    Case("padding, empty sample", kv_lengths=(0, 50), kv_starts=(0, 50)),
    Case("padding both, window", Lq=40, Lk=200, kv_lengths=(190, 77), kv_starts=(3, 50), window=(64, 0)),
    Case("offset per sample", Lq=20, Lk=80, q_offset=(0, 37), causal=True),
    Case("alibi", alibi=True, causal=True),
    Case("alibi, both sides, gqa", alibi=True, Hkv=2, Lq=50, Lk=90, q_offset=11),
    Case("softcap", softcap=3.0, scale=1.0),
    # Heads enough that the largest error of a sink's gradient, one number a head, is no matter of luck.
    Case("sinks", Hq=16, sinks=True, causal=True),
    Case("sinks, window, empty rows", Hq=16, sinks=True, window=(20, 0), Lq=100, Lk=60, q_offset=-10),
    Case("dropout", dropout_p=0.3, causal=True),
    Case("dropout, everything", dropout_p=1.0),
    Case("paged", Lq=9, Lk=112, page_size=16, kv_lengths=(100, 37), causal=True),
    Case("paged, odd pages", Lq=1, Lk=105, Hkv=1, page_size=7, kv_lengths=(105, 1)),
    Case("paged, window", Hq=6, Hkv=2, Lq=3, Lk=640, D=32, page_size=64, kv_lengths=(640, 0), window=(300, 0)),
    Case("paged, many queries", Hkv=2, Lq=150, Lk=320, D=32, Dv=40, page_size=32, kv_lengths=(320, 170),
         kv_starts=(0, 65), causal=True),
    Case("paged, mask", Lq=2, Lk=200, D=16, page_size=8, kv_lengths=(190, 55), mask="float"),
    Case("packed", packed=((70, 70), (1, 1), (0, 9), (33, 33)), causal=True),
    Case("packed, lengths differ", packed=((5, 80), (64, 3), (7, 0)), window=(30, 2), Hkv=2),
    Case("packed, family", Hq=16, packed=((40, 40), (9, 50)), alibi=True, sinks=True, softcap=5.0, dropout_p=0.2),
    Case("everything", Hq=32, Lq=60, Lk=150, Hkv=2, D=40, Dv=24, causal=True, window=(100, 0), mask="float", alibi=True,
         softcap=4.0, sinks=True, kv_lengths=(150, 90), kv_starts=(10, 0), dropout_p=0.1, scale=0.3),
    # One query and few: their keys may be split over threads.
    Case("decode", Hq=8, Hkv=2, Lq=1, Lk=2500),
    Case("decode, window", Hq=6, Hkv=2, Lq=4, Lk=1300, D=32, window=(1000, 0), kv_lengths=(1300, 600)),
    Case("decode, mask", Hkv=2, Lq=8, Lk=700, D=32, mask="bool", causal=True),
    # Several tiles of queries and of keys, none of them whole: what a gradient sums over.
    Case("tiles, gqa", B=1, Hq=6, Hkv=2, Lq=300, Lk=330, causal=True),
    Case("tiles, gqa, window", B=1, Hq=8, Hkv=2, Lq=210, Lk=270, D=32, window=(70, 10)),
    Case("tiles, rows without keys", B=1, Hq=2, Hkv=1, Lq=330, Lk=110, D=32, causal=True),
    Case("tiles, padding", Hkv=2, Lq=200, Lk=300, D=16, kv_lengths=(300, 131), kv_starts=(65, 0)),
    Case("tiles, bool mask", Hkv=2, Lq=200, Lk=230, D=16, mask="bool"),
    Case("tiles, head dim 40, v 104", B=1, Hkv=2, Lq=210, Lk=230, D=40, Dv=104, layout="BLHD", causal=True),
    Case("tiles, head dim 136, v 24", B=1, Hq=3, Hkv=1, Lq=150, Lk=210, D=136, Dv=24),
    Case("tiles, head dim 256", B=1, Hq=2, Hkv=1, Lq=210, Lk=390, D=256),
    Case("tiles, head dim 512", B=1, Hq=2, Hkv=1, Lq=260, Lk=260, D=512, causal=True),
    Case("tiles, float mask", Hkv=2, Lq=201, Lk=230, D=32, mask="float", causal=True),
    Case("tiles, float mask 11QK", Hkv=1, Lq=200, Lk=250, D=32, mask="float", mask_shape="11QK", window=(90, 40)),
    Case("tiles, float mask 1HQK", Hkv=2, Lq=210, Lk=199, D=16, mask="float", mask_shape="1HQK"),
    Case("tiles, float mask B1QK", Hkv=2, Lq=210, Lk=199, D=16, mask="float", mask_shape="B1QK", layout="BLHD"),
    Case("tiles, float mask B11K", Hkv=2, Lq=200, Lk=250, D=16, mask="float", mask_shape="B11K", window=(60, 30)),
    Case("tiles, float mask 1H1K", Hkv=2, Lq=200, Lk=250, D=16, mask="float", mask_shape="1H1K", causal=True),
    Case("tiles, float mask 1HQ1", Hkv=2, Lq=250, Lk=200, D=16, mask="float", mask_shape="1HQ1"),
    Case("tiles, float32 mask", Hkv=2, Lq=200, Lk=250, D=32, mask="float32", causal=True),
    Case("tiles, float32 mask 11QK", Hkv=2, Lq=199, Lk=210, D=16, mask="float32", mask_shape="11QK"),
    Case("tiles, expanded mask", Hkv=2, Lq=200, Lk=210, D=16, mask="float", mask_shape="bhQK", window=(90, 9)),
    Case("tiles, alibi", Hq=6, Hkv=2, Lq=201, Lk=230, D=16, alibi=True, q_offset=5, window=(150, 40)),
    Case("tiles, softcap", Hkv=2, Lq=201, Lk=230, D=32, softcap=2.0, scale=0.5, causal=True),
    Case("tiles, sinks", Hq=16, Hkv=2, Lq=201, Lk=150, D=16, sinks=True, window=(90, 11), q_offset=-30),
    Case("tiles, dropout", Hkv=2, Lq=201, Lk=230, D=32, dropout_p=0.2, window=(101, 37)),
    Case("tiles, dropout, mask", Hkv=2, Lq=130, Lk=199, D=16, dropout_p=0.5, mask="float", mask_shape="1HQK"),
    Case("tiles, softcap, mask", Hkv=2, Lq=130, Lk=199, D=16, softcap=1.0, scale=0.5, mask="float"),
    Case("tiles, family", Hq=16, Hkv=4, Lq=190, Lk=211, D=40, Dv=24, alibi=True, softcap=3.0, sinks=True, dropout_p=0.1,
         kv_lengths=(211, 90), kv_starts=(33, 7), causal=True, layout="BLHD"),
    Case("decode, alibi", Hq=8, Hkv=2, Lq=1, Lk=1500, alibi=True, kv_lengths=(1500, 333)),
    Case("decode, family", Hq=16, Hkv=2, Lq=4, Lk=1300, D=32, alibi=True, softcap=3.0, sinks=True, mask="float",
         mask_shape="B11K", causal=True),
    Case("decode, dropout", Hkv=2, Lq=3, Lk=400, D=32, dropout_p=0.3, causal=True),
    Case("paged, family", Hq=16, Hkv=4, Lq=5, Lk=208, D=32, page_size=16, kv_lengths=(201, 77), alibi=True, sinks=True,
         softcap=4.0, causal=True),
    Case("paged, dropout", Lq=70, Lk=208, D=32, page_size=16, kv_lengths=(201, 77), dropout_p=0.25),
    # Short and long sequences, those of few queries among many, and empty ones at the ends.
    Case("packed, many", Hq=6, Hkv=2, D=32, causal=True,
         packed=((0, 30), (1, 700), (130, 150), (9, 9), (5, 1100), (64, 64), (40, 0), (0, 0))),
    Case("packed, dropout", D=16, dropout_p=0.3, packed=((30, 70), (100, 90), (3, 200)), window=(50, 20)),
    Case("packed, per sequence", Hkv=2, D=40, Dv=24, packed=((70, 90), (20, 300), (130, 131)), causal=True,
         kv_lengths=(80, 300, 99), kv_starts=(3, 0, 44), q_offset=(0, 250, -20), alibi=True),
    Case("tiles, expanded float32 mask", B=1, Hkv=2, Lq=210, Lk=199, D=16, mask="float32", mask_shape="BHqK"),
]  # fmt: skip


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, requires_grad: bool = False
) -> dict[str, Any]:
    """Keyword arguments for ``run``: standard normal query, key and value, and what else the case asks for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)
        return x.requires_grad_(requires_grad)

    def heads(B: int, H: int, L: int, D: int) -> Tensor:
        order = [case.layout.index(axis) for axis in "BHLD"]
        sizes = dict(zip("BHLD", (B, H, L, D), strict=True))
        return normal(*(sizes[axis] for axis in case.layout)).permute(order)

    def ints(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    Dv = case.Dv or case.D
    kwargs: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    kwargs |= {"scale": case.scale, "dropout_p": case.dropout_p, "q_offset": case.q_offset}
    if case.packed is not None:
        for name, side in (("cu_seqlens_q", 0), ("cu_seqlens_k", 1)):
            lengths = [0] + [sequence[side] for sequence in case.packed]
            kwargs[name] = torch.tensor(lengths, device=device).cumsum(0).to(torch.int32)
        total_q, total_k = (int(kwargs[name][-1]) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        shapes = ((total_q, case.Hq, case.D), (total_k, case.Hkv, case.D), (total_k, case.Hkv, Dv))
        kwargs |= {name: normal(*shape) for name, shape in zip(("query", "key", "value"), shapes, strict=True)}
    elif case.page_size is not None:
        pages_per_sample = case.Lk // case.page_size
        num_pages = case.B * pages_per_sample
        kwargs["query"] = heads(case.B, case.Hq, case.Lq, case.D)
        kwargs["key"] = normal(num_pages, case.Hkv, case.page_size, case.D)
        kwargs["value"] = normal(num_pages, case.Hkv, case.page_size, Dv)
        table = torch.randperm(num_pages, generator=generator).view(case.B, pages_per_sample)
        kwargs["block_table"] = table.to(device=device, dtype=torch.int32)
    else:
        kwargs["query"] = heads(case.B, case.Hq, case.Lq, case.D)
        kwargs["key"] = heads(case.B, case.Hkv, case.Lk, case.D)
        kwargs["value"] = heads(case.B, case.Hkv, case.Lk, Dv)
    if case.mask is not None:
        sizes = {"B": case.B, "H": case.Hq, "Q": case.Lq, "K": case.Lk}
        shape = [sizes.get(axis, 1) for axis in case.mask_shape]
        full = [sizes.get(axis.upper(), 1) for axis in case.mask_shape]
        if case.mask == "bool":
            kwargs["attn_mask"] = (torch.rand(*shape, generator=generator) < 0.7).to(device).expand(full)
        else:
            mask = normal(*shape, dtype=dtype if case.mask == "float" else torch.float32)
            kwargs["attn_mask"] = mask.detach().expand(full).requires_grad_(requires_grad)
    if case.alibi:
        geometric = 2 ** (-8 * torch.arange(1, case.Hq + 1) / case.Hq)  # as in the paper, but no powers of two
        kwargs["alibi_slopes"] = (geometric * (0.5 + torch.rand(case.Hq, generator=generator))).to(device)
    if case.sinks:
        kwargs["sinks"] = normal(case.Hq)
    for name in ("kv_lengths", "kv_starts", "q_offset"):
        values = getattr(case, name)
        if isinstance(values, tuple):
            kwargs[name] = ints(values)
    return kwargs


def run(kwargs: dict[str, Any], *, dropout_seed: int = 0, **overrides: Any) -> Any:
    """``attention`` or ``attention_varlen`` on what ``make_inputs`` made, with a fixed dropout seed."""
    packed = "cu_seqlens_q" in kwargs
    function = functional.attention_varlen if packed else functional.attention
    draw = torch.randint

    def draw_on_the_cpu(*args: Any, device: torch.device, **kwargs: Any) -> Tensor:
        """A generator of another device has other numbers."""
        return draw(*args, **kwargs).to(device)

    with torch.random.fork_rng(devices=[]), mock.patch.object(torch, "randint", draw_on_the_cpu):
        torch.manual_seed(dropout_seed)
        return function(**{**kwargs, **overrides})


def random_grads(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A standard normal gradient of each of ``OUTPUTS``, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(outputs[name].shape, generator=generator).to(outputs[name]) for name in OUTPUTS}


def forward_and_gradients(
    kwargs: dict[str, Any],
    call: Callable[[dict[str, Any]], tuple[Tensor, Tensor]],
    through: tuple[str, ...] = OUTPUTS,
    grads: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """``{name: tensor}``: ``call``'s out and lse, and the gradients of all that requires one.

    ``through`` names the outputs that gradients come through; without any there is only the forward. ``grads`` are
    their gradients, by default ``random_grads``.
    """
    outputs = dict(zip(OUTPUTS, call(kwargs), strict=True))
    results = {name: x.detach() for name, x in outputs.items()}
    if through:
        inputs = {name: x for name in DIFFERENTIABLE if (x := kwargs.get(name)) is not None and x.requires_grad}
        grads = grads or random_grads(outputs)
        gradients = torch.autograd.grad(
            [outputs[name] for name in through], tuple(inputs.values()), [grads[name] for name in through]
        )
        results |= {f"grad of {name}": grad for name, grad in zip(inputs, gradients, strict=True)}
    return results


def to_dtype(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy with floating tensors, except ALiBi slopes, in ``dtype``, detached but as demanding of gradients."""

    def convert(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or name == "alibi_slopes":
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return {name: convert(name, x) for name, x in kwargs.items()}


def visible(kwargs: dict[str, Any]) -> Tensor:
    """Which keys some row of some query head sees: bool ``[B, Hkv, Lk]``, packed ``[total_k, Hkv]``.

    By the gradient of a sum over values, with equal weights: none can underflow.
    """
    kwargs = {n: x.detach() if isinstance(x, Tensor) else x for n, x in to_dtype(kwargs, torch.float64).items()}
    kwargs |= {"scale": 0.0, "alibi_slopes": None, "sinks": None, "dropout_p": 0.0}
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        kwargs["attn_mask"] = mask > -torch.inf
    value = torch.zeros(*kwargs["key"].shape[:-1], 1, dtype=torch.float64, requires_grad=True)
    out = run(kwargs | {"key": torch.zeros_like(kwargs["key"]), "value": value}, backend="reference")
    return torch.autograd.grad(out.sum(), value)[0][..., 0] > 0


def to_pages(kwargs: dict[str, Any], page_size: int, *, fill: float = math.nan, seed: int = 0) -> dict[str, Any]:
    """The same dense problem with paged keys.

    The pages lie in random order among others that no sample uses. All that lies outside ``kv_lengths`` (default:
    everything is in use) is ``fill``, and there the block table holds numbers of no page.
    """
    generator = torch.Generator().manual_seed(seed)
    B, _, Lk, _ = kwargs["key"].shape
    device = kwargs["key"].device
    lengths = kwargs.get("kv_lengths")
    lengths = torch.full((B,), Lk, device=device) if lengths is None else lengths
    pages_per_sample = -(-Lk // page_size)
    num_pages = B * pages_per_sample + 3
    table = torch.randperm(num_pages, generator=generator)[: B * pages_per_sample].view(B, -1).to(device)

    def pages(x: Tensor) -> Tensor:
        """``[B, Hkv, Lk, D]`` to ``[num_pages, Hkv, page_size, D]``."""
        x = x.masked_fill((torch.arange(Lk, device=device) >= lengths[:, None])[:, None, :, None], fill)
        x = torch.nn.functional.pad(x, (0, 0, 0, pages_per_sample * page_size - Lk), value=fill)
        filled = x.new_full((num_pages, x.shape[1], page_size, x.shape[3]), fill)
        filled[table.flatten()] = x.unflatten(2, (pages_per_sample, page_size)).transpose(1, 2).flatten(0, 1)
        return filled

    used = torch.arange(pages_per_sample, device=device) < -(-lengths[:, None] // page_size)
    nowhere = torch.tensor([-1, num_pages, -(2**31), 2**31 - 1], device=device)
    nowhere = nowhere[torch.arange(table.numel(), device=device) % 4].view_as(table)
    paged = {"key": pages(kwargs["key"]), "value": pages(kwargs["value"]), "kv_lengths": lengths.to(torch.int32)}
    paged["block_table"] = torch.where(used, table, nowhere).to(torch.int32)
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.shape[-1] > 1:
        paged["attn_mask"] = torch.nn.functional.pad(mask, (0, pages_per_sample * page_size - Lk))
    return kwargs | paged


def _ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(magnitude, info.tiny)))
    return 2.0**exponent * info.eps


def assert_close(actual: Tensor, emulations: Sequence[Tensor], truth: Tensor, name: str = "out") -> None:
    """``actual`` is about as near to the float64 ``truth`` as the ``emulations`` of the same dtype are.

    With errors taken against the truth, and of the emulations the worst: the largest error is at most twice the
    emulation's plus half an ulp of the largest value; the relative L2 error at most twice the emulation's plus half an
    epsilon; and so for the signed error along the truth, averaged over everything, in which roundings cancel and a
    systematic error (a scale that is 0.2% off, in bfloat16) does not, plus four times the spread that roundings leave
    in such an average, and four epsilons of the float32 that kernels compute in. Infinities must stand where the truth
    has them, and there must be no NaN.

    Raises:
        AssertionError: with the figures of what failed.
    """
    dtype = emulations[0].dtype
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    a, t, *es = (x.detach().to(device="cpu", dtype=torch.float64) for x in (actual, truth, *emulations))
    assert not a.isnan().any(), f"{name}: {int(a.isnan().sum())} of {a.numel()} values are NaN"
    infinite = t.isinf()
    assert torch.equal(a[infinite], t[infinite]), f"{name}: infinities differ from the reference"
    a, t, *es = (x.masked_fill(infinite, 0) for x in (a, t, *es))
    assert a.isfinite().all(), f"{name}: infinite where the reference is finite"
    if a.numel() == 0:
        return
    epsilon, norm = torch.finfo(dtype).eps, float(t.norm())
    worst = max(float((e - t).abs().max()) for e in es)
    largest, allowed = float((a - t).abs().max()), 2 * worst + _ulp(float(t.abs().max()), dtype) / 2
    assert largest <= allowed, f"{name}: largest error {largest:.3g}, allowed {allowed:.3g}"
    if norm == 0:
        return
    worst = max(float((e - t).norm()) for e in es) / norm
    l2, allowed = float((a - t).norm()) / norm, 2 * worst + epsilon / 2
    assert l2 <= allowed, f"{name}: relative L2 error {l2:.3g}, allowed {allowed:.3g}"
    signed, *emulated_signed = (float(((x - t) * t).sum()) / norm**2 for x in (a, *es))
    # The rounding of one weight shifts a whole vector, so the vectors are what errs independently.
    spread = max(float(((e - t) * t).sum(-1).norm()) / norm**2 for e in es)
    spread = max(spread, epsilon / math.sqrt(t.count_nonzero()))
    # An lse between 4 and 8, rounded to float32, alone shifts all weights of its row by up to two epsilons.
    allowed = 2 * max(abs(x) for x in emulated_signed) + 4 * spread + 4 * torch.finfo(torch.float32).eps
    assert abs(signed) <= allowed, f"{name}: signed error {signed:.3g}, allowed {allowed:.3g}"


Results = dict[str, Tensor]


def emulations_and_truth(
    kwargs: dict[str, Any], through: tuple[str, ...] = (), draws: int = 3
) -> tuple[list[Results], Results]:
    """What the fused emulation in the inputs' dtype and the float64 reference give, both on the CPU.

    ``through`` is that of ``forward_and_gradients``. The largest of a few rounding errors is a matter of luck, so there
    are several ``draws`` of the emulation, which sum the scores in different orders.

    Any forward pairs with any backward, so the emulated backward gets the true out, rounded, and the true lse, an
    epsilon off. The lse of its own forward shares its rounding errors in the scores: they would cancel.
    """

    def on_reference(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return run(kwargs, backend="reference", return_lse=True)

    truth = forward_and_gradients(to_dtype(kwargs, torch.float64), on_reference, through)
    generator = torch.Generator().manual_seed(2)
    head_dim = kwargs["query"].shape[-1]

    def emulate(order: Tensor) -> Results:
        """With the elements of each head in another order."""
        ordered = {n: kwargs[n].detach()[..., order] for n in ("query", "key")}
        ordered = kwargs | {n: x.requires_grad_(kwargs[n].requires_grad) for n, x in ordered.items()}
        forward = dict(zip(OUTPUTS, (x.detach() for x in on_reference(ordered)), strict=True))
        if not through:
            return forward
        signs = torch.randint(0, 2, truth["lse"].shape, generator=generator) * 2 - 1
        lse = (truth["lse"] * (1 + signs * torch.finfo(torch.float32).eps)).float()
        rounded = truth["out"].to(kwargs["query"].dtype), lse
        with mock.patch.object(reference, "forward", lambda spec, tensors: rounded):
            results = forward_and_gradients(ordered, on_reference, through)
        for name in ("grad of query", "grad of key"):
            results[name] = results[name][..., order.argsort()]
        return results | forward

    orders = [torch.arange(head_dim), *(torch.randperm(head_dim, generator=generator) for _ in range(draws - 1))]
    return [emulate(order) for order in orders], truth


@functools.cache
def expected(
    case: Case, dtype: torch.dtype, through: tuple[str, ...] = (), seed: int = 0
) -> tuple[list[Results], Results]:
    """``emulations_and_truth`` of the case."""
    return emulations_and_truth(make_inputs(case, dtype, seed=seed, requires_grad=bool(through)), through)


def check_results(actual: Results, emulations: list[Results], truth: Results) -> None:
    """Holds what ``forward_and_gradients`` gave to ``emulations_and_truth``, by ``assert_close``."""
    for name, x in actual.items():
        assert_close(x, [emulated[name] for emulated in emulations], truth[name], name)


def check_case(
    actual: dict[str, Tensor], case: Case, dtype: torch.dtype, through: tuple[str, ...] = (), seed: int = 0
) -> None:
    """Holds what ``forward_and_gradients`` gave for the case to ``expected``."""
    check_results(actual, *expected(case, dtype, through, seed))
