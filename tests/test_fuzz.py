"""Random calls of the public functions, legal and not: no crash, refusals that name the argument, right results.

A call follows from its seed alone; a failure prints both. Every call is drawn legal. Then, for some, one argument is
spoilt so that the call is illegal for sure, or a few are replaced by anything at all, and nobody knows.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import math
import random
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import pyattn
from pyattn.backends import cpu
from pyattn.testing import DTYPES, forward_and_gradients, random_grads, to_dtype

NAN, INF = math.nan, math.inf
FUNCTIONS = {
    function.__name__: function
    for function in (
        pyattn.attention,
        pyattn.attention_varlen,
        pyattn.scaled_dot_product_attention,
        pyattn.naive_attention,
        pyattn.explain,
    )
}
PARAMETERS = {name: set(inspect.signature(function).parameters) for name, function in FUNCTIONS.items()}
for _name in ("naive_attention", "explain"):
    PARAMETERS[_name] = PARAMETERS[_name] - {"arguments"} | PARAMETERS["attention"]
REFUSALS = (TypeError, ValueError, NotImplementedError)


class Call(NamedTuple):
    function: str
    arguments: dict[str, Any]
    spoilt: str | None = None  # the argument that makes it illegal
    anything: bool = False  # legal or not, nobody knows

    def __call__(self) -> Any:
        torch.manual_seed(0)  # of dropout
        return FUNCTIONS[self.function](**self.arguments)

    def __str__(self) -> str:
        def text(x: Any) -> str:
            if not isinstance(x, torch.Tensor):
                return repr(x)
            if x.numel() < 20 and not x.is_floating_point() and x.device.type == "cpu" and x.layout == torch.strided:
                return repr(x)
            strides = f", strides {x.stride()}" if x.layout == torch.strided and not x.is_nested else f", {x.layout}"
            grad = ", requires_grad" * x.requires_grad
            return f"<{x.dtype} {'nested' if x.is_nested else list(x.shape)} on {x.device}{strides}{grad}>"

        return f"{self.function}({', '.join(f'{name}={text(x)}' for name, x in self.arguments.items())})"


# ---- legal calls -------------------------------------------------------------------------------------------


def tensor(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Standard normal, with any strides, and at times a few numbers that are not."""
    rank = len(shape)
    how = r.randrange(12)
    if how == 0:
        order = r.sample(range(rank), rank)
        inverse = sorted(range(rank), key=order.__getitem__)
        x = torch.randn([shape[d] for d in order], dtype=dtype).permute(inverse)
    elif how == 1:
        x = torch.randn([n + 2 for n in shape], dtype=dtype)[(slice(1, -1),) * rank]
    elif how == 2:
        x = torch.randn([n if r.random() < 0.6 else 1 for n in shape], dtype=dtype).expand(shape)
    elif how == 3:
        x = torch.randn((*shape, 2), dtype=dtype)[..., 0]
    elif how == 4 and dtype in (torch.float32, torch.float64):
        x = torch.randn(shape, dtype=torch.complex64 if dtype == torch.float32 else torch.complex128).conj().imag
    else:
        x = torch.randn(shape, dtype=dtype)
    if r.random() < 0.06 and x.numel():
        x = x.contiguous().clone()
        x.view(-1)[r.randrange(x.numel())] = r.choice([NAN, INF, -INF, 100.0])
    return x


def ints(r: random.Random, n: int, low: int, high: int) -> torch.Tensor:
    return torch.tensor([r.randint(low, high) for _ in range(n)], dtype=r.choice([torch.int32, torch.int64]))


def maybe(r: random.Random, probability: float = 0.2) -> bool:
    return r.random() < probability


def length(r: random.Random) -> int:
    return r.choice([0, 1, 1, 2, 3, 4, 5, 8, 9, 17, 33, 70])


