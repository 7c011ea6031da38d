"""Whole models: a training step and generation of the GPT and of the encoder-decoder, at long contexts.

What is swapped is ``attention=``. Of a training step the time of its attention alone is measured, too: a call of each
kind that the model makes, forward and backward. Generation attends over caches that hold as much as the context.
Peaks of memory are those of a first training step, each in a process of its own.
"""

import concurrent.futures
import ctypes
import itertools
import math
import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from suite import CORES, cpu, significant
from torch import Tensor, nn

from pyattn import measure
from pyattn.models import GPT, Transformer
from pyattn.nn import implementations

NAMES = {"pyattn": "pyattn", "torch SDPA": "torch", "naive": "naive"}
DIM, HEADS, HEAD_DIM, KV_HEADS, VOCABULARY, NEW_TOKENS = 256, 4, 64, 2, 256, 8
LAYERS = {"GPT": 4, "Transformer": 2}  # of the Transformer's encoder and decoder each
MEMORY = 4 * 2**30  # for the longest context
STEP = 512  # in which that is told
M_MMAP_THRESHOLD = -3  # of malloc.h


class Cell(NamedTuple):
    threads: int
    model: str
    op: str  # "training step", "generation", "peak memory" or "longest context"
    length: int  # of the text, and of the source; of the longest context the most that is tried
    batch: int = 1
    head_dim: int = HEAD_DIM

    def __str__(self) -> str:
        return f"{self.model}-{self.op}-L{self.length}-b{self.batch}-{self.threads}t".replace(" ", "_")


CONTEXTS = (512, 2048, 8192, 16384)
GRID = [
    *(Cell(CORES, *cell) for cell in itertools.product(LAYERS, ("training step",), CONTEXTS)),
    *(Cell(CORES, *cell) for cell in itertools.product(LAYERS, ("generation",), CONTEXTS, (1, 16))),
    *(Cell(CORES, *cell) for cell in itertools.product(LAYERS, ("peak memory",), CONTEXTS)),
    *(Cell(CORES, model, "longest context", 131072) for model in LAYERS),
]
QUICK = [cell for cell in GRID if cell.length == 512]


def model_of(cell: Cell, name: str) -> Any:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocabulary": VOCABULARY, "dim": DIM, "heads": HEADS, "attention": NAMES[name]}
    if cell.model == "GPT":
        return GPT(**shared, depth=LAYERS["GPT"], kv_heads=KV_HEADS, max_length=cell.length + NEW_TOKENS)
    layers = LAYERS["Transformer"]
    return Transformer(**shared, encoder_layers=layers, decoder_layers=layers, dropout=0.0)


# ---- a training step ---------------------------------------------------------------------------------------


