"""README's tables and the plots beside them, from the results of the suites.

    make report
    python benchmarks/report.py --device amd-epyc-zen-4-2c

A suite's table and its plot go between the lines ``<!-- report:begin NAME -->`` and, with ``end``, its like.
"""

import argparse
import itertools
import json
import operator
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tables
from plots import Cell, Plot, draw

from pyattn import compare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD_DIM = 64  # the results hold other head dims too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help=f"a folder of {RESULTS.relative_to(ROOT)}; default: of each suite the newest")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="for the plots")
    parser.add_argument("--threads", type=int, help="default: the most that were measured")
    args = parser.parse_args()
    try:
        args.docs.mkdir(parents=True, exist_ok=True)
        for name, (environment, cells) in load(args.results, args.device).items():
            suite = SUITES[name]
            if not suite.on_gpu and not suite.parts:
                threads = args.threads or max(cell["threads"] for cell in cells)
                cells = [c for c in cells if c["threads"] == threads and c.get("head_dim", HEAD_DIM) == HEAD_DIM]
            rows = suite.rows(cells)
            if not rows:
                raise ValueError(f"{name} has nothing for its table with {threads} threads and head dim {HEAD_DIM}")
            where = conditions(environment, cells, suite)
            commands = dict.fromkeys(cell.get("machine", environment)["command"] for cell in cells)
            made = f"{where}, {environment['date'][:10]}. {suite.note} Made by `{'`, `'.join(commands)}`."
            lines = [f"**{suite.title}**", tables.markdown(rows), made]
            if suite.plot:
                path = args.docs / f"{name}.png"
                draw(suite.plot, cells, where, path)
                lines.append(f"![{suite.plot.title}]({os.path.relpath(path, args.readme.parent)})")
            insert(args.readme, name, "\n\n".join(lines))
            print(f"{name}: {environment['device']}, measured {environment['date']}")
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


