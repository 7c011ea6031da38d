"""How pyattn measures: speed by paired ratios, memory by its peak, error against float64, bandwidth beside DRAM's.

Ratios of two programs timed one after the other follow the machine's mood. Here the programs take turns:
every round times each of them once, a ratio is taken within a round, the median over rounds is the answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLE_SECONDS = 0.01  # calls shorter than this are repeated until a sample is long enough to trust the clock
PAUSE_SECONDS = 0.01  # between samples: the last program's spinning threads fall asleep and free the cores
TRUTH_ROWS = 64  # of each head: the whole float64 truth would take O(L^2) memory and the most time


@dataclass(frozen=True)
class Times:
    """Seconds a call, by name; entry i of every list comes from round i."""

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, numerator: str, denominator: str) -> float:
        """Median over rounds of ``numerator``'s time over ``denominator``'s, both from the same round."""
        pairs = zip(self.samples[numerator], self.samples[denominator], strict=True)
        return statistics.median(a / b for a, b in pairs)


def alternate(
    callables: Mapping[str, Callable[[], Any]], *, min_time: float = 1.0, rounds: int = 5, cuda: bool = False
) -> Times:
    """Time the callables in turns, for at least ``rounds`` rounds and ``min_time`` seconds altogether.

    >>> work = {"one": lambda: sum(range(1000)), "ten": lambda: sum(range(10000))}
    >>> alternate(work, min_time=0, rounds=3).ratio("ten", "one") > 2
    True
    """
    seconds = _cuda_seconds if cuda else _wall_seconds
    repeats = {}
    for name, fn in callables.items():
        once = seconds(fn, 1)
        if once < 0.1:  # that was the warm-up; of a longer call it was a small part
            once = seconds(fn, 1)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < min_time:
        for name in order:
            time.sleep(PAUSE_SECONDS)
            samples[name].append(seconds(callables[name], repeats[name]))
        order.reverse()  # nobody always runs after the same neighbour
        done += 1
    return Times(samples)


def _wall_seconds(fn: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) / repeats


def forward_backward(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the output of ``forward`` and the gradients of ``inputs``."""

    def run() -> tuple[Tensor, ...]:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return run


