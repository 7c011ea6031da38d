"""README's tables and the plots beside them, from the results of the suites.

    make report
    python benchmarks/report.py --device amd-epyc-zen-4-2c

A suite's table and its plot go between the lines ``<!-- report:begin NAME -->`` and, with ``end``, its like.
"""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from plots import COLORS, ON_GPUS, OURS, Cell, Plot, draw, select

from pyattn import compare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD_DIM = 64  # the results hold other head dims too
PEERS = [name for name in COLORS if name not in OURS]
VARIANTS = [(dtype, causal) for dtype in ("float32", "bfloat16") for causal in (False, True)]

Row = dict[str, str]  # a column's text by its heading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help=f"a folder of {RESULTS.relative_to(ROOT)}; default: the newest results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="for the plots")
    parser.add_argument("--threads", type=int, help="default: the most that were measured")
    args = parser.parse_args()
    try:
        args.docs.mkdir(parents=True, exist_ok=True)
        for name, (environment, cells) in load(args.results, args.device).items():
            suite = SUITES[name]
            if not suite.on_gpu:
                threads = args.threads or max(cell["threads"] for cell in cells)
                cells = [c for c in cells if c["threads"] == threads and c.get("head_dim", HEAD_DIM) == HEAD_DIM]
            rows = suite.rows(cells)
            if not rows:
                raise ValueError(f"{name} has nothing for its table with {threads} threads and head dim {HEAD_DIM}")
            lines = [f"**{suite.title}**", markdown(rows), caption(environment, cells, suite.note)]
            if suite.plot:
                path = args.docs / f"{name}.png"
                draw(suite.plot, cells, conditions(environment, cells), path)
                lines.append(f"![{suite.plot.title}]({os.path.relpath(path, args.readme.parent)})")
            insert(args.readme, name, "\n\n".join(lines))
            print(f"{name}: {environment['device']}, measured {environment['date']}")
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


