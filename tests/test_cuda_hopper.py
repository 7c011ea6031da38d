"""The CUDA kernels for Hopper on the emulator: conformance, planted bugs, and when they are chosen.

On a Hopper GPU ``test_cuda.py`` runs them. The emulator's are small tiles in most tests, so that there are many.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import emulator
import pytest
import torch
from gpu_kernels import MAX_HEAD_DIM, ON_GPU, Kernels, assert_modes_give_the_same_bits, assert_same_bits

import pyattn
from pyattn.backends import cuda
from pyattn.backends.cuda import call, hopper, launch
from pyattn.backends.cuda import kernels as cuda_kernels
from pyattn.backends.cuda.kernels import (
    HOPPER_TILES,
    SHARED_BYTES,
    Tiles,
    has_unordered_hopper_kernel,
    hopper_kernel,
)
from pyattn.testing import CASES, OUTPUTS, Case, make_inputs

if ON_GPU or not emulator.supported():
    pytest.skip("runs on the emulator, on x86-64", allow_module_level=True)
TYPES = (torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in CASES}
SMALL = {
    "forward": Tiles(128, 32, 12),
    "dkdv": Tiles(32, 128, 12),
    "unordered dkdv": Tiles(64, 128, 12),
    "dq": Tiles(128, 32, 12),
}
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 104), (64, 256))


def not_for_hopper(case):
    """Why a case's forward is not computed by the kernels tested here."""
    problem = pyattn.explain(**make_inputs(case, torch.bfloat16)).problem
    macros, _ = call.common(problem, True)
    return ["few queries"] if call.few_queries(problem) else hopper.why_not(problem, macros, "sm_90a")


# With few queries only the backward is theirs.
CHOSEN = [
    case
    for case in CASES
    if max(case.D, case.Dv or 0) <= MAX_HEAD_DIM and not_for_hopper(case) in ([], ["few queries"] * case.differentiable)
]


def some(parameters, quick):
    """As parameters of a test; the others are for ``make test-all``."""
    marks = {True: (), False: pytest.mark.exhaustive}
    values = [(x if isinstance(x, tuple) else (x,), x in quick) for x in parameters]
    return [pytest.param(*value, marks=marks[is_quick]) for value, is_quick in values]


@pytest.fixture
def small_tiles():
    tiles = {name: (SMALL[name.removeprefix("short ").removesuffix(", other")],) * 5 for name in HOPPER_TILES}
    with mock.patch.dict(HOPPER_TILES, tiles), emulator.cleared():
        yield


@pytest.fixture
def at_work():
    with emulator.installed(arch="sm_90a"):
        yield


@pytest.fixture(params=[False, True], ids=["late", "racing"])
def racing(request):
    return request.param


def check(case, dtype, racing, backward=True, **options):
    launch.gpu.configure(racing, seed=1)
    Kernels("cuda", dtype).check(case, backward, **options)


