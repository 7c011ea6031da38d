"""The cache filled beforehand: what is in it, that nothing is made twice, and that calls find their kernels there."""

from __future__ import annotations

import errno
import functools
import itertools
import types

import pytest
import torch

from pyattn import cli, jit, precompile
from pyattn.backends import cuda
from pyattn.backends.cuda import launch
from pyattn.spec import AttentionSpec, AttentionTensors, Problem

SMALL = ("--arch", "sm_80", "--head-dims", "64")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Its folder, not yet there."""
    if jit.unavailable():
        pytest.skip("; ".join(jit.unavailable()))
    monkeypatch.setenv("PYATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cuda"


@pytest.fixture
def compiled(monkeypatch):
    """What NVRTC would have been asked for: it is not."""
    calls = []

    def fake(file, defines, arch):
        calls.append((file, tuple(sorted(defines.items())), arch))
        return b"code"

    monkeypatch.setattr(jit, "compile", fake)
    return calls


def run(capsys, *options):
    """What is printed."""
    assert cli.main(["precompile", *options]) == 0
    return capsys.readouterr().out


def refused(capsys, *options):
    """The message of a command that exits with status 2."""
    with pytest.raises(SystemExit) as error:
        cli.main(["precompile", *options])
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_fills_an_empty_cache_once(capsys, cache, monkeypatch):
    printed = run(capsys, *SMALL, "--jobs", "2")
    kernels = precompile.kernels("sm_80", [torch.bfloat16], [(64, 64)])
    assert len(list(cache.iterdir())) == len(kernels)
    for said in (f"{len(kernels)} kernels, 0 of them", f"{len(kernels)} kernels compiled", str(cache), precompile.REST):
        assert said in printed
    monkeypatch.setattr(jit, "compile", None)
    for kernel in kernels:
        assert kernel.name.encode() in jit.cubin(kernel.file, kernel.defines, "sm_80")
    assert f"{len(kernels)} kernels, {len(kernels)} of them" in run(capsys, *SMALL)


def test_only_what_is_missing_is_made(capsys, cache, compiled):
    run(capsys, *SMALL)
    before = list(compiled)
    run(capsys, "--arch", "sm_90a,sm_80,sm_80", "--head-dims", "64,40:64", "--dtypes", "bfloat16,float16")
    kernels = [len(precompile.kernels(arch, [torch.bfloat16], [(64, 64)])) for arch in ("sm_80", "sm_90a")]
    assert kernels[0] == len(before) and kernels[1] > 5
    assert len(set(compiled)) == len(compiled) == 2 * sum(kernels), "head dims of 40 are padded to 64"
    assert {arch for _, _, arch in compiled[len(before) :]} == {"sm_80", "sm_90a"}


# ---- which kernels -------------------------------------------------------------------------------------------


def kernels_of(
    group=1, queries=100, keys=1000, D=64, page_size=0, packed=False, backward=False, spec=None, arch="sm_80", **extra
):
    """Those that a call of dense bfloat16 tensors starts, with two key heads."""
    vector = functools.partial(torch.empty, device="meta", dtype=torch.int32)
    empty = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    query, key, value = empty(3, 2 * group, queries, D), empty(3, 2, keys, D), empty(3, 2, keys, D)
    spec = AttentionSpec(scale=D**-0.5, **(spec or {}))
    if page_size:
        key = value = empty(50, 2, page_size, D)
        extra |= {"block_table": vector(3, -(-keys // page_size)), "kv_lengths": vector(3)}
    if packed:
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        extra |= {"cu_seqlens_q": vector(4), "cu_seqlens_k": vector(4)}
        spec = spec._replace(max_seqlen_q=queries, max_seqlen_k=keys)
    tensors = AttentionTensors(query, key, value, **extra)
    if backward:
        strides = (query.stride(), query.stride(), query.stride(), key.stride(), value.stride())
        launches = cuda.backward_plan(Problem.of("backward", spec, tensors), launch.Target(arch), strides, None, True)
    else:
        problem = Problem.of("forward", spec, tensors)
        launches = cuda.forward_plan(problem, launch.Target(arch), query.stride(), True).launches
    return {x.kernel for x in launches}


@functools.cache
def usual(arch="sm_80"):
    return set(precompile.kernels(arch, [torch.bfloat16], [(64, 64), (128, 128)]))


LENGTHS = (1, 2, 3, 5, 8, 16, 17, 64, 65, 100, 129, 512, 513, 3000, 7000)
on_both = pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])


@on_both
def test_causal_calls_of_any_length_find_their_kernels(arch):
    found = set()
    for group, D, queries, keys in itertools.product(precompile.GROUPS, (64, 128), LENGTHS, LENGTHS):
        for backward in (False, True):
            found |= kernels_of(group, queries, keys, D, spec={"window_right": 0}, backward=backward, arch=arch)
    assert found == usual(arch), "all are there, and none for nothing"


RUN_TIME = {
    "plain": {},
    "window": {"spec": {"window_left": 8, "window_right": 0}},
    "offset": {"spec": {"q_offset": 3}},
    "packed": {"packed": True},
    "lengths": {"kv_lengths": torch.empty(3, dtype=torch.int64), "kv_starts": torch.empty(3, dtype=torch.int32)},
    "sinks": {"sinks": torch.empty(2)},
}


@on_both
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("call", RUN_TIME.values(), ids=RUN_TIME)
def test_what_is_decided_at_run_time_needs_no_other_kernels(call, backward, arch):
    for queries in (1, 40, 100):
        assert kernels_of(queries=queries, backward=backward, arch=arch, **call) <= usual(arch)


REST = {
    "mask": {"attn_mask": torch.empty(1000, dtype=torch.bool)},
    "alibi": {"alibi_slopes": torch.empty(2)},
    "softcap": {"spec": {"softcap": 30.0}},
    "dropout": {"spec": {"dropout_p": 0.1}, "dropout_seed": torch.empty((), dtype=torch.int64)},
    "head dim": {"D": 96},
    "page size": {"page_size": 16},
}


@on_both
@pytest.mark.parametrize("call", REST.values(), ids=REST)
def test_the_rest_is_left_out(call, arch):
    assert not kernels_of(arch=arch, **call) & usual(arch)


def test_a_head_dim_decides_whether_rows_are_copied_by_16_bytes():
    for D, aligned in ((64, 1), (40, 1), (60, 0)):
        kernels = precompile.kernels("sm_80", [torch.bfloat16], [(D, D)])
        assert {kernel.ALIGNED for kernel in kernels if kernel.name == "attention_fwd"} == {aligned}


def test_a_number_of_heads_is_left_out():
    assert not kernels_of(group=7, queries=1, keys=10) & usual()
    assert kernels_of(group=7) <= usual(), "the forward takes any"


def test_paged_calls_find_their_kernels():
    paged = set(precompile.kernels("sm_80", [torch.bfloat16], [(64, 64)], page_sizes=[16, 128]))
    for group, queries, keys in itertools.product(precompile.GROUPS, LENGTHS, LENGTHS):
        assert kernels_of(group, queries, keys, page_size=16) <= paged
    assert {kernel.PAGE_SIZE for kernel in paged} == {0, 16, 128}


def test_architectures_are_those_that_the_backend_asks_for(cache, monkeypatch):
    archs = precompile.archs()
    assert {"sm_80", "sm_90a"} <= set(archs)
    for number, arch in zip((x for x in jit.nvrtc_archs() if x >= 80), archs, strict=True):
        major, minor = divmod(number, 10)
        properties = types.SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert launch.Gpu().target(torch.device("cuda", 0)) == launch.Target(arch, 132)


# ---- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--arch", "sm_1"),
        ("--arch", "sm_90"),  # the backend would ask for sm_90a
        ("--arch", "sm_80,"),
        ("--head-dims", "0"),
        ("--head-dims", "257"),
        ("--head-dims", "64:"),
        ("--head-dims", "64:512"),
        ("--dtypes", "float32"),
        ("--page-sizes", "0"),
        ("--page-sizes", "-16"),
        ("--jobs", "0"),
    ],
)
def test_bad_options_are_refused(capsys, cache, compiled, option, value):
    options = dict([SMALL[:2], SMALL[2:]]) | {option: value}
    message = refused(capsys, *itertools.chain.from_iterable(options.items()))
    assert option in message and "must be" in message
    assert not compiled


def test_an_architecture_is_required(capsys):
    assert "--arch" in refused(capsys)


def test_without_nvrtc(capsys, monkeypatch):
    monkeypatch.setattr(jit, "unavailable", lambda: ["NVRTC cannot be loaded"])
    assert "NVRTC cannot be loaded" in refused(capsys, *SMALL)


def test_without_a_cache(capsys, cache, compiled):
    cache.parent.write_text("a file")
    assert str(cache) in refused(capsys, *SMALL)
    assert not compiled


def test_a_cache_that_cannot_be_written(capsys, cache, compiled, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jit, "_write", full)
    assert "No space left" in refused(capsys, *SMALL, "--jobs", "1")


def test_a_kernel_that_does_not_compile(capsys, cache, monkeypatch):
    def broken(*arguments):
        raise jit.CompileError("attention_fwd.cuh does not compile")

    monkeypatch.setattr(jit, "compile", broken)
    assert "does not compile" in refused(capsys, *SMALL)


def test_info_tells_of_nvrtc_and_the_cache(capsys, cache):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert str(cache) in printed
    assert not cache.exists()
    assert "backend cuda" in printed and ".".join(map(str, jit.nvrtc_version())) in printed