def training_step(cell: Cell, name: str, length: int) -> Callable[[], Tensor]:
    model = model_of(cell, name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    tokens = torch.randint(3, VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> Tensor:
        if cell.model == "GPT":
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        else:
            loss = model.loss(tokens[:, :-1], [length], tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def attention_alone(cell: Cell, name: str) -> Callable[[], Any]:
    """Forward and backward of all calls of attention in a step."""
    kv_heads = KV_HEADS if cell.model == "GPT" else HEADS
    q, k, v = (torch.randn(1, h, cell.length, HEAD_DIM, requires_grad=True) for h in (HEADS, kv_heads, kv_heads))
    kinds = [True] if cell.model == "GPT" else [False, True, False]  # of the encoder, the decoder, between them
    grad = torch.randn_like(q)

    def run() -> None:
        for causal in kinds * LAYERS[cell.model]:
            out = implementations.attend(NAMES[name], q, k, v, causal=causal)
            torch.autograd.grad(out, (q, k, v), grad)

    return run


def naive_bytes(cell: Cell, length: int) -> float:
    """What naive attention keeps for the backward, in float32: two matrices of scores a head and call, at least."""
    calls = LAYERS["GPT"] if cell.model == "GPT" else 3 * LAYERS["Transformer"]
    return 2 * 4 * calls * HEADS * length**2


def absent(cell: Cell) -> dict[str, str]:
    free = measure.available_memory()
    if naive_bytes(cell, cell.length) < free:
        return {}
    return {
        "naive": f"needs {naive_bytes(cell, cell.length) / 2**30:.0f} GB for its scores, {free / 2**30:.0f} are free"
    }


def train(cell: Cell, benchmark: Any) -> dict[str, Any]:
    missing = absent(cell)
    names = [name for name in NAMES if name not in missing]
    steps = {name: training_step(cell, name, cell.length) for name in names}
    losses = {name: step().item() for name, step in steps.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, f"they compute something else: {losses}"
    rounds = 3 if cell.length >= 8192 else 7
    times = measure.alternate(steps, rounds=rounds, min_time=1.0)
    alone = measure.alternate({name: attention_alone(cell, name) for name in names}, rounds=rounds, min_time=1.0)
    benchmark.pedantic(steps["pyattn"], rounds=1)
    return {
        "microseconds": {name: significant(times.median(name) * 1e6) for name in names},
        "speedup": {name: significant(times.ratio(name, "pyattn")) for name in names if name != "pyattn"},
        "attention_microseconds": {name: significant(alone.median(name) * 1e6) for name in names},
        "attention_speedup": {name: significant(alone.ratio(name, "pyattn")) for name in names if name != "pyattn"},
        "absent": missing,
        "rounds": rounds,
    }


# ---- memory ------------------------------------------------------------------------------------------------


def in_new_process(function: Callable[..., int], *arguments: Any) -> int:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_of_step(cell: Cell, name: str, length: int) -> int:
    """Bytes of a first training step.

    malloc keeps freed blocks below a limit that grows to 32 MB, so that below a context of 32768 their holes would
    count, and above not; with a limit that does not grow, what is freed is gone.
    """
    torch.set_num_threads(cell.threads)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    training_step(cell, name, 64)()  # code that is touched for the first time
    return measure.peak_extra_memory(training_step(cell, name, length)) or 0


def remember(cell: Cell, benchmark: Any) -> dict[str, Any]:
    missing = absent(cell)
    names = [name for name in NAMES if name not in missing]
    peaks = {name: in_new_process(peak_of_step, cell, name, cell.length) for name in names}
    benchmark.pedantic(lambda: None, rounds=1)
    return {"peak_extra_bytes": peaks, "absent": missing}


def find_longest(cell: Cell, benchmark: Any) -> dict[str, Any]:
    benchmark.pedantic(lambda: None, rounds=1)
    return {"longest": {name: longest(cell, name) for name in NAMES}}


def longest(cell: Cell, name: str) -> dict[str, int]:
    """The longest context, in steps of STEP, whose first training step takes at most MEMORY, to a sixteenth.

    Memory grows as a power of the length, or in a line, which two shorter ones tell, the longer at least a quarter of
    what is tried next: few long steps are taken.
    """

    def peak(length: int) -> int:
        return in_new_process(peak_of_step, cell, name, length)

    peaks = {length: peak(length) for length in (2048, 4096)}
    while True:
        (shorter, less), (longer, more) = sorted(peaks.items())[-2:]
        assert less < more, f"memory must grow with the length, or it is not what is measured: {peaks}"
        power = math.log(more / less) / math.log(longer / shorter)
        best = max(length for length, taken in peaks.items() if taken <= MEMORY)
        over = min((length for length, taken in peaks.items() if taken > MEMORY), default=None)
        if peaks[best] >= MEMORY * 15 / 16 or best == cell.length or over == best + STEP:
            return {"length": best, "bytes": peaks[best]}
        aim = 0.98 * MEMORY
        guess = longer * (aim / more) ** (1 / power)
        if power < 1:  # a part that does not grow
            guess = longer + (aim - more) * (longer - shorter) / (more - less)
        guess = min(cell.length, 4 * longer, int(guess) // STEP * STEP)
        if guess <= best or (over is not None and guess >= over):  # it has been there
            guess = best + STEP if over is None else (best + over) // 2 // STEP * STEP
        peaks[guess] = peak(guess)


# ---- generation --------------------------------------------------------------------------------------------


def filled(caches: list[Any], length: int) -> None:
    for cache in caches:
        for _ in range(length // 512):
            shape = (cache.batch, cache.num_kv_heads, 512, cache.head_dim)
            cache.append(torch.randn(shape), torch.randn(shape))


@torch.no_grad()
def generation(cell: Cell, name: str) -> Callable[[], Tensor]:
    """NEW_TOKENS tokens of each text, of which the caches hold ``length`` tokens, and as many of the source."""
    model: nn.Module = model_of(cell, name).eval()
    writer: Any = model.decoder if isinstance(model, Transformer) else model
    caches = writer.caches(cell.batch, cell.length + NEW_TOKENS)
    torch.manual_seed(1)
    filled(caches, cell.length)
    first = torch.full((cell.batch, 1), 5)
    if isinstance(model, Transformer):
        encoded = writer.read(torch.randn(cell.batch, cell.length, DIM), [cell.length] * cell.batch)

    @torch.no_grad()
    def write() -> Tensor:
        for cache in caches:
            cache.truncate([cell.length] * cell.batch)
        if isinstance(model, GPT):
            return model.generate(first, NEW_TOKENS, temperature=0, caches=caches)
        tokens = [first]
        for _ in range(NEW_TOKENS):
            tokens.append(writer(tokens[-1], encoded, caches)[:, -1].argmax(-1, keepdim=True))
        return torch.cat(tokens[1:], 1)

    return write


def generate(cell: Cell, benchmark: Any) -> dict[str, Any]:
    runs = {name: generation(cell, name) for name in NAMES}
    texts = {name: run() for name, run in runs.items()}
    assert all(torch.equal(text, texts["naive"]) for text in texts.values()), f"they write something else: {texts}"
    times = measure.alternate(runs, rounds=5, min_time=1.0)
    benchmark.pedantic(runs["pyattn"], rounds=1)
    rate = cell.batch * NEW_TOKENS
    return {
        "microseconds": {name: significant(times.median(name) * 1e6 / NEW_TOKENS) for name in runs},
        "tokens_per_second": {name: significant(rate / times.median(name)) for name in runs},
        "speedup": {name: significant(times.ratio(name, "pyattn")) for name in runs if name != "pyattn"},
        "rounds": len(times.samples["pyattn"]),
    }


OPS = {"training step": train, "generation": generate, "peak memory": remember, "longest context": find_longest}


def test_models(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    if OPS[cell.op] in (remember, find_longest) and measure.peak_extra_memory(lambda: None) is None:
        return  # the system does not tell
    cells.append(cell._asdict() | {"isa": cpu().isa()} | OPS[cell.op](cell, benchmark))