# ---- conformance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(0, len(CHOSEN), 2), ids=[case.name for case in CHOSEN[::2]])
def test_case(index, at_work, small_tiles):
    """Every other case in one type and one mode: neighbours differ in one of them."""
    check(CHOSEN[index], TYPES[index // 2 % 2], racing=bool(index // 4 % 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CHOSEN)
def test_every_case(case, dtype, racing, at_work):
    check(case, dtype, racing)


@pytest.mark.parametrize(("D", "Dv"), some(HEAD_DIMS, ((128, 128), (192, 128))))
def test_head_dims(D, Dv, at_work):
    """With the tiles that a GPU gets."""
    case = Case("head dim", B=1, Hq=2, Hkv=1, Lq=130, Lk=280, D=D, Dv=Dv, causal=True)
    check(case, torch.bfloat16, racing=D == 64)


@pytest.mark.parametrize("lengths", [(0, 300), (129, 1), (256, 256)])
def test_more_tiles_than_multiprocessors(lengths, at_work, small_tiles):
    """A block goes from tile to tile, also from one without keys to one with many."""
    case = Case("persistent", B=2, Hq=4, Hkv=2, Lq=300, Lk=300, D=64, causal=True)
    kwargs = make_inputs(case, torch.float16, requires_grad=True)
    launch.gpu.configure(True, seed=2)
    whole = Kernels("cuda", torch.float16).results(kwargs, OUTPUTS)
    kwargs["kv_lengths"] = torch.tensor(lengths)
    padded = Kernels("cuda", torch.float16).results(kwargs, OUTPUTS)
    for b, length in enumerate(lengths):
        alone = {name: x[b : b + 1] if name in ("query", "key", "value") else x for name, x in kwargs.items()}
        alone["kv_lengths"] = torch.tensor([length])
        for name, x in Kernels("cuda", torch.float16).results(alone, ("out",)).items():
            if name in ("out", "lse"):
                assert torch.equal(padded[name][b : b + 1], x), name
    assert whole["out"].isfinite().all()


def with_nan(kwargs, lengths, starts):
    """Keys and values that are not in use are NaN."""
    moved = dict(kwargs)
    for name in ("key", "value"):
        x = kwargs[name].detach().clone()
        for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            x[b, :, length:] = torch.nan
            x[b, :, :start] = torch.nan
        moved[name] = x.requires_grad_()
    return moved


def results_with_nan():
    case = Case("padding", B=2, Hq=2, Hkv=1, Lq=100, Lk=150, D=64)
    kwargs = make_inputs(case, torch.bfloat16, requires_grad=True)
    kwargs |= {"kv_lengths": torch.tensor([70, 150]), "kv_starts": torch.tensor([0, 40])}
    kernels = Kernels("cuda", torch.bfloat16)
    return kernels.results(with_nan(kwargs, (70, 150), (0, 40)), OUTPUTS), kernels.results(kwargs, OUTPUTS)


def test_keys_that_are_not_in_use_may_be_nan(racing, at_work, small_tiles):
    """No weight of 0 makes a NaN vanish: they must not come into a product."""
    launch.gpu.configure(racing, seed=1)
    assert_same_bits(*results_with_nan())


@pytest.mark.parametrize("deterministic", [True, False])
def test_sequences_beside_each_other_do_not_meet(deterministic, racing, at_work, small_tiles):
    """The tile that ends one packed sequence begins the next one, here full of NaN."""
    lengths = (100, 60, 90)
    launch.gpu.configure(racing, seed=1)
    torch.use_deterministic_algorithms(deterministic)
    total, kernels = sum(lengths), Kernels("cuda", torch.float16)
    q, k, v = (torch.randn(total, 2, 40, dtype=torch.float16) for _ in range(3))
    cu_seqlens = torch.tensor([0, 100, 160, 250], dtype=torch.int32)

    def run(*tensors):
        leaves = dict(zip(("query", "key", "value"), (x.clone().requires_grad_() for x in tensors), strict=True))
        packed = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "causal": True,
            "deterministic": deterministic,
        }
        grads = {"out": torch.ones_like(q)}
        grads["out"][100:160] = tensors[0][100:160] * 0 + 1
        return kernels.results(leaves | packed, ("out",), grads)

    clean, nan = run(q, k, v), [x.clone() for x in (q, k, v)]
    for x in nan:
        x[100:160] = torch.nan
    for name, x in run(*nan).items():
        for part in (slice(0, 100), slice(160, 250)):
            a, b = (y[:, part] if name == "lse" else y[part] for y in (x, clean[name]))
            assert torch.equal(a, b), name


def planned(case):
    problem = pyattn.explain(**make_inputs(case, torch.bfloat16)).problem
    return cuda.forward_plan(problem, launch.target_of(problem.device), problem.query.stride, True)


@pytest.mark.parametrize(("Hq", "rows"), [(3, 1), (4, 2), (12, 2), (32, 16)])
def test_few_queries_of_several_heads_are_rows_of_one_tile(Hq, rows, at_work):
    """As many heads of a key head as divide a tile; of many queries each head has its own tiles."""
    case = Case("group", B=2, Hq=Hq, Hkv=2 if Hq % 2 == 0 else 1, Lq=60, Lk=150, D=128, causal=True)
    assert rows == planned(case).launches[0].kernel.ROWS
    assert planned(dataclasses.replace(case, Lq=1024, Lk=1024)).launches[0].kernel.ROWS == 1
    check(case, torch.float16, racing=Hq == 4, backward=False)


def test_few_queries_of_packed_sequences(racing, at_work, small_tiles):
    launch.gpu.configure(racing, seed=1)
    lengths = (20, 50), (0, 30), (33, 33)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in zip(*lengths, strict=True))
    q, k, v = torch.randn(53, 8, 64).bfloat16(), torch.randn(113, 2, 64).bfloat16(), torch.randn(113, 2, 64).bfloat16()
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 33, "max_seqlen_k": 50}
    options = {"causal": True, "backend": "cuda", "return_lse": True}
    out, lse = pyattn.attention_varlen(q, k, v, **packed, **options)
    for (Lq, _), row, key, next_key in zip(lengths, cu_q, cu_k, cu_k[1:], strict=False):
        rows, keys = slice(row, row + Lq), slice(key, next_key)
        alone = pyattn.attention(*(x[None].transpose(1, 2) for x in (q[rows], k[keys], v[keys])), **options)
        if Lq:
            assert torch.equal(out[rows], alone[0][0].transpose(0, 1)) and torch.equal(lse[:, rows], alone[1][0])
    problem = pyattn.explain(q, k, v, **packed).problem
    assert cuda.forward_plan(problem, launch.target_of(q.device), q.stride(), True).launches[0].kernel.ROWS == 4