def load(results: Path, device: str | None) -> dict[str, tuple[dict[str, Any], list[Cell]]]:
    """Environment and cells of every suite, of the device that was measured last; GPUs have suites of their own."""
    found = [json.loads(path.read_text()) | {"suite": path.stem} for path in results.glob(f"{device or '*'}/*.json")]
    found = [result for result in found if result["suite"] in SUITES]
    if not found:
        raise ValueError(f"nothing for {device or 'any device'} in {results}: run `make bench` first")
    found.sort(key=lambda result: result["environment"]["date"])
    newest = {SUITES[result["suite"]].on_gpu: result["environment"]["device"] for result in found}
    return {
        result["suite"]: (result["environment"], result["cells"])
        for result in found
        if result["environment"]["device"] == newest[SUITES[result["suite"]].on_gpu]
    }


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of ``name``."""
    begin, end = f"<!-- report:begin {name} -->", f"<!-- report:end {name} -->"
    old = path.read_text()
    if not re.search(f"{re.escape(begin)}.*{re.escape(end)}", old, re.DOTALL):
        raise ValueError(f"{path} needs the lines {begin} and {end}, in this order")
    head, rest = old.split(begin, 1)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def conditions(environment: dict[str, Any], cells: list[Cell]) -> str:
    one = cells[0]
    if "threads" not in one:
        return compare.describe(environment, "cuda") + f", triton {environment['triton']}"
    machine = compare.describe(environment | {"threads": one["threads"]})
    return (
        f"batch x heads {one['batch_heads']}, head dim {one['head_dim']}; {machine}"
        if "batch_heads" in one
        else machine
    )


def caption(environment: dict[str, Any], cells: list[Cell], note: str) -> str:
    return f"{conditions(environment, cells)}, {environment['date'][:10]}. {note} Made by `{environment['command']}`."


# ---- the tables --------------------------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    """A table of the columns in which any row says something."""
    head = [column for column in rows[0] if any(row[column] for row in rows)]
    lines = [head, ["---" if column == "" else "---:" for column in head]]
    lines += [[row[column] for column in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speedups(cell: Cell | None, peers: list[str] = PEERS, suffix: str = "") -> Row:
    ratios = cell["speedup"] if cell else {}
    return {f"over {peer}{suffix}": f"{ratios[peer]:.2f}x" if peer in ratios else "" for peer in peers}


def throughput_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": f"{dtype}, causal" if causal else dtype, "length": str(cell["length"])}
        | {"pyattn GFLOP/s": f"{cell['gflops']['pyattn']:.0f}", "of peak": f"{cell['percent_of_peak']:.0f}%"}
        | speedups(cell)
        for dtype, causal in VARIANTS
        for cell in select(cells, dtype=dtype, causal=causal)
        if cell["length"] >= 128
    ]


def backward_rows(cells: list[Cell]) -> list[Row]:
    """The backward alone and, in the last columns, both passes of the same problem."""
    both = {(c["dtype"], c["causal"], c["length"]): c for c in cells if c["op"] == "forward and backward"}
    alone = select(cells, op="backward")
    problems = [
        (c["dtype"], c["causal"], c["length"]) for v in VARIANTS for c in select(alone, dtype=v[0], causal=v[1])
    ]
    rows = zip(problems, throughput_rows(alone), strict=True)
    return [row | speedups(both.get(problem), ["torch SDPA", "naive"], ", both") for problem, row in rows]


def decode_rows(cells: list[Cell]) -> list[Row]:
    """One length that caches hold, and the one that they do not."""
    kinds = itertools.product(("float32", "bfloat16"), (8, 2, 1), (1, 8))
    return [
        {"": f"{dtype}, {plural(kv_heads, 'key head')}, {plural(queries, 'query', 'queries')}"}
        | {"keys": str(cell["length"]), "pyattn GB/s": f"{cell['gb_per_second']['pyattn']:.1f}"}
        | {"of DRAM": f"{cell['percent_of_dram']:.0f}%" if "percent_of_dram" in cell else ""}
        | speedups(cell)
        for dtype, kv_heads, queries in kinds
        for cell in select(cells, dtype=dtype, kv_heads=kv_heads, num_queries=queries)
        if cell["length"] == 8192 or "percent_of_dram" in cell
    ]


def cache_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": f"{dtype}, {plural(kv_heads, 'key head')}", "context": str(cell["length"])}
        | {"new tokens": str(cell["tokens"]), "pyattn us": f"{cell['microseconds']['pyattn']:.0f}"}
        | {"append alone us": f"{cell['append_microseconds']['pyattn']:.0f}"}
        | speedups(cell, ["pyattn, pages", "SDPA, buffer", "SDPA, torch.cat"])
        for dtype, kv_heads in itertools.product(("float32", "bfloat16"), (8, 2))
        for cell in select(cells, dtype=dtype, kv_heads=kv_heads)
    ]


def short_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": dtype, "length": str(cell["length"]), "pyattn us": f"{cell['microseconds']['pyattn']:.0f}"}
        | speedups(cell)
        for dtype in ("float32", "bfloat16")
        for cell in select(cells, dtype=dtype, causal=False)
    ]


def memory_rows(cells: list[Cell]) -> list[Row]:
    def megabytes(cell: Cell, name: str) -> str:
        peak = cell["peak_extra_bytes"]
        return f"{peak[name] / 1e6:.1f} MB" if name in peak else "does not fit"

    return [
        {"": cell["op"], "length": str(cell["length"])} | {name: megabytes(cell, name) for name in compare.COLORS}
        for op in ("forward", "forward and backward")
        for cell in select(cells, op=op)
    ]


def feature_rows(cells: list[Cell]) -> list[Row]:
    """A feature's time over that without it, less 1, in a column for each dtype and pass."""

    def cost(cell: Cell, feature: str) -> str:
        ratio = cell["relative_time"].get(feature)
        return "" if ratio is None else f"{100 * (ratio - 1):+.0f}%"

    features = dict.fromkeys(feature for cell in cells for feature in cell["relative_time"])
    return [
        {"": feature} | {f"{cell['dtype']}, {cell['op']}": cost(cell, feature) for cell in cells}
        for feature in features
    ]


