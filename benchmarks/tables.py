"""README's tables: what of a suite's cells stands in which row and column."""

import itertools
from typing import NamedTuple

from plots import COLORS, ON_GPUS, OURS, Cell, select

from pyattn import compare

PEERS = [name for name in COLORS if name not in OURS]
VARIANTS = [(dtype, causal) for dtype in ("float32", "bfloat16") for causal in (False, True)]

Row = dict[str, str]  # a column's text by its heading


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
    peaks = {(cell["model"], cell["length"]): cell["peak_extra_bytes"] for cell in select(cells, op="peak memory")}

    def row(cell: Cell) -> Row:
        alone = cell.get("attention_speedup", {})
        memory = peaks.get((cell["model"], cell["length"]), {}) if cell["op"] == "training step" else {}
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


class Score(NamedTuple):
    metric: str
    baselines: dict[str, float]
    value: float
    digits: int = 1
    model: str = ""  # what the timed steps call it


def scores(cell: Cell) -> dict[str, Score]:
    """Of a run of an example, by model."""
    if "results" in cell:
        return {
            found["name"]: Score(*(found[key] for key in ("metric", "baselines", "value", "digits", "name")))
            for found in cell["results"]
        }
    if cell["system"] == "gpt":
        bits = dict(cell["bits per byte"])
        ours = bits.pop("GPT")
        return {"GPT": Score("bits per byte, lower is better", bits, ours, 3)}
    baselines = {name: found["BLEU"] for name, found in cell["baselines"].items()}
    if cell["system"] == "translate":
        return {
            "Transformer, 4 beams": Score("BLEU", baselines, cell["transformer"]["beams 4"]["BLEU"], 1, "transformer")
        }
    return {
        f"GRU, {'no' if name == 'none' else name} attention": Score("BLEU", baselines, made["greedy"]["BLEU"], 1, name)
        for name, made in cell["seq2seq"].items()
    }


def systems_rows(cells: list[Cell]) -> list[Row]:
    """A row a model: what it reached by seed, and how much faster its training steps are."""
    rows = []
    for system in dict.fromkeys(cell["system"] for cell in cells):
        runs = [cell for cell in cells if cell["system"] == system and cell["part"] == "systems"]
        steps = {c["model"]: c["speedup"] for c in cells if c["system"] == system and c["part"] == "steps"}
        if not runs:
            continue  # only timed
        minutes = [run["seconds"] / 60 for run in runs if run["attention"] == "pyattn"]
        for name, (metric, baselines, _, digits, model) in scores(runs[0]).items():
            values: dict[str, list[str]] = {"pyattn": [], "naive": []}
            for run in runs:
                values[run["attention"]].append(f"{scores(run)[name].value:.{digits}f}")
            ratios = steps.get(model, {})
            rows.append(
                {"": name, "metric": metric}
                | {"baselines": ", ".join(f"{base} {x:.{digits}f}" for base, x in baselines.items())}
                | {"pyattn, by seed": ", ".join(values["pyattn"]), "naive": ", ".join(values["naive"])}
                | {f"step over {peer}": f"{x:.2f}x" if (x := ratios.get(peer)) else "" for peer in ("torch", "naive")}
                | {"minutes, all of it": f"{min(minutes):.1f} to {max(minutes):.1f}"}
                | {"command": f"`{runs[0]['command'].partition(' --attention')[0]}`"}
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
        | {"queries": str(cell["num_queries"]), "keys": str(cell["length"])}
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
