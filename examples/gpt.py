"""A small GPT on English text: rotary positions, grouped heads, generation from a KV cache.

    make data                    # once: LibreOffice's help, 5 MB
    python examples/gpt.py       # --attention naive|torch|pyattn, --quick, --data PATH

The last tenth of the text is held out. What the model pays for it, in bits per byte, stands beside what compressors and
a 5-gram model of bytes pay.
"""

import argparse
import gzip
import lzma
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyattn import checks
from pyattn.models import GPT, data, text, training

checks.require_extra("models", "matplotlib", "rich", "safetensors", "tokenizers")

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

VOCABULARY, CONTEXT, BATCH = 2048, 256, 8
SIZE = {"dim": 256, "depth": 4, "heads": 4, "kv_heads": 2, "max_length": 2 * CONTEXT}
STEPS, LEARNING_RATE = 1400, 2e-3
PROMPTS = ("To insert a table,", "The function returns", "Click the")
console = Console(highlight=False)


def main(args: argparse.Namespace) -> dict[str, Any]:
    whole = data.read_text(args.data) if args.data else data.help_text()
    known, held_out = text.split_text(whole)
    if args.quick:
        known, held_out = known[:300_000], held_out[:30_000]
    size = len(held_out.encode())
    console.print(f"{len(known.encode()) / 1e6:.2f} MB to train on, {size / 1e6:.2f} MB held out")
    tokenizer = text.train_tokenizer(known.splitlines(keepends=True), VOCABULARY)
    train, test = (torch.tensor(tokenizer.encode(part).ids) for part in (known, held_out))

    about = SIZE | {"vocabulary": tokenizer.get_vocab_size(), "attention": args.attention}
    model = make(about)
    steps = args.steps or (60 if args.quick else STEPS)
    generator = torch.Generator().manual_seed(args.seed)
    shorter = test[: 8 * CONTEXT]
    history = training.train(
        model,
        iter(lambda: text.windows(train, CONTEXT, BATCH, generator), None),
        lambda tokens: model(tokens[:, :-1], targets=tokens[:, 1:]),
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        evaluate=lambda: nats(model, shorter) / len(shorter),
        every=-(-steps // 8),
        title=f"GPT, {args.attention}",
    )
    path = args.out / "gpt.safetensors"
    training.save(path, model, about)
    model = training.load(path, make)

    bits = {"GPT": nats(model, test) / math.log(2) / size} | baselines(known.encode(), held_out.encode())
    table = Table("held-out text", "bits per byte", box=None, pad_edge=False)
    for name, value in bits.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    speed = write(model, tokenizer, args.out / "samples.txt")
    picture(args.out / "gpt.png", history)
    found = {"bits per byte": {name: round(value, 4) for name, value in bits.items()}}
    return training.summary(history) | found | {"tokens a second": round(speed, 1)}


def make(about: dict[str, Any]) -> GPT:
    return GPT(**about)


@torch.no_grad()
def nats(model: GPT, tokens: Tensor) -> float:
    """What tokens [N] cost, each predicted from at least half a context of those before it, if there are so many."""
    half = CONTEXT // 2
    total = F.cross_entropy(model(tokens[None, :half])[0, :-1], tokens[1:half], reduction="sum").item()
    # The first token of all has nothing before it: as dear as if all were alike.
    total += math.log(model.tokens.num_embeddings)
    for first in range(half, len(tokens), half):
        window = tokens[first - half : first + half]
        count = len(window) - half
        logits = model(window[None, :-1])[0, -count:]
        total += F.cross_entropy(logits, window[-count:], reduction="sum").item()
    return total


def baselines(known: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of compressors of the held-out text, and of a 5-gram model of the text before it."""
    packed = {"gzip -9": gzip.compress(held_out, 9), "xz -9": lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(x) / len(held_out) for name, x in packed.items()} | {"5-gram": ngram(known, held_out)}


def ngram(known: bytes, held_out: bytes, order: int = 5) -> float:
    """Bits per byte of byte n-grams by Witten & Bell's smoothing (1991): of each order a share for the one below."""
    counts: list[dict[bytes, dict[int, int]]] = [defaultdict(lambda: defaultdict(int)) for _ in range(order)]
    for n, table in enumerate(counts):
        for i in range(n, len(known)):
            table[known[i - n : i]][known[i]] += 1
    totals = [{context: sum(after.values()) for context, after in table.items()} for table in counts]
    bits = 0.0
    for i, byte in enumerate(held_out):
        probability = 1 / 256
        for n in range(min(order, i + 1)):
            context = held_out[i - n : i]
            after = counts[n].get(context)
            if after is None:
                break
            kinds, total = len(after), totals[n][context]
            probability = (after.get(byte, 0) + kinds * probability) / (total + kinds)
        bits -= math.log2(probability)
    return bits / len(held_out)


def write(model: GPT, tokenizer: Any, path: Path, new_tokens: int = 100) -> float:
    """Goes on with each prompt, and returns the tokens a second."""
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    lengths = [len(row) for row in ids]
    prompts = torch.tensor([row + [text.PAD] * (max(lengths) - len(row)) for row in ids])
    start = time.perf_counter()
    written = model.generate(prompts, new_tokens, lengths=lengths, temperature=0.8, top_p=0.95)
    seconds = time.perf_counter() - start
    texts = [prompt + tokenizer.decode(row) for prompt, row in zip(PROMPTS, written.tolist(), strict=True)]
    path.write_text("\n\n".join(texts) + "\n")
    console.print("\n\n".join(texts))
    return written.numel() / seconds


def picture(path: Path, history: training.History) -> None:
    figure, axes = training.figure(1, 1, (7, 4.5))
    training.draw_losses(axes, history, "cross-entropy of a token (nats)", "A small GPT")
    training.save_figure(path, figure)


if __name__ == "__main__":
    training.run(main, training.parser(__doc__.splitlines()[0], "a text file, or a folder of them, instead"), "gpt")