def load(results: Path, device: str | None) -> dict[str, tuple[dict[str, Any], list[Cell]]]:
    """Environment and cells of every suite, where it was measured last.

    Of one whose parts are too long for one machine, the environment of the newest, and of each part the newest cells.
    """
    found = [json.loads(path.read_text()) | {"suite": path.stem} for path in results.glob(f"{device or '*'}/*.json")]
    found = [result for result in found if result["suite"] in SUITES]
    if not found:
        raise ValueError(f"nothing for {device or 'any device'} in {results}: run `make bench` first")
    found.sort(key=lambda result: result["environment"]["date"])
    newest: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for name, environment, cells in (operator.itemgetter("suite", "environment", "cells")(result) for result in found):
        if fields := SUITES[name].parts:
            part_of = operator.itemgetter(*fields)
            made = set(map(part_of, cells))
            others = [cell for cell in newest.get(name, (None, ()))[1] if part_of(cell) not in made]
            cells = others + [cell | {"machine": environment} for cell in cells]
        newest[name] = environment, cells
    return newest


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of ``name``."""
    begin, end = f"<!-- report:begin {name} -->", f"<!-- report:end {name} -->"
    old = path.read_text()
    if not re.search(f"{re.escape(begin)}.*{re.escape(end)}", old, re.DOTALL):
        raise ValueError(f"{path} needs the lines {begin} and {end}, in this order")
    head, rest = old.split(begin, 1)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def conditions(environment: dict[str, Any], cells: list[Cell], suite: "Suite") -> str:
    one = cells[0]
    if suite.parts:
        found: dict[str, list[str]] = {}
        for cell in cells:
            machine = compare.describe(cell["machine"] | {"threads": cell["threads"]})
            found.setdefault(machine, []).append(cell[suite.parts[0]])
        if len(found) > 1:
            return "; ".join(f"{machine} ({', '.join(dict.fromkeys(names))})" for machine, names in found.items())
        return next(iter(found))
    if "threads" not in one:
        return compare.describe(environment, "cuda") + f", triton {environment['triton']}"
    machine = compare.describe(environment | {"threads": one["threads"]})
    return (
        f"batch x heads {one['batch_heads']}, head dim {one['head_dim']}; {machine}"
        if "batch_heads" in one
        else machine
    )


# ---- the suites --------------------------------------------------------------------------------------------


class Suite(NamedTuple):
    title: str
    rows: Callable[[list[Cell]], list[tables.Row]]
    note: str
    plot: Plot | None = None
    on_gpu: bool = False
    parts: tuple[str, ...] = ()  # fields that tell parts apart, which may be of different machines


def by_variant(**fields: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{dtype}, {'causal' if causal else 'full'}": {"dtype": dtype, "causal": causal} | fields
        for dtype, causal in tables.VARIANTS
    }


PEAK = ("measured peak", lambda cell: cell["peak_gflops"])
HALF = "Causal counts half the operations."
FORWARD = Plot("Attention forward: higher is faster", by_variant(), "GFLOP/s", lambda cell: cell["gflops"], PEAK, HALF)
SUITES = {
    "attention_forward": Suite(
        "Forward",
        tables.throughput_rows,
        f"{HALF} The peak is that of the CPU's multiply-add instruction, measured.",
        FORWARD,
    ),
    "attention_backward": Suite(
        "Backward, alone and together with its forward",
        tables.backward_rows,
        f"{HALF} The last columns: both passes.",
        FORWARD._replace(title="Attention backward alone: higher is faster", panels=by_variant(op="backward")),
    ),
    "attention_decode": Suite(
        "Decode: few queries, many keys",
        tables.decode_rows,
        "GB/s count each key and value once. The percentage is of the rate at which torch reads DRAM with as many "
        "threads, taken in turns, where keys and values exceed four times the last level of cache.",
        Plot(
            "Attention of one query: higher is faster",
            {
                f"{dtype}, {tables.plural(kv_heads, 'key head')}": {
                    "dtype": dtype,
                    "kv_heads": kv_heads,
                    "num_queries": 1,
                }
                for dtype in ("float32", "bfloat16")
                for kv_heads in (8, 1)
            },
            "GB/s of keys and values",
            lambda cell: cell["gb_per_second"],
            ("DRAM read, measured", lambda cell: cell.get("dram_gb_per_second")),
        ),
    ),
    "kv_cache": Suite(
        "A step with a KV cache: append, then attend",
        tables.cache_rows,
        "One sample. SDPA, buffer: new tokens are copied into a buffer, and SDPA takes a view of what is filled; SDPA, "
        "torch.cat: all that there is is copied. Pages have 16 tokens.",
    ),
    "attention_short": Suite(
        "Short sequences", tables.short_rows, "The time of one call of the forward from Python, full attention."
    ),
    "attention_features": Suite(
        "What features cost",
        tables.feature_rows,
        "The time with a feature over that without it, less 1, of causal attention of 2048 tokens and of the same "
        "work; packed sequences against a dense batch of them.",
    ),
    "projection": Suite(
        "Projections",
        tables.projection_rows,
        "8 heads, E = 8 x head dim. qkv, rotary: q, k and v from one weight with bias, q and k turned; both: with its "
        "backward; output: what follows attention, with bias. eager: F.linear and rotary on views; linear: F.linear "
        "alone.",
    ),
    "multihead": Suite(
        "pyattn.nn.MultiheadAttention",
        tables.multihead_rows,
        "Self-attention of one sample by 8 heads with need_weights=False. A training step is forward and backward, "
        "with gradients of input and parameters; the forward is in evaluation, where torch takes its C++ fast path.",
    ),
    "models": Suite(
        "Whole models",
        tables.models_rows,
        "float32. A GPT of 4 blocks, 4 heads on 2, and a Transformer of 2 and 2 layers, 4 heads, source and target as "
        "long as the context; width 256, vocabulary 256, batch 1 in training. A training step is forward, backward and "
        "update; attention: the same calls of attention alone, forward and backward. Generation is greedy, over caches "
        "that hold the context. MB: the peak of a first training step, in a process of its own.",
        Plot(
            "Whole models: lower is faster",
            {
                f"{model}, {op}": {"model": model, "op": op, "batch": 1}
                for model, op in itertools.product(("GPT", "Transformer"), ("training step", "generation"))
            },
            "ms a step or token",
            lambda cell: {name: us / 1e3 for name, us in cell["microseconds"].items()},
            log=True,
        ),
        parts=("op", "model"),
    ),
    "systems": Suite(
        "Trained on real data",
        tables.systems_rows,
        "Scores are of what was held out; minutes are of the whole example, with its pictures and baselines. A step: "
        "forward, backward and update, in runs that alternate, the median of their ratios.",
        parts=("system", "part"),
    ),
    "losses": Suite(
        "Losses beside those of naive attention: the largest difference so far",
        tables.losses_rows,
        "The same examples, `--quick --steps 200`, one seed, float32. Training enlarges differences of rounding: naive "
        "attention on one thread, which adds up in another order but in the GPT, is as far from itself.",
        parts=("system",),
    ),
    "embeddings": Suite(
        "Embeddings by all-MiniLM-L6-v2",
        tables.embeddings_rows,
        "float32, by way of transformers, whose attention is what differs: 12 heads of 32, 6 layers. Texts are padded "
        "to the longest, none is below half of it; cosines between the embeddings are above 0.99999.",
    ),
    "attention_memory": Suite(
        "Memory",
        tables.memory_rows,
        "The peak of a fresh process above inputs and results, float32, causal.",
        Plot(
            "Memory above inputs and results: lower is better",
            {op: {"op": op} for op in ("forward", "forward and backward")},
            "MB",
            # the system counts pages, and zero has no place on a logarithmic axis
            lambda cell: {name: max(peak, 4096) / 1e6 for name, peak in cell["peak_extra_bytes"].items()},
            log=True,
        ),
    ),
}
ON_GPU = Plot(
    "",
    {
        f"D {head_dim}, {'causal' if causal else 'full'}": {"head_dim": head_dim, "causal": causal}
        for head_dim, causal in itertools.product((64, 128, 256), (False, True))
    },
    "TFLOP/s",
    lambda cell: cell["tflops"],
    ("matmul, measured", lambda cell: cell["matmul_tflops"]),
    HALF,
)
GPU_NOTE = (
    "bfloat16, 16384 tokens, heads x head dim 2048. The matmul is one of 8192 x 8192 in the same run. Bold: what "
    "dispatch chooses, and what is compared."
)
SUITES |= {
    f"gpu_{stage}": Suite(
        f"{stage.capitalize()} on a GPU",
        tables.gpu_rows,
        f"{HALF} {GPU_NOTE}",
        ON_GPU._replace(title=f"Attention {stage} on a GPU: higher is faster"),
        True,
    )
    for stage in ("forward", "backward")
}
SUITES["gpu_triton_projection"] = Suite(
    "Projections on a GPU",
    tables.gpu_projection_rows,
    "bfloat16; q, k and v together. fused: product and the rest in one Triton kernel; split: torch's product (cuBLAS), "
    "the rest in a kernel; eager: F.linear, RMSNorm and rotary in torch; linear: F.linear alone. The last column: the "
    "faster of the first two.",
    on_gpu=True,
)
SUITES["gpu_decode"] = Suite(
    "Decode on a GPU: few queries",
    tables.gpu_decode_rows,
    "bfloat16. GB/s count each key and value once; the copy is a large one in the same run, read and written. Bold: "
    "what dispatch chooses, and what is compared.",
    on_gpu=True,
)


if __name__ == "__main__":
    main()