def backward_alone(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the gradients only: ``forward`` runs here, once, and its graph is kept."""
    out = forward()
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _cuda_seconds(fn: Callable[[], Any], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def peak_extra_memory(fn: Callable[[], Any], *, cuda: bool = False) -> int | None:
    """Bytes that ``fn()`` needed at its peak, above what was there before and less the tensors it returns.

    On a CPU this is the process's resident memory as Linux counts it, so it sees every allocator; None where
    the system does not offer that. Code and thread stacks touched for the first time count too: call ``fn``,
    or the same on a small problem, once before.
    """
    return call_and_peak(fn, cuda=cuda)[1]


def call_and_peak(fn: Callable[[], Any], *, cuda: bool = False) -> tuple[Any, int | None]:
    """What ``fn()`` returns, and its ``peak_extra_memory``: for calls too slow to make twice."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = fn()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or reusing it would look free
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = _resident("VmRSS")
        except (OSError, AttributeError):
            return fn(), None
        result = fn()
        peak = _resident("VmHWM")
    return result, max(0, peak - before - _tensor_bytes(result))


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _tensor_bytes(result: Any) -> int:
    tensors = [result] if isinstance(result, Tensor) else [t for t in result or () if isinstance(t, Tensor)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def available_memory(*, cuda: bool = False) -> int:
    """Bytes that can still be allocated without swapping: of the machine, or of this process's container."""
    if cuda:
        return torch.cuda.mem_get_info()[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def sample_rows(length: int) -> Tensor:
    """At most TRUTH_ROWS query rows spread over the length, the first and the last among them."""
    return torch.linspace(0, length - 1, min(TRUTH_ROWS, length), dtype=torch.float64).round().long()


def float64_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, *, causal: bool) -> Tensor:
    """The truth for some query rows against all keys: [B, Hq, len(rows), Dv] in O(len(rows) * Lk) memory."""
    q, k, v = query[:, :, rows].double(), key.double(), value.double()
    grouped = (k.shape[1], q.shape[1] // k.shape[1])  # query heads that share keys: rows of one matrix, no copy of k
    scores = q.unflatten(1, grouped).flatten(2, 3) @ k.mT / math.sqrt(q.shape[-1])
    if causal:  # bottom-right: the last query sees the last key
        positions = rows + key.shape[2] - query.shape[2]
        future = torch.arange(key.shape[2])[None, :] > positions[:, None]
        scores = scores.masked_fill(future.repeat(grouped[1], 1).to(scores.device), -math.inf)
    return (scores.softmax(-1) @ v).unflatten(2, (grouped[1], len(rows))).flatten(1, 2)


class Truth:
    """float64 results for some query rows of a problem, which errors are taken against.

    For inputs that require gradients these are known too, of a loss that reads those rows only: run the backward
    with ``grad``, which is zero outside of them, and no other row's scores are needed here.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, *, causal: bool) -> None:
        self.rows = sample_rows(query.shape[2])
        self.grad = torch.zeros_like(grad)
        self.grad[:, :, self.rows] = grad[:, :, self.rows]
        q, k, v = (x.detach().double().requires_grad_(x.requires_grad) for x in (query, key, value))
        out = float64_attention(q, k, v, self.rows, causal=causal)
        self.out = out.detach()
        self.gradients: tuple[Tensor, ...] = ()
        if out.requires_grad:
            self.gradients = torch.autograd.grad(out, (q, k, v), grad[:, :, self.rows].double())

    def errors(self, out: Tensor, *gradients: Tensor) -> tuple[float, float | None]:
        """The largest error of the output and, if there are any, of the gradients."""
        of_gradients = [max_error(got, truth) for got, truth in zip(gradients, self.gradients, strict=True)]
        return max_error(out[:, :, self.rows], self.out), max(of_gradients, default=None)


def max_error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).abs().max().item()


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, backward: bool = False) -> float:
    """Operations of the matrix products: two forward, five more backward; causal needs half the scores."""
    B, H, Lq, D = query.shape
    Lk, Dv = key.shape[2], value.shape[3]
    one = 2.0 * B * H * Lq * Lk * (0.5 if causal else 1.0)
    return one * (D + Dv + (3 * D + 2 * Dv if backward else 0))  # backward: S, dQ, dK of D; dP, dV of Dv


def dram_read() -> tuple[Callable[[], Any], int]:
    """A call that reads memory far beyond the caches, and the bytes that it reads.

    Of some operations of torch this is the one that is fastest with its current number of threads; to be timed in
    turns with what is compared to it.
    """
    buffer = torch.ones(max(2**28, 8 * last_level_cache_bytes()) // 4)  # ones: pages of zeros may all be one page
    rows, doubles = buffer.view(-1, 2**13), buffer.view(torch.float64)
    reads: dict[str, Callable[[], Any]] = {"sum": buffer.sum, "doubles": doubles.sum, "rows": lambda: rows.sum(1)}
    times = alternate(reads, min_time=0, rounds=3)
    return reads[min(reads, key=times.median)], buffer.nbytes


def last_level_cache_bytes() -> int:
    """All caches of the last level together; 0 where Linux does not tell."""
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, cpus, size = ((cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        sizes[int(level), cpus] = 1024 * int(size.removesuffix("K"))
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """How many cores ``usable_cpus`` are, two threads of one core counted once."""
    cpus = usable_cpus()
    try:
        topology = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
        return len({path.read_text() for path in topology})
    except OSError:
        return len(cpus)


def machine() -> dict[str, Any]:
    """What a reader must know of the machine to judge a number measured on it."""
    return {
        "cpu": cpu_name(),
        "cores": len(usable_cpus()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The CPU's model name; AMD's generation is added, since a cloud's "AMD EPYC" says too little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    field = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = re.sub(r"\((R|TM)\)", "", field.get("model name", platform.machine())).strip()
    if field.get("vendor_id") != "AuthenticAMD":
        return name
    family, model = int(field["cpu family"]), int(field["model"])
    zen4 = model // 16 in (1, 6, 7, 10)  # Zen 3 and Zen 4 share family 25
    generations = {23: "Zen 2" if model >= 0x30 else "Zen", 25: "Zen 4" if zen4 else "Zen 3", 26: "Zen 5"}
    return f"{name} ({generations[family]})" if family in generations else name