def family(r: random.Random, B: int, Hq: int, Lk: int, differentiable: bool) -> dict[str, Any]:
    """What ``attention`` and ``attention_varlen`` both take; ``Lk`` is at most the keys of every sequence."""
    a: dict[str, Any] = {}
    if maybe(r, 0.5):
        a["causal"] = r.random() < 0.8
    if maybe(r):
        sides = [None, 0, 1, 3, 20, 2**31, 2**63 - 1]
        a["window"] = r.choice([tuple, list])((r.choice(sides), r.choice(sides)))
    if maybe(r, 0.3):
        far = [2**31, -(2**31), 2**63 - 1, -(2**63)]
        one = r.choice([r.randint(-9, 9), r.choice(far)])
        a["q_offset"] = r.choice([one, ints(r, B, -9, 9), torch.tensor([one] * B, dtype=torch.int64)])
    if maybe(r):
        shape = (Hq,) if r.random() < 0.5 else (B, Hq)
        a["alibi_slopes"] = torch.rand(shape)
    if maybe(r):
        a["softcap"] = r.choice([None, 0, 1, 0.5, 30.0])
    if maybe(r):
        dtype = r.choice([torch.float32, torch.bfloat16])
        a["sinks"] = torch.randn(Hq, dtype=dtype).requires_grad_(differentiable)
        if maybe(r) and Hq:
            a["sinks"].data[r.randrange(Hq)] = -INF
    if maybe(r):
        a["kv_lengths"] = ints(r, B, 0, Lk)
    if maybe(r):
        a["kv_starts"] = ints(r, B, 0, Lk)
    if maybe(r):
        a["dropout_p"] = r.choice([0.0, 0, 0.25, 0.5, 1.0, 1])
    if maybe(r):
        a["scale"] = r.choice([None, 0.0, 0, 1, 0.3, -0.5, 30.0])
    return a


def heads(r: random.Random) -> tuple[int, int]:
    Hkv = r.choice([1, 1, 2, 3])
    return Hkv * r.choice([1, 1, 2, 3, 8, 0] if maybe(r, 0.1) else [1, 1, 2, 3]), Hkv


def head_dims(r: random.Random) -> tuple[int, int]:
    D = r.choice([1, 2, 4, 7, 8, 16, 33])
    return (0 if maybe(r, 0.02) else D), r.choice([D, D, D, 1, 5, 16, 0 if maybe(r, 0.05) else 3])


def draw_dense(r: random.Random) -> dict[str, Any]:
    dtype = r.choice([*DTYPES, torch.float64])
    B, (Hq, Hkv), Lq, Lk, (D, Dv) = r.choice([0, 1, 1, 2, 2, 3]), heads(r), length(r), length(r), head_dims(r)
    paged = maybe(r)
    grad = not paged and maybe(r, 0.3)
    a: dict[str, Any] = {"query": tensor(r, (B, Hq, Lq, D), dtype)}
    if paged:
        a |= pages(r, B, Hkv, D, Dv, dtype)
        Lk = a["block_table"].shape[1] * a["key"].shape[2]
    else:
        a |= {"key": tensor(r, (B, Hkv, Lk, D), dtype), "value": tensor(r, (B, Hkv, Lk, Dv), dtype)}
    if grad:
        a = {name: x.requires_grad_(maybe(r, 0.8)) for name, x in a.items()}
    a = family(r, B, Hq, Lk, grad) | a
    if maybe(r, 0.3):
        shape = [n if r.random() < 0.7 else 1 for n in (B, Hq, Lq, Lk)][r.choice([0, 0, 1, 2, 3, 4]) :]
        if maybe(r, 0.5):
            a["attn_mask"] = torch.rand(shape) < 0.7
        else:
            mask = torch.randn(shape, dtype=r.choice([dtype, torch.float32]))
            for value in r.choice([(), (), (-INF,), (torch.finfo(mask.dtype).min,), (-INF, -1e4)]):
                mask.masked_fill_(torch.rand(shape) < 0.3, value)
            a["attn_mask"] = mask.requires_grad_(grad)
    return a