def projection_rows(cells: list[Cell]) -> list[Row]:
    names = {"eager": "over eager", "linear": "over linear"}
    return [
        {"": f"{cell['dtype']}, {cell['op']}", "tokens": str(cell["length"])}
        | {"pyattn us": f"{cell['microseconds']['pyattn']:.0f}", "GFLOP/s": f"{cell['gflops']['pyattn']:.0f}"}
        | {"of peak": f"{cell['percent_of_peak']:.0f}%"}
        | {head: f"{cell['speedup'][name]:.2f}x" if name in cell["speedup"] else "" for name, head in names.items()}
        for dtype, op in itertools.product(("float32", "bfloat16"), ("qkv, rotary", "qkv, rotary, both", "output"))
        for cell in select(cells, dtype=dtype, op=op)
    ]


def multihead_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": f"{cell['op']}, {cell['dtype']}", "length": str(cell["length"])}
        | {"pyattn ms": f"{cell['microseconds']['pyattn'] / 1e3:.2f}"}
        | {"over torch.nn": f"{cell['speedup']['torch module']:.2f}x"}
        for op, dtype in itertools.product(("training step", "forward"), ("float32", "bfloat16"))
        for cell in select(cells, op=op, dtype=dtype)
    ]


def models_rows(cells: list[Cell]) -> list[Row]:
    peers = ("torch SDPA", "naive")

    def row(cell: Cell) -> Row:
        alone, memory = cell.get("attention_speedup", {}), cell.get("peak_extra_bytes", {})
        rates = cell.get("tokens_per_second", {})
        return (
            {"": f"{cell['model']}, {cell['op']}", "context": str(cell["length"]), "batch": str(cell["batch"])}
            | {"pyattn ms": f"{cell['microseconds']['pyattn'] / 1e3:.0f}"}
            | {"tokens/s": f"{rates['pyattn']:.0f}" if rates else ""}
            | speedups(cell, list(peers))
            | {f"attention over {name}": f"{alone[name]:.2f}x" if name in alone else "" for name in peers}
            | {f"{name} MB": f"{memory[name] / 1e6:.0f}" if name in memory else "" for name in ("pyattn", *peers)}
        )

    rows = [
        row(cell)
        for op, model in itertools.product(("training step", "generation"), ("GPT", "Transformer"))
        for cell in select(cells, op=op, model=model)
    ]
    for cell in cells:
        if cell["op"] == "longest context":
            lengths = ", ".join(f"{name} {found['length']}" for name, found in cell["longest"].items())
            rows.append(dict.fromkeys(rows[0], "") | {"": f"{cell['model']}, longest in 4 GB", "context": lengths})
    return rows


def embeddings_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": f"{cell['batch']} text{'s' if cell['batch'] > 1 else ''}", "longest, tokens": str(cell["length"])}
        | {"pyattn ms": f"{cell['microseconds']['pyattn'] / 1e3:.1f}"}
        | speedups(cell, ["torch SDPA", "eager"])
        for cell in cells
    ]


def scores(cell: Cell) -> dict[str, tuple[str, dict[str, float], float]]:
    """Of a run of an example, by model: the metric, its value by baseline, and the model's."""
    if cell["system"] == "gpt":
        bits = dict(cell["bits per byte"])
        return {"GPT": ("bits per byte, lower is better", bits, bits.pop("GPT"))}
    baselines = {name: found["BLEU"] for name, found in cell["baselines"].items()}
    if cell["system"] == "translate":
        return {"Transformer, 4 beams": ("BLEU", baselines, cell["transformer"]["beams 4"]["BLEU"])}
    found = {f"GRU, {name} attention": made["greedy"]["BLEU"] for name, made in cell["seq2seq"].items()}
    return {name.replace("none", "no"): ("BLEU", baselines, bleu) for name, bleu in found.items()}


def systems_rows(cells: list[Cell]) -> list[Row]:
    rows = []
    for system in dict.fromkeys(cell["system"] for cell in cells):
        runs = [cell for cell in cells if cell["system"] == system]
        ours, (naive,) = ([run for run in runs if run["attention"] == name] for name in ("pyattn", "naive"))
        minutes = [run["seconds"] / 60 for run in ours]
        for model, (metric, baselines, _) in scores(naive).items():
            digits = 1 if metric == "BLEU" else 3
            rows.append(
                {"": model, "metric": metric}
                | {"baselines": ", ".join(f"{name} {value:.{digits}f}" for name, value in baselines.items())}
                | {"pyattn, by seed": ", ".join(f"{scores(run)[model][2]:.{digits}f}" for run in ours)}
                | {"naive": f"{scores(naive)[model][2]:.{digits}f}"}
                | {"minutes, all of it": f"{min(minutes):.1f} to {max(minutes):.1f}"}
            )
    return rows