@pytest.mark.parametrize("name", ["gqa", "sinks, window, empty rows", "tiles, padding", "alibi, both sides, gqa"])
def test_keys_in_parts(name, at_work, small_tiles):
    """Some parts are beyond what rows see, and give nothing; a sink counts once."""
    with mock.patch.object(hopper, "SPLIT", 50), mock.patch.object(hopper, "MAX_ROWS", 2**20), emulator.cleared():
        plan = planned(BY_NAME[name])
        assert plan.split == 32 and plan.num_splits > 1 and len(plan.launches) == 2
        check(BY_NAME[name], torch.bfloat16, racing="sinks" in name, backward=False)


def test_only_few_queries_have_their_keys_in_parts(at_work):
    """Of so many as fill a few tiles; their parts depend on nothing but the call's lengths."""
    case = Case("long", B=1, Hq=8, Hkv=2, Lq=128, Lk=8192, D=128)
    parts = {"B": 9}, {"Lq": 129}, {"Lk": 2048}
    assert planned(case).split == 2048 and planned(case).num_splits == 4
    assert [planned(dataclasses.replace(case, **other)).num_splits for other in parts] == [4, 1, 1]
    text = str(pyattn.explain(**make_inputs(case, torch.bfloat16), backend="cuda"))
    assert "4 parts of 2048 keys" in text


@pytest.fixture
def in_any_order():
    torch.use_deterministic_algorithms(False)
    return {"deterministic": False}


UNORDERED = {
    **{name: BY_NAME[name] for name in ("tiles, gqa", "tiles, gqa, window", "packed, many", "padding right")},
    **{
        f"D {D}, {Dv}": Case("head dim", B=1, Hq=2, Hkv=1, Lq=130, Lk=280, D=D, Dv=Dv, causal=True)
        for D, Dv in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (40, 104))
    },
}


@pytest.mark.parametrize("name", some(UNORDERED, ("tiles, gqa", "packed, many", "D 128, 128", "D 192, 128")))
def test_gradients_in_any_order(name, racing, in_any_order, at_work):
    """Blocks of keys add to the query's gradient as they come; the tolerance is the same."""
    kwargs = make_inputs(UNORDERED[name], torch.float16, requires_grad=True) | in_any_order
    assert "keys, and queries in any order" in str(pyattn.explain(**kwargs, backend="cuda"))
    check(UNORDERED[name], torch.float16, racing, **in_any_order)


def test_what_has_no_room_for_sums_in_any_order(in_any_order, at_work):
    for case in (BY_NAME["softcap"], Case("head dim", B=1, Hq=1, Hkv=1, Lq=70, Lk=70, D=256)):
        kwargs = make_inputs(case, torch.float16, requires_grad=True) | in_any_order
        assert "any order" not in str(pyattn.explain(**kwargs, backend="cuda")), case
    check(case, torch.float16, False, **in_any_order)


def test_modes_do_not_change_the_bits(at_work, small_tiles):
    assert_modes_give_the_same_bits()


# ---- mutants -----------------------------------------------------------------------------------------------

