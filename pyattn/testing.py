"""One list of workloads for tests, benchmarks and tuning, and the rule by which a result is judged.

``CASES`` names the problems, ``make_inputs`` makes their tensors, ``run`` calls the right function, and
``assert_close`` holds a result to the float64 reference by a rule instead of a number for each test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyattn import functional


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
    mask: str | None = None  # "bool" or "float"
    mask_shape: str = "BHQK"  # a letter replaced by 1 broadcasts
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
    Case("sinks", sinks=True, causal=True),
    Case("sinks, window, empty rows", sinks=True, window=(20, 0), Lq=100, Lk=60, q_offset=-10),
    Case("dropout", dropout_p=0.3, causal=True),
    Case("dropout, everything", dropout_p=1.0),
    Case("paged", Lq=9, Lk=112, page_size=16, kv_lengths=(100, 37), causal=True),
    Case("paged, odd pages", Lq=1, Lk=105, Hkv=1, page_size=7, kv_lengths=(105, 1)),
    Case("packed", packed=((70, 70), (1, 1), (0, 9), (33, 33)), causal=True),
    Case("packed, lengths differ", packed=((5, 80), (64, 3), (7, 0)), window=(30, 2), Hkv=2),
    Case("packed, family", packed=((40, 40), (9, 50)), alibi=True, sinks=True, softcap=5.0, dropout_p=0.2),
    Case("everything", Lq=60, Lk=150, Hkv=2, D=40, Dv=24, causal=True, window=(100, 0), mask="float", alibi=True,
         softcap=4.0, sinks=True, kv_lengths=(150, 90), kv_starts=(10, 0), dropout_p=0.1, scale=0.3),
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
        sizes = {"B": case.B, "H": case.Hq, "Q": case.Lq, "K": case.Lk, "1": 1}
        shape = tuple(sizes[axis] for axis in case.mask_shape)
        if case.mask == "bool":
            kwargs["attn_mask"] = (torch.rand(*shape, generator=generator) < 0.7).to(device)
        else:
            kwargs["attn_mask"] = normal(*shape)
    if case.alibi:
        kwargs["alibi_slopes"] = torch.rand(case.Hq, generator=generator).to(device)
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dropout_seed)
        return function(**{**kwargs, **overrides})


def to_dtype(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy with floating tensors, except ALiBi slopes, in ``dtype``, detached but as demanding of gradients."""

    def convert(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or name == "alibi_slopes":
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return {name: convert(name, x) for name, x in kwargs.items()}


def _ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(magnitude, info.tiny)))
    return 2.0**exponent * info.eps


def assert_close(actual: Tensor, emulated: Tensor, truth: Tensor, name: str = "out") -> None:
    """``actual`` is about as near to the float64 ``truth`` as the ``emulated`` result of the same dtype is.

    With errors taken against the truth: the largest error is at most twice the emulation's plus half an ulp of the
    largest value; the relative L2 error at most twice the emulation's plus half an epsilon; and so for the signed
    error along the truth, averaged over everything, in which roundings cancel and a systematic error (a scale that is
    0.2% off, in bfloat16) does not, plus four epsilons of the float32 that kernels compute in. Infinities must stand
    where the truth has them, and there must be no NaN.

    Raises:
        AssertionError: with the figures of what failed.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == emulated.dtype, f"{name}: dtype {actual.dtype}, expected {emulated.dtype}"
    dtype = actual.dtype
    a, e, t = (x.detach().to(device="cpu", dtype=torch.float64) for x in (actual, emulated, truth))
    assert not a.isnan().any(), f"{name}: {int(a.isnan().sum())} of {a.numel()} values are NaN"
    infinite = t.isinf()
    assert torch.equal(a[infinite], t[infinite]), f"{name}: infinities differ from the reference"
    a, e, t = a[~infinite], e[~infinite], t[~infinite]
    assert a.isfinite().all(), f"{name}: infinite where the reference is finite"
    if a.numel() == 0:
        return
    epsilon, norm = torch.finfo(dtype).eps, float(t.norm())
    largest, allowed = (
        float((a - t).abs().max()),
        2 * float((e - t).abs().max()) + _ulp(float(t.abs().max()), dtype) / 2,
    )
    assert largest <= allowed, f"{name}: largest error {largest:.3g}, allowed {allowed:.3g}"
    if norm == 0:
        return
    l2, allowed = float((a - t).norm()) / norm, 2 * float((e - t).norm()) / norm + epsilon / 2
    assert l2 <= allowed, f"{name}: relative L2 error {l2:.3g}, allowed {allowed:.3g}"
    signed, emulated_signed = (abs(float((x - t) @ t)) / norm**2 for x in (a, e))
    # An lse between 4 and 8, rounded to float32, alone shifts all weights of its row by up to two epsilons.
    allowed = 2 * emulated_signed + 4 * epsilon / math.sqrt(t.count_nonzero()) + 4 * torch.finfo(torch.float32).eps
    assert signed <= allowed, f"{name}: signed error {signed:.3g}, allowed {allowed:.3g}"