def losses_rows(cells: list[Cell]) -> list[Row]:
    titles = {"pyattn": "pyattn", "naive --threads 1": "naive, one thread"}
    return [
        {"": f"{cell['system']}: {titles[cell['attention']]}"}
        | {f"to step {n}": f"{value:.0e}" for n, value in cell["largest difference"].items()}
        for cell in cells
    ]


def gpu_projection_rows(cells: list[Cell]) -> list[Row]:
    def kind(cell: Cell) -> str:
        heads = f"{cell['heads']} heads" + (f" on {cell['kv_heads']}" if cell["kv_heads"] != cell["heads"] else "")
        what = {"forward": "forward", "both": "forward and backward", "rotary": "apply_rotary"}[cell["op"]]
        extra = "" if cell["op"] == "rotary" or not cell["epilogue"] else ", norm and rotary"
        return f"{what}{extra}, E {cell['width']}, {heads}{', interleaved' if cell['interleaved'] else ''}"

    def times(cell: Cell) -> Row:
        names = {
            "fused": "fused us",
            "split": "split us",
            "eager": "eager us",
            "linear": "linear us",
            "copy": "copy us",
        }
        took = cell["microseconds"]
        return {head: f"{took[name]:.0f}" if name in took else "" for name, head in names.items()}

    return [
        {"": kind(cell), "tokens": str(cell["tokens"])}
        | times(cell)
        | {"over eager": f"{max(cell['speedup'].values()):.2f}x"}
        for cell in cells
        if cell["width"] >= 2048
    ]


def gpu_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": f"D {cell['head_dim']}, {'causal' if cell['causal'] else 'full'}", "length": str(cell["length"])}
        | {f"{name} TFLOP/s": rate(cell, "tflops", name) for name in ON_GPUS}
        | {"of a matmul": f"{cell['percent_of_matmul'][cell['chosen']]:.0f}%"}
        | speedups(cell)
        for head_dim, causal in itertools.product((64, 128, 256), (False, True))
        for cell in select(cells, head_dim=head_dim, causal=causal)
        if cell["length"] in (512, 2048, 16384)
    ]


def gpu_decode_rows(cells: list[Cell]) -> list[Row]:
    return [
        {"": f"D {cell['head_dim']}, {cell['heads']} heads on {cell['kv_heads']}", "batch": str(cell["batch"])}
        | {"keys": str(cell["length"])}
        | {f"{name} GB/s": rate(cell, "gb_per_second", name) for name in ON_GPUS}
        | {"of a copy": f"{cell['percent_of_copy'][cell['chosen']]:.0f}%"}
        | speedups(cell)
        for cell in cells
        if cell["heads"] <= 32
    ]


def rate(cell: Cell, unit: str, name: str) -> str:
    """The one that dispatch chooses stands out."""
    if name not in cell[unit]:
        return ""
    return f"**{cell[unit][name]:.0f}**" if name == cell["chosen"] else f"{cell[unit][name]:.0f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


# ---- the suites --------------------------------------------------------------------------------------------


class Suite(NamedTuple):
    title: str
    rows: Callable[[list[Cell]], list[Row]]
    note: str
    plot: Plot | None = None
    on_gpu: bool = False


def by_variant(**fields: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{dtype}, {'causal' if causal else 'full'}": {"dtype": dtype, "causal": causal} | fields
        for dtype, causal in VARIANTS
    }