FWD, DKDV, DQ = "attention_fwd_hopper.cuh", "attention_bwd_dkdv_hopper.cuh", "attention_bwd_dq_hopper.cuh"
RACE = r"shared word|under way|without a barrier|still reads|more arrivals"
NUMBER, HANGS, FENCE = r"error|differ|infinite|NaN", "deadlock", "fence"
KEYS_WAIT = "prim::barrier_wait(shared.full(KEY, key_at.stage), key_at.parity);\n        take_turn();\n"
VALUE_RELEASE = "        release(shared.empty(VALUE, value_at.stage));\n        value_at.next();\n        pack"
SCORES_FENCE = "prim::products_fence(scores.x, weights, out.x);"
SCRUB_FENCE = "    prim::fence_stores();\n    prim::sync_warp();\n  }\n\n  // A warp's rows"
ROW_ARRIVAL = "if (lane() == 0) prim::barrier_arrive(full);\n        at.next();"
NEXT = "stage = 0, parity ^= 1"
LAST_KEYS = "begin();\n        begin_multiply_add(grad_query, packed, shared.key(used_at.stage));"
GRADIENTS_WAIT = (
    "prim::products_wait<0>(scores.weights, scores.grads, grad_key.x, grad_value.x);\n"
    "        release(shared.empty(ROW, used_at"
)
# What is changed: file, old text, new text; the case that sees it, and what is said.
MUTANTS = {
    "missing wait": (FWD, KEYS_WAIT, "take_turn();\n", "tiles, gqa", RACE),
    "wrong phase": ("hopper.cuh", NEXT, "stage = 0", "tiles, gqa", f"{RACE}|{HANGS}"),
    "missing release": (FWD, VALUE_RELEASE, "        value_at.next();\n        pack", "tiles, gqa", HANGS),
    "release of the wrong stage": (FWD, VALUE_RELEASE, VALUE_RELEASE.replace("VALUE,", "KEY,"), "tiles, gqa",
        f"{RACE}|{HANGS}"),
    "missing wait for values": (FWD, "prim::products_wait<0>(out.x, weights);", "", "tiles, gqa",
        f"{RACE}|{FENCE}|{NUMBER}"),
    "missing fence": (FWD, SCORES_FENCE, "", "tiles, gqa", FENCE),
    "early read of sums": (FWD, "prim::products_wait<1>(scores.x);", "prim::products_wait<2>(scores.x);",
        "tiles, gqa", NUMBER),
    "wrong stride": ("hopper.cuh", "operand(base + row * 128, 16, 1024)", "operand(base + row * 128, 16, 512)",
        "tiles, gqa", f"{NUMBER}|{RACE}"),
    "wrong panel": ("hopper.cuh", "prim::operand(base, PANEL_BYTES, 1024)", "prim::operand(base, 1024, 1024)",
        "head dim 128", f"{NUMBER}|{RACE}"),
    "missing rescale": (FWD, "rescale(out, shrink);", "", "tiles, gqa", NUMBER),
    "registers that nobody gave": ("hopper.cuh", "PRODUCER_REGISTERS = CONSUMERS == 2 ? 24",
        "PRODUCER_REGISTERS = CONSUMERS == 2 ? 32", "tiles, gqa", HANGS),
    "missing fence of zeros": ("hopper.cuh", SCRUB_FENCE, SCRUB_FENCE.replace("prim::fence_stores();", ""),
        "padding right", FENCE),
    "missing fence of the output": ("hopper.cuh", "prim::fence_stores();  // the tile may be copied to again", "",
        "persistent", FENCE),
    "dropped item": ("hopper.cuh", "first < p.items;", "first < p.items - 2;",
        "persistent", NUMBER),
    "pairs that are not": ("hopper.cuh", "num_tiles - 1 - place.tile / 2", "num_tiles - 2 - place.tile / 2",
        "persistent", NUMBER),
    "wrong head": ("hopper.cuh", "rest / p.chunk % p.heads_together)", "0)", "persistent", NUMBER),
    "rows of one head": (FWD, "head = first_head + r % ROWS;", "head = first_head;", "group", NUMBER),
    "queries of one head": (FWD, "first_query + r / ROWS, first_head", "first_query + r, first_head", "group", NUMBER),
    "parts that overlap": (FWD, "smaller(tiles.end, (split + 1) * p.split)", "tiles.end", "parts",
        NUMBER),
    "a sink for each part": (FWD, "!p.partial_out);", "true);", "parts", NUMBER),
    "keys of the next tile": (DQ, LAST_KEYS, LAST_KEYS.replace("used_at", "key_at"), "tiles, gqa",
        f"{NUMBER}|{RACE}|{HANGS}"),
    "no delta": (DQ, "(grad.x[0][n][i] - delta[i / 2])", "grad.x[0][n][i]", "tiles, gqa", NUMBER),
    "terms nobody waits for": (DKDV, "kind == ROW ? 3 : 2", "2", "tiles, gqa", f"{RACE}|{NUMBER}|{HANGS}"),
    "missing arrival": (DKDV, ROW_ARRIVAL, "at.next();", "tiles, gqa", HANGS),
    "rows off by one": ("tile.cuh", "{key - last + 1, key - first + 1}", "{key - last, key - first + 1}",
        "tiles, gqa", NUMBER),
    "window's other side": ("tile.cuh", "{key - last + 1, key - first + 1}", "{key - last + 1, key - first}",
        "tiles, gqa, window", NUMBER),
    "group's other heads": (DKDV, "last_head(head + p.Hq / p.Hkv)", "last_head(head + 1)", "tiles, gqa", NUMBER),
    "missing wait for gradients": (DKDV,
        GRADIENTS_WAIT, GRADIENTS_WAIT.partition("\n")[2], "tiles, gqa", f"{RACE}|{FENCE}|{NUMBER}|products"),
    "any order, scores nobody waits for": (DKDV,
        "prim::barrier_wait(shared.full(SCORES, scores_at.stage), scores_at.parity);", "", "D 128, 128", RACE),
    "any order, scores in one place": (DKDV, "all_scores + stage * ScoresTile::BYTES", "all_scores", "D 128, 128",
        RACE),
    "any order, missing fence": (DKDV, "  prim::fence_stores();\n  prim::sync_warp();\n  release(full);",
        "  prim::sync_warp();\n  release(full);", "D 128, 128", FENCE),
    "any order, keys overwritten": (DKDV, "wait_for_consumers();", "wait_for_consumer();", "D 128, 128", RACE),
    "any order, the same columns": (DKDV, "(consumer() + stage) % CONSUMERS", "stage % CONSUMERS",
        "D 64, 64", NUMBER),
    "any order, last columns": (DKDV, "i < KeyTile::PANELS", "i < CONSUMERS", "D 192, 192", NUMBER),
    "any order, scores not transposed": (DKDV, "multiply_async<true, true>", "multiply_async<true, false>",
        "D 128, 128", f"{NUMBER}|{RACE}"),
    "no derivative of softcap": (DKDV, "if (SOFTCAP) grad.x[0][n][e] *= derivative.x[0][n][e];", "", "softcap", NUMBER),
}  # fmt: skip
QUICK_MUTANTS = (
    "missing wait",
    "wrong phase",
    "missing release",
    "missing fence",
    "early read of sums",
    "wrong stride",
    "missing rescale",
    "registers that nobody gave",
    "keys of the next tile",
    "missing wait for gradients",
    "any order, keys overwritten",
)
EXTRA = {
    "persistent": Case("persistent", B=1, Hq=4, Hkv=2, Lq=400, Lk=300, D=64, causal=True),
    "group": Case("group", B=1, Hq=4, Hkv=2, Lq=40, Lk=60, D=64),
    "parts": Case("parts", B=1, Hq=4, Hkv=2, Lq=40, Lk=200, D=64, sinks=True),
}