def pages(r: random.Random, B: int, Hkv: int, D: int, Dv: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keys in pages, and numbers of no page where none is in use."""
    num_pages, size, per_sample = r.choice([1, 2, 5]), r.choice([1, 2, 3, 16]), r.choice([0, 1, 2, 3])
    table = torch.tensor([[r.randrange(num_pages) for _ in range(per_sample)] for _ in range(B)], dtype=torch.int32)
    table = table.view(B, per_sample)
    lengths = ints(r, B, 0, size * per_sample)
    unused = torch.arange(per_sample) * size >= lengths[:, None]
    table[unused] = r.choice([0, -1, 2**31 - 1, -(2**31)])
    key, value = (tensor(r, (num_pages, Hkv, size, d), dtype) for d in (D, Dv))
    return {"key": key, "value": value, "block_table": table, "kv_lengths": lengths}


def draw_packed(r: random.Random) -> dict[str, Any]:
    dtype = r.choice([*DTYPES, torch.float64])
    B, (Hq, Hkv), (D, Dv) = r.choice([0, 1, 1, 2, 3, 4]), heads(r), head_dims(r)
    lengths = [[length(r) for _ in range(B)] for _ in range(2)]
    total_q, total_k = map(sum, lengths)
    cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in lengths]
    paged = maybe(r)
    grad = not paged and maybe(r, 0.3)
    a: dict[str, Any] = {"query": tensor(r, (total_q, Hq, D), dtype), "cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}
    if paged:
        a |= pages(r, B, Hkv, D, Dv, dtype) | {"cu_seqlens_k": None}
        Lk = a["block_table"].shape[1] * a["key"].shape[2]
    else:
        a |= {"key": tensor(r, (total_k, Hkv, D), dtype), "value": tensor(r, (total_k, Hkv, Dv), dtype)}
        Lk = min(lengths[1], default=0)
    if grad:
        a |= {name: a[name].requires_grad_(maybe(r, 0.8)) for name in ("query", "key", "value")}
    for i, name in enumerate(("max_seqlen_q", "max_seqlen_k")):
        if maybe(r):
            a[name] = max(lengths[i], default=0) + r.choice([0, 0, 7])
    return family(r, B, Hq, Lk, grad) | a


def draw_sdpa(r: random.Random) -> dict[str, Any]:
    dtype = r.choice([*DTYPES, torch.float64])
    Lq, Lk, (D, Dv) = length(r), length(r), head_dims(r)
    lead = [r.choice([1, 2, 3]) for _ in range(r.choice([0, 1, 2, 2, 2, 3]))]
    gqa = len(lead) > 0 and maybe(r)
    a: dict[str, Any] = {}
    for name, sizes in (("query", (Lq, D)), ("key", (Lk, D)), ("value", (Lk, Dv))):
        shape = [n if r.random() < 0.9 else 1 for n in lead][r.choice([0] * 9 + [1]) if not gqa else 0 :]
        if gqa:
            shape[-1] = lead[-1] if name != "query" else 2 * lead[-1]
        a[name] = tensor(r, (*shape, *sizes), dtype)
    if gqa:
        a["enable_gqa"] = True
    if maybe(r, 0.3):
        a["is_causal"] = r.random() < 0.8
    if maybe(r, 0.3):
        a["attn_mask"] = torch.rand(r.choice([Lq, 1]), r.choice([Lk, 1])) < 0.7
        if maybe(r, 0.5):
            a["attn_mask"] = torch.where(a["attn_mask"], 0.0, r.choice([-1.0, -INF])).to(
                r.choice([dtype, torch.float32])
            )
    if maybe(r):
        a["dropout_p"] = r.choice([0.0, 0, 0.25, 1.0])
    if maybe(r):
        a["scale"] = r.choice([None, 0.5, -1.0, torch.tensor(0.5), torch.tensor(2)])
    return a


def draw(seed: int) -> Call:
    r = random.Random(seed)
    torch.manual_seed(r.randrange(2**31))
    function = r.choice([*FUNCTIONS, "attention", "attention", "attention_varlen"])
    if function == "attention_varlen":
        a = draw_packed(r)
    elif function == "scaled_dot_product_attention":
        a = draw_sdpa(r)
    else:
        a = draw_dense(r)
    if function in ("attention", "attention_varlen", "explain") and maybe(r, 0.5):
        a["backend"] = r.choice([None, "auto", "cpu", "cpu", "reference"])
    if function != "scaled_dot_product_attention" and maybe(r, 0.5):
        a["return_lse"] = r.random() < 0.8
    call = Call(function, a)
    luck = r.random()
    return call if luck < 0.5 else spoil(r, call) if luck < 0.85 else scramble(r, call)


# ---- illegal calls -----------------------------------------------------------------------------------------

NOT_TENSORS = ["x", 3, 0.5, True, [1.0], (), {}, b"", 1j, torch.float32, torch.nn.Linear, np.ones((2, 2)), object()]
NOT_NUMBERS = ["1", True, [0.5], (), {}, 1j, torch.ones(2), np.ones(2), object(), torch.float32]
NOT_BOOLS = [0, 1, 1.0, None, "yes", [], torch.tensor(True), np.bool_(True)]
FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
ALL_DTYPES = [*FLOATING, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64]
ALL_DTYPES += [torch.float8_e4m3fn]
INDICES = ("q_offset", "kv_lengths", "kv_starts")
BAD_NUMBERS = {
    "scale": [NAN, INF, -INF, 10**400, 1e39],
    "softcap": [NAN, INF, -1.0, -1, 10**400, 1e39],
    "dropout_p": [NAN, INF, -0.1, 1.5, 2, None, 10**400],
}
BAD_INTS = {
    "q_offset": [0.5, 2**63, -(2**80), *(x for x in NOT_NUMBERS if not isinstance(x, torch.Tensor))],
    "max_seqlen_q": [-1, 0.5, 2**63, *NOT_NUMBERS],
    "max_seqlen_k": [-1, 0.5, 2**63, *NOT_NUMBERS],
}
BAD_WINDOWS = [
    3,
    "ab",
    (1,),
    (1, 2, 3),
    (-1, 0),
    (0, -3),
    (1.0, 0),
    (True, 0),
    ("1", 0),
    (2**63, 0),
    {1, 2},
    torch.ones(2),
]
BAD_BACKENDS = ["cuDNN", "", 3, ["cpu"], b"cpu", True, object(), np.array(["cpu", "cpu"]), torch.ones(2)]


def allowed_dtypes(name: str, query: torch.Tensor) -> set[torch.dtype]:
    if name in ("block_table", "cu_seqlens_q", "cu_seqlens_k"):
        return {torch.int32}
    if name in INDICES:
        return {torch.int32, torch.int64}
    if name == "attn_mask":
        return {torch.bool, torch.float32, query.dtype}
    return {torch.float32} if name == "alibi_slopes" else FLOATING if name in ("query", "sinks") else {query.dtype}


def bad_tensor(r: random.Random, name: str, x: torch.Tensor, call: Call) -> Any:
    """Not a tensor, or one of the wrong dtype, layout, device or rank; wrong sizes are ``bad_values``."""
    dense = call.function != "scaled_dot_product_attention"
    how = r.randrange(6)
    if how == 0:
        return r.choice([y for y in NOT_TENSORS if name != "q_offset" or type(y) is not int])
    if how == 1:
        return x.detach().to(
            r.choice([d for d in ALL_DTYPES if d not in allowed_dtypes(name, call.arguments["query"])])
        )
    if how == 2:
        return x.detach().to_sparse()
    if how == 3 and name != "query":
        return torch.empty_like(x, device="meta")
    if how == 4:
        return torch.nested.nested_tensor([x.detach().reshape(-1)], layout=r.choice([torch.strided, torch.jagged]))
    if dense and name == "attn_mask":
        return x.detach().view((1,) * (5 - x.dim()) + x.shape)
    return x.detach()[(None,) * 5] if dense else x.detach().to_sparse()


def bad_values(r: random.Random, call: Call) -> dict[str, list[Any]]:
    """By argument: tensors of a wrong size, or with numbers out of range, and relations that do not hold."""
    a, bad = call.arguments, collections.defaultdict(list)
    query, key, value = a["query"], a["key"], a["value"]
    wide = torch.zeros((*query.shape[:-1], query.shape[-1] + 1), dtype=query.dtype)
    bad["query"].append(wide)
    bad["key"].append(torch.zeros((*key.shape[:-1], key.shape[-1] + 1), dtype=key.dtype))
    longer = list(value.shape)
    longer[0 if call.function == "attention_varlen" and "block_table" not in a else -2] += 1
    bad["value"].append(torch.zeros(longer, dtype=value.dtype))
    if call.function == "scaled_dot_product_attention":
        bad["attn_mask"].append(torch.zeros(query.shape[-2] + 2, key.shape[-2] + 2))
        bad["attn_mask"].append(torch.zeros(()))
        return bad
    Hq, paged = query.shape[1], "block_table" in a
    packed = call.function == "attention_varlen"
    B = a["cu_seqlens_q"].shape[0] - 1 if packed else query.shape[0]
    if key.shape[1] > 1:
        bad["query"].append(query.new_zeros((query.shape[0], Hq + 1, *query.shape[2:])))
    bad["value"].append(value.new_zeros((*value.shape[:1], value.shape[1] + 1, *value.shape[2:])))
    bad["alibi_slopes"] += [torch.zeros(Hq + 1), torch.zeros(B + 2, Hq), torch.zeros(Hq, requires_grad=True)]
    bad["sinks"] += [torch.zeros(Hq + 1), torch.zeros(1, Hq)]
    for name in INDICES:
        bad[name] += [torch.zeros(B + 1, dtype=torch.int32), torch.zeros(B, 1, dtype=torch.int64)]
    if not packed:
        Lk = a["block_table"].shape[1] * key.shape[2] if paged else key.shape[2]
        bad["attn_mask"] += [torch.zeros(query.shape[2] + 2, Lk), torch.zeros(query.shape[2], Lk + 2)]
        if not paged:
            bad["key"].append(key.new_zeros((key.shape[0] + 1, *key.shape[1:])))
    if call.function == "explain":  # reads no numbers
        return bad
    if B:
        for name in ("kv_lengths", "kv_starts"):
            number = r.choice([-1, -(2**31), 2**31 - 1, 2**62, -(2**63)])
            lengths = torch.zeros(B, dtype=torch.int32 if abs(number) < 2**32 else torch.int64)
            lengths[r.randrange(B)] = number
            bad[name].append(lengths)
    if paged:
        bad["kv_lengths"].append(None)
        table = a["block_table"].clone()
        used = torch.arange(table.shape[1]) * key.shape[2] < a["kv_lengths"][:, None]
        if used.any():
            i, j = r.choice(used.nonzero().tolist())
            table[i, j] = r.choice([-1, key.shape[0], 2**31 - 1, -(2**31)])
            bad["block_table"].append(table)
        bad["block_table"].append(torch.zeros(B + 1, 3, dtype=torch.int32))
    if packed:
        for side, total in (("q", query.shape[0]), ("k", key.shape[0])):
            if side == "k" and paged:
                bad["cu_seqlens_k"].append(a["cu_seqlens_q"])
                continue
            wrong = [[*[0] * B, total + 1], [*[0] * B, -1], [1, *[0] * (B - 1), total] if B else [1]]
            if B >= 2:
                wrong += [[*[0] * (B - 1), middle, total] for middle in (total + 3, -1)]
            if B >= 3:
                wrong.append([*[0] * (B - 2), 2**31 - 1, -2, total])  # steps that wrap in 32 bits
            bad[f"cu_seqlens_{side}"] += [torch.tensor(x, dtype=torch.int32) for x in wrong]
            bad[f"cu_seqlens_{side}"].append(torch.zeros(0, dtype=torch.int32))
            longest = int(a[f"cu_seqlens_{side}"].diff().max()) if B else 0
            if longest:
                bad[f"max_seqlen_{side}"].append(longest - 1)
        bad["cu_seqlens_k"].append(torch.zeros(B + 2, dtype=torch.int32))
    return bad


def spoil(r: random.Random, call: Call) -> Call:
    """One argument replaced by what no call may have there."""
    a = call.arguments
    name = r.choice(sorted(PARAMETERS[call.function]))
    if name in ("causal", "is_causal", "enable_gqa", "return_lse"):
        bad = r.choice(NOT_BOOLS)
    elif name == "window":
        bad = r.choice(BAD_WINDOWS)
    elif name == "backend":
        bad = r.choice(BAD_BACKENDS if call.function != "naive_attention" else [*BAD_BACKENDS, "cpu"])
    elif name in BAD_NUMBERS:
        bad = r.choice(BAD_NUMBERS[name] + NOT_NUMBERS)
    else:
        choices = BAD_INTS.get(name, []) + bad_values(r, call)[name]
        if isinstance(a.get(name), torch.Tensor):
            choices.append(bad_tensor(r, name, a[name], call))
        if name in ("query", "key", "value", "cu_seqlens_q") or (name == "cu_seqlens_k" and "block_table" not in a):
            choices.append(None)
        if not choices:
            return spoil(r, call)
        bad = r.choice(choices)
    return call._replace(arguments=a | {name: bad}, spoilt=name)


def scramble(r: random.Random, call: Call) -> Call:
    """A few arguments replaced by anything, other arguments' values among it."""
    a = dict(call.arguments)
    pool = [
        *NOT_TENSORS,
        *NOT_NUMBERS,
        *NOT_BOOLS,
        *BAD_WINDOWS,
        *BAD_BACKENDS,
        *a.values(),
        None,
        0,
        1,
        -1,
        0.1,
        2**40,
    ]
    for name in r.sample(sorted(PARAMETERS[call.function]), r.choice([1, 1, 2, 3])):
        if name in ("q_offset", "kv_lengths", "kv_starts", "block_table", "cu_seqlens_q", "cu_seqlens_k") and maybe(r):
            n = r.choice([0, 1, 2, 3, 4])
            a[name] = torch.tensor([r.choice([0, 1, 2, 5, -1, 100, 2**31 - 1]) for _ in range(n)], dtype=torch.int32)
            if name == "block_table":
                a[name] = a[name][:, None]
        else:
            a[name] = r.choice(pool)
    return call._replace(arguments=a, anything=True)


# ---- judgement ---------------------------------------------------------------------------------------------


def named(call: Call, error: Exception) -> set[str]:
    """The parameters of the function that the message names."""
    return set(re.findall(r"\w+", str(error))) & PARAMETERS[call.function]


def largest(x: Any) -> float:
    """The largest magnitude of what is finite in a tensor or a number; 0 for None."""
    x = torch.as_tensor(0 if x is None else x).detach().double()
    return float(torch.where(x.isfinite(), x, 0).abs().max()) if x.numel() else 0.0


def within(error: torch.Tensor, bound: Any, known: torch.Tensor, what: str) -> None:
    off = known & ~(error <= bound)
    if off.any():
        raise AssertionError(f"{what} is off by up to {float(error[off].max()):.3g}")


def score_size(a: dict[str, Any]) -> float:
    """The most that the magnitudes of a score's terms can add up to."""
    mask = a.get("attn_mask")
    size = scale_of(a) * a["query"].shape[-1] * largest(a["query"]) * largest(a["key"]) + largest(a.get("sinks"))
    size += largest(mask) if mask is not None and mask.is_floating_point() else 0
    distance = largest(a.get("q_offset")) + sum(a["query"].shape) + sum(a["key"].shape)
    return size + largest(a.get("alibi_slopes")) * distance


def scale_of(a: dict[str, Any]) -> float:
    return abs(float(a["scale"])) if a.get("scale") is not None else max(a["query"].shape[-1], 1) ** -0.5


def check_result(call: Call, result: Any) -> None:
    """Within an a-priori bound of float64: what roundings of scores, weights and sums can amount to."""
    a = call.arguments
    if call.function == "explain":
        assert "forward" in result.chosen and str(result)
        return
    naive = call.function == "naive_attention"
    scores = score_size(a)
    odd = [name for name in ("query", "key", "value") if not a[name].isfinite().all()]
    if naive and (scores > 1e3 or odd):
        return  # that may overflow, and reach the result from behind a mask: the textbook does not care
    if "value" in odd and len(odd) > 1:
        return  # 0 or NaN: a score of -inf that nobody masked, times inf
    out, lse = result if isinstance(result, tuple) else (result, None)
    exact = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in to_dtype(a, torch.float64).items()}
    value = exact["value"]
    exact["value"] = torch.cat([value, value.abs()], -1)  # the truth, and its size where nothing cancels
    if call.function == "scaled_dot_product_attention":
        both = Call(call.function, exact)()
    else:
        exact |= {"return_lse": True, "backend": "reference"}
        both, true_lse = Call("attention" if naive else call.function, exact)()
    truth, size = both[..., : value.shape[-1]], both[..., value.shape[-1] :]
    assert out.shape == truth.shape and out.dtype == a["query"].dtype

    of_dtype = torch.finfo(a["query"].dtype)
    epsilon = of_dtype.eps if naive else torch.finfo(torch.float32).eps  # of scores and sums
    of_scores = (a["query"].shape[-1] + 16) * epsilon * scores
    of_sums = (sum(a["key"].shape) + 8) * epsilon
    relative = math.expm1(min(2 * of_scores, 60.0)) + of_sums + 2 * of_dtype.eps
    known = truth.isfinite() & size.isfinite()
    if lse is not None:
        within((lse.double() - true_lse).abs(), 2 * of_scores + 16 * of_sums, true_lse.isfinite(), "lse")
        agrees = true_lse.isnan() | ((lse == -INF) == (true_lse == -INF))
        assert naive or agrees.all(), "lse is -inf elsewhere"
    if naive:  # a row without keys gives NaN
        known &= out.isfinite()
    within((out.double() - truth).abs(), relative * size + of_dtype.tiny * (1 + largest(value)), known, "out")
    if call.function in ("attention", "attention_varlen") and not odd:
        check_gradients(call, relative)