PEAK = ("measured peak", lambda cell: cell["peak_gflops"])
HALF = "Causal counts half the operations."
FORWARD = Plot("Attention forward: higher is faster", by_variant(), "GFLOP/s", lambda cell: cell["gflops"], PEAK, HALF)
SUITES = {
    "attention_forward": Suite(
        "Forward",
        throughput_rows,
        f"{HALF} The peak is that of the CPU's multiply-add instruction, measured.",
        FORWARD,
    ),
    "attention_backward": Suite(
        "Backward, alone and together with its forward",
        backward_rows,
        f"{HALF} The last columns: both passes.",
        FORWARD._replace(title="Attention backward alone: higher is faster", panels=by_variant(op="backward")),
    ),
    "attention_decode": Suite(
        "Decode: few queries, many keys",
        decode_rows,
        "GB/s count each key and value once. The percentage is of the rate at which torch reads DRAM with as many "
        "threads, taken in turns, where keys and values exceed four times the last level of cache.",
        Plot(
            "Attention of one query: higher is faster",
            {
                f"{dtype}, {plural(kv_heads, 'key head')}": {"dtype": dtype, "kv_heads": kv_heads, "num_queries": 1}
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
        cache_rows,
        "One sample. SDPA, buffer: new tokens are copied into a buffer, and SDPA takes a view of what is filled; SDPA, "
        "torch.cat: all that there is is copied. Pages have 16 tokens.",
    ),
    "attention_short": Suite(
        "Short sequences", short_rows, "The time of one call of the forward from Python, full attention."
    ),
    "attention_features": Suite(
        "What features cost",
        feature_rows,
        "The time with a feature over that without it, less 1, of causal attention of 2048 tokens and of the same "
        "work; packed sequences against a dense batch of them.",
    ),
    "projection": Suite(
        "Projections",
        projection_rows,
        "8 heads, E = 8 x head dim. qkv, rotary: q, k and v from one weight with bias, q and k turned; both: with its "
        "backward; output: what follows attention, with bias. eager: F.linear and rotary on views; linear: F.linear "
        "alone.",
    ),
    "multihead": Suite(
        "pyattn.nn.MultiheadAttention",
        multihead_rows,
        "Self-attention of one sample by 8 heads with need_weights=False. A training step is forward and backward, "
        "with gradients of input and parameters; the forward is in evaluation, where torch takes its C++ fast path.",
    ),
    "models": Suite(
        "Whole models",
        models_rows,
        "float32. A GPT of 4 blocks, 4 heads on 2, and a Transformer of 2 and 2 layers, 4 heads, source and target as "
        "long as the context; width 256, vocabulary 256, batch 1 in training. A training step is forward, backward and "
        "update; attention: the same calls of attention alone, forward and backward; MB: the peak of a step beyond the "
        "model. Generation is greedy, over caches that hold the context.",
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
    ),
    "systems": Suite(
        "Trained on real data",
        systems_rows,
        "Data, splits and settings are those of the examples: `python examples/translate.py`, the same with `--model "
        "seq2seq`, `python examples/gpt.py`. Scores are of held-out text; minutes are of the whole example.",
    ),
    "losses": Suite(
        "Losses beside those of naive attention: the largest difference so far",
        losses_rows,
        "The same examples, `--quick --steps 200`, one seed, float32. Training enlarges differences of rounding: naive "
        "attention on another number of threads, which adds up in another order, is as far from itself.",
    ),
    "embeddings": Suite(
        "Embeddings by all-MiniLM-L6-v2",
        embeddings_rows,
        "float32, by way of transformers, whose attention is what differs: 12 heads of 32, 6 layers. Texts are padded "
        "to the longest, none is below half of it; cosines between the embeddings are above 0.99999.",
    ),
    "attention_memory": Suite(
        "Memory",
        memory_rows,
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
        gpu_rows,
        f"{HALF} {GPU_NOTE}",
        ON_GPU._replace(title=f"Attention {stage} on a GPU: higher is faster"),
        True,
    )
    for stage in ("forward", "backward")
}
SUITES["gpu_triton_projection"] = Suite(
    "Projections on a GPU",
    gpu_projection_rows,
    "bfloat16; q, k and v together. fused: product and the rest in one Triton kernel; split: torch's product (cuBLAS), "
    "the rest in a kernel; eager: F.linear, RMSNorm and rotary in torch; linear: F.linear alone. The last column: the "
    "faster of the first two.",
    on_gpu=True,
)
SUITES["gpu_decode"] = Suite(
    "Decode on a GPU: one query",
    gpu_decode_rows,
    "bfloat16. GB/s count each key and value once; the copy is a large one in the same run, read and written. Bold: "
    "what dispatch chooses, and what is compared.",
    on_gpu=True,
)


if __name__ == "__main__":
    main()