@pytest.mark.parametrize("mutant", some(MUTANTS, QUICK_MUTANTS))
def test_a_mutant_is_caught(mutant, tmp_path, small_tiles):
    file, old, new, case, complaint = MUTANTS[mutant]
    sources, ordered = emulator.plant(tmp_path / "cuda", file, old, new), not mutant.startswith("any order")
    torch.use_deterministic_algorithms(ordered)
    with (
        mock.patch.object(hopper, "SPLIT", 64 if case == "parts" else hopper.SPLIT),
        emulator.installed(sources, arch="sm_90a"),
        pytest.raises((AssertionError, RuntimeError), match=complaint),
    ):
        for racing in (False, True):
            check((BY_NAME | UNORDERED | EXTRA)[case], torch.float16, racing, file != FWD, deterministic=ordered)


def test_nan_that_comes_into_a_product_is_caught(tmp_path, small_tiles):
    sources = emulator.plant(tmp_path / "cuda", "hopper.cuh", "if (row < begin || row >= end)", "if (row < 0)")
    with emulator.installed(sources, arch="sm_90a"), pytest.raises(AssertionError, match="differ"):
        assert_same_bits(*results_with_nan())


# ---- launches ----------------------------------------------------------------------------------------------


def test_kernels_fit_the_gpu():
    for D, Dv in HEAD_DIMS:
        for mask in (0, 3):
            macros = dict.fromkeys(emulator.FLAGS, 0) | {"ROWS": 1, "MASK": mask}
            macros.pop("GRADIENTS")
            ops = [("forward", 1e3), ("forward", 1e4), ("dkdv", 1e3), ("dq", 1e3)]
            if has_unordered_hopper_kernel((D, Dv), macros):
                ops.append(("unordered dkdv", 1e3))
            for op, keys in ops:
                kernel = hopper_kernel(op, (D, Dv), macros, keys)
                assert kernel.shared_bytes <= SHARED_BYTES["sm_90a"], (op, D, Dv)
                assert (
                    kernel.threads == 64 * (kernel.tiles.BLOCK_N if "dkdv" in op else kernel.tiles.BLOCK_M) // 32 + 128
                )