def check_gradients(call: Call, relative: float) -> None:
    """Within the same relative error of the largest sum of terms that there can be."""
    a = call.arguments | {"return_lse": True}
    if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in a.values()):
        return

    def results(arguments: dict[str, Any], grads: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        return forward_and_gradients(arguments, lambda k: Call(call.function, k)(), grads=grads)

    actual = results(a)
    grads = random_grads(actual)
    truth = results(to_dtype(a, torch.float64) | {"backend": "reference"}, to_dtype(grads, torch.float64))
    p = float(a.get("dropout_p") or 0)
    of_value = largest(grads["out"]) / (1 - p) if p < 1 else 0.0
    of_score = 2 * of_value * largest(a["value"]) * a["value"].shape[-1] + largest(grads["lse"])  # over its weight
    sizes = {"query": largest(a["key"]) * scale_of(a) * of_score, "key": largest(a["query"]) * scale_of(a) * of_score}
    sizes |= {"value": of_value, "attn_mask": of_score, "sinks": of_score}
    rows, keys = (math.prod(a[name].shape[:-1]) for name in ("query", "key"))
    # Rows share each place of a gradient evenly, and the weights of a row add up to at most 1.
    places = {"query": rows, "key": a["key"].shape[1], "value": a["key"].shape[1], "sinks": a["query"].shape[1]}
    places["attn_mask"] = 1 if a.get("attn_mask") is None else math.prod(a["attn_mask"].shape[:-1])
    for name in actual.keys() - {"out", "lse"}:
        info, size = torch.finfo(actual[name].dtype), sizes[name.removeprefix("grad of ")]
        rows_of_one = rows / max(places[name.removeprefix("grad of ")], 1)
        bound = 2 * (relative + info.eps) * size * rows_of_one + info.tiny * rows * (1 + keys) * (1 + size)
        within((actual[name].double() - truth[name]).abs(), bound, truth[name].isfinite(), name)


def judge(call: Call) -> tuple[str, set[str]]:
    """What became of the call, and which arguments its refusal names."""
    try:
        result = call()
    except REFUSALS as error:
        names = named(call, error)
        assert names, f"no argument is named in {error!r}"
        if call.spoilt is not None or call.anything:
            return "refused", names
        assert "backend 'cpu' cannot compute this" in str(error), f"legal, but {error!r}"
        return "unable", set()
    assert call.spoilt is None, "illegal, but accepted"
    check_result(call, result)
    return "computed", set()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("calls", [1_500, pytest.param(60_000, marks=pytest.mark.exhaustive)])
def test_random_calls(calls):
    isas = cpu.available_isas()
    became, refused = collections.Counter(), collections.Counter()
    for n in range(calls):
        call = draw(n)
        with cpu.use_isa(isas[n % len(isas)]) if isas else contextlib.nullcontext():
            try:
                outcome, names = judge(call)
            except Exception as error:
                pytest.fail(f"seed {n}, {cpu.isa()}: {type(error).__name__}: {error}\n{call}")
        became[outcome] += 1
        refused.update(names)
    assert became["computed"] > calls / 3
    assert became["refused"] > calls / 3
    assert became["unable"] < calls / 10
    assert set.union(*PARAMETERS.values()) == set(refused)