def test_what_they_do_not_know_falls_to_the_kernels_for_sm_80(at_work):
    for name, reason in {
        "causal": None,
        "paged, many queries": "knows no pages",
        "tiles, dropout": "knows no dropout",
        "head dim 33": "needs rows that begin at multiples of 16 bytes",
    }.items():
        case = BY_NAME[name]
        kwargs = make_inputs(case, torch.bfloat16, requires_grad=case.differentiable)
        text, problem = str(pyattn.explain(**kwargs, backend="cuda")), pyattn.explain(**kwargs).problem
        kernels = {
            x.kernel.name
            for x in cuda.forward_plan(problem, launch.target_of(problem.device), problem.query.stride, True).launches
        }
        assert kernels == {"attention_fwd" if reason else "attention_fwd_hopper"}, name
        assert (reason is None or f"sm_80's kernels: {reason}" in text) and ("sm_80" in text) == bool(reason), text


def test_expanded_tensors(at_work):
    """Keys that heads share by a stride of 0 fall to the kernels for sm_80, and a gradient is made dense."""
    case = Case("expanded", B=1, Hq=4, Hkv=4, Lq=100, Lk=100, D=64)
    kwargs = make_inputs(case, torch.float16, requires_grad=True)
    shared = dict(kwargs)
    for name in ("key", "value"):
        one = kwargs[name].detach()[:, :1]
        shared[name] = one.expand(-1, 4, -1, -1).requires_grad_()
        kwargs[name] = shared[name].detach().contiguous().requires_grad_()
    kernels, grad = Kernels("cuda", torch.float16), torch.randn(1, 4, 1, 64, dtype=torch.float16)
    grads = {"out": grad.expand(1, 4, 100, 64)}
    assert "not expanded" in str(pyattn.explain(**shared, backend="cuda"))
    found, expected = (kernels.results(x, ("out",), grads) for x in (shared, kwargs))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], atol=2e-3, rtol=2e-2)


def test_a_gpu_that_is_not_hopper_has_the_kernels_for_sm_80():
    with emulator.installed(arch="sm_100a"):
        problem = pyattn.explain(**make_inputs(BY_NAME["causal"], torch.bfloat16)).problem
        (only,) = cuda.forward_plan(problem, launch.target_of(problem.device), problem.query.stride, True).launches
    assert only.kernel.name == "attention_fwd" and not only.maps


def test_few_keys_leave_room_for_a_second_query():
    macros = dict.fromkeys(emulator.FLAGS, 0) | {"ROWS": 1}
    macros.pop("GRADIENTS")
    few, many = (hopper_kernel("forward", (128, 128), macros, keys) for keys in (1000, cuda_kernels.FEW_KEYS))
    assert few.tiles.BLOCK_N < many.tiles.BLOCK_N


def test_heads_go_together_as_far_as_the_cache_goes(at_work):
    def together(length):
        case = Case("cache", B=1, Hq=8, Hkv=8, Lq=length, Lk=length, D=64)
        problem = pyattn.explain(**make_inputs(case, torch.bfloat16)).problem
        return launch_number(
            cuda.forward_plan(problem, launch.target_of(problem.device), problem.query.stride, True).launches[0],
            "heads_together",
        )

    with mock.patch.object(hopper, "L2_BYTES", 4 * 2**18), emulator.cleared():
        assert [together(length) for length in (128, 1024, 2048, 8192)] == [8, 4, 2, 1]


def launch_number(planned, name):
    import struct

    codes = launch.numbers()
    values = struct.unpack_from("=" + "".join(codes.values()), planned.numbers)
    return dict(zip(codes, values, strict=True))[name]
