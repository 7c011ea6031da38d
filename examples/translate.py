"""English to German: the Transformer, and the recurrent seq2seq with and without attention that it answered.

    make data                          # once: LibreOffice's help in both languages, 5 MB
    python examples/translate.py       # --model seq2seq, --attention naive|torch|pyattn, --quick, --data PATH

Sentences are held out by a hash of their source. What is written of them is scored by sacrebleu beside two baselines:
the source itself, and the translation of the nearest source in the training set.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pyattn import checks
from pyattn.models import Seq2Seq, Transformer, data, text, training

checks.require_extra("models", "matplotlib", "rich", "sacrebleu", "safetensors", "sklearn", "tokenizers")

import sacrebleu  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

LONGEST, SHORT = 15, 8  # words of a sentence: for the Transformer, and for what must remember it in one state
VOCABULARY, TOKENS_PER_BATCH, AT_ONCE = 3000, 1536, 64
TRANSFORMER = {"dim": 192, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "hidden": 512, "dropout": 0.1}
SEQ2SEQ = {"dim": 192, "dropout": 0.1}
STEPS = {"transformer": 1300, "seq2seq": 1500}
LEARNING_RATE = {"transformer": 2e-3, "seq2seq": 3e-3}
console = Console(highlight=False)


class Corpus(NamedTuple):
    """Sentences, and a tokenizer that has seen those to train on."""

    train: list[data.Pair]
    validation: list[data.Pair]
    test: list[data.Pair]
    tokenizer: Any

    def ids(self, pairs: Sequence[data.Pair]) -> list[tuple[list[int], list[int]]]:
        sides = (self.tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
        return [(source.ids, target.ids) for source, target in zip(*sides, strict=True)]

    def shorter(self, words: int) -> "Corpus":
        parts = ([p for p in part if max(len(s.split()) for s in p) <= words] for part in self[:3])
        return Corpus(*parts, self.tokenizer)


def main(args: argparse.Namespace) -> dict[str, Any]:
    pairs = data.read_pairs(args.data) if args.data else data.help_pairs(longest=LONGEST)
    parts = text.split(pairs)
    if not all(parts):
        raise ValueError(f"{args.data} must hold enough sentences to hold some out, got {len(pairs)}")
    if args.quick:
        parts = tuple(part[:limit] for part, limit in zip(parts, (4000, 100, 200), strict=True))
    sentences = (side for pair in parts[0] for side in pair)
    corpus = Corpus(*parts, text.train_tokenizer(sentences, VOCABULARY))
    if args.model == "seq2seq":
        corpus = corpus.shorter(SHORT)
        if not all(corpus[:3]):
            raise ValueError(f"{args.data} must hold enough sentences of at most {SHORT} words to hold some out")
    console.print(f"{len(corpus.train)} sentences to train on, {len(corpus.test)} held out")
    metrics: dict[str, Any] = {
        "model": args.model,
        "train": len(corpus.train),
        "test": len(corpus.test),
        "baselines": baselines(corpus),
    }
    if args.model == "transformer":
        metrics["transformer"] = transformer(args, corpus)
    else:
        metrics["seq2seq"] = seq2seq(args, corpus)
    print_metrics(metrics)
    return metrics


# ---- models ------------------------------------------------------------------------------------------------


def make_transformer(about: dict[str, Any]) -> Transformer:
    return Transformer(**about)


def transformer(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    about = TRANSFORMER | {"vocabulary": corpus.tokenizer.get_vocab_size(), "attention": args.attention}
    model = make_transformer(about)
    steps = args.steps or (100 if args.quick else STEPS["transformer"])
    history = fit(model, corpus, args.seed, steps, "transformer", f"Transformer, {args.attention}", smoothing=0.1)
    path = args.out / "transformer.safetensors"
    training.save(path, model, about)
    model = training.load(path, make_transformer)
    written = {beams: write(model, corpus, corpus.test, beams=beams) for beams in (1, 4)}
    scores = {f"beams {beams}": score(texts, corpus.test) for beams, texts in written.items()}
    save_samples(args.out / "samples.txt", corpus.test, written[4])
    picture(args.out / "transformer.png", history, model, corpus, "Transformer, last layer's cross attention")
    return training.summary(history) | scores


def seq2seq(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """The same recurrent model without attention, with Bahdanau's and with Luong's."""
    made: dict[str, Any] = {}
    steps = args.steps or (60 if args.quick else STEPS["seq2seq"])
    for alignment in ("none", "additive", "multiplicative"):
        torch.manual_seed(args.seed)
        size = corpus.tokenizer.get_vocab_size()
        model = Seq2Seq(size, **SEQ2SEQ, alignment=alignment, attention=args.attention)
        history = fit(model, corpus, args.seed, steps, "seq2seq", f"seq2seq, {alignment}")
        made[alignment] = training.summary(history) | {"greedy": score(write(model, corpus, corpus.test), corpus.test)}
        if alignment != "none":
            picture(args.out / f"seq2seq-{alignment}.png", history, model, corpus, f"seq2seq, {alignment} attention")
            made[alignment]["near the diagonal"] = diagonal(model, corpus)
    return made


def fit(
    model: nn.Module, corpus: Corpus, seed: int, steps: int, kind: str, title: str, **options: Any
) -> training.History:
    pairs, held_out = corpus.ids(corpus.train), list(text.batches(corpus.ids(corpus.validation), 4096))
    generator = torch.Generator().manual_seed(seed)

    def epochs():
        while True:
            yield from text.batches(pairs, TOKENS_PER_BATCH, generator)

    def validation_loss() -> float:
        losses = [(model.loss(b.source, b.source_lengths, b.target).item(), sum(b.target_lengths)) for b in held_out]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    return training.train(
        model,
        epochs(),
        lambda b: model.loss(b.source, b.source_lengths, b.target, **options),
        steps=steps,
        learning_rate=LEARNING_RATE[kind],
        evaluate=validation_loss,
        every=-(-steps // 8),
        title=title,
    )


def write(model: nn.Module, corpus: Corpus, pairs: Sequence[data.Pair], **options: Any) -> list[str]:
    """The model's translations; sentences of like lengths at once."""
    ids = [source for source, _ in corpus.ids(pairs)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for first in range(0, len(order), AT_ONCE):
        chosen = order[first : first + AT_ONCE]
        lengths = [len(ids[i]) for i in chosen]
        source = torch.tensor([ids[i] + [text.PAD] * (max(lengths) - len(ids[i])) for i in chosen])
        written = model.translate(source, lengths, 2 * max(lengths) + 10, start=text.START, end=text.END, **options)
        for i, tokens in zip(chosen, written, strict=True):
            texts[i] = corpus.tokenizer.decode(tokens)
    return texts


# ---- what it is worth --------------------------------------------------------------------------------------


def score(texts: Sequence[str], pairs: Sequence[data.Pair]) -> dict[str, float]:
    references = [[target for _, target in pairs]]
    bleu, chrf = (metric(texts, references).score for metric in (sacrebleu.corpus_bleu, sacrebleu.corpus_chrf))
    return {"BLEU": round(bleu, 1), "chrF": round(chrf, 1)}


def baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """The source as it is, and the translation of the training sentence that is nearest by TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4))
    known = vectorizer.fit_transform([source for source, _ in corpus.train])
    nearest = (vectorizer.transform([source for source, _ in corpus.test]) @ known.T).argmax(1)
    texts = {
        "copy of the source": [source for source, _ in corpus.test],
        "nearest neighbour": [corpus.train[int(i)][1] for i in nearest.ravel().tolist()[0]],
    }
    return {name: score(written, corpus.test) for name, written in texts.items()}


def diagonal(model: nn.Module, corpus: Corpus) -> float:
    """The share of attention that falls within a quarter of the sentence from the diagonal; about 0.44 if even."""
    shares = []
    for batch in text.batches(corpus.ids(corpus.test), 4096, torch.Generator().manual_seed(0)):
        weights = model.alignments(batch.source, batch.source_lengths, batch.target[:, :-1])
        for row, S, T in zip(weights, batch.source_lengths, batch.target_lengths, strict=True):
            places = [torch.linspace(0, 1, n) for n in (T, S)]
            near = (places[0][:, None] - places[1]).abs() <= 0.25
            shares.append(row[:T, :S][near].sum().item() / T)
    return round(sum(shares) / len(shares), 3)


def print_metrics(metrics: dict[str, Any]) -> None:
    table = Table("model", "validation loss", "BLEU", "chrF", box=None, pad_edge=False)
    rows: list[tuple[str, dict[str, Any], dict[str, float]]] = [(n, {}, x) for n, x in metrics["baselines"].items()]
    if "transformer" in metrics:
        found = metrics["transformer"]
        rows += [(f"Transformer, {beams}", found, found[beams]) for beams in ("beams 1", "beams 4")]
    for alignment, found in metrics.get("seq2seq", {}).items():
        rows.append((f"seq2seq, attention {alignment}", found, found["greedy"]))
    for name, found, scores in rows:
        loss = f"{found['validation']:.3f}" if found else ""
        table.add_row(name, loss, *(f"{scores[metric]:.1f}" for metric in ("BLEU", "chrF")))
    console.print(table)


def save_samples(path: Path, pairs: Sequence[data.Pair], texts: Sequence[str], count: int = 30) -> None:
    lines = [f"{s}\n  is      {t}\n  written {w}\n" for (s, t), w in zip(pairs[:count], texts, strict=False)]
    path.write_text("\n".join(lines))
    console.print("\n".join(lines[:5]))


def picture(path: Path, history: training.History, model: nn.Module, corpus: Corpus, title: str) -> None:
    """The losses, and what each word of one held-out sentence's translation looks at."""
    pair = max(corpus.test[:50], key=lambda p: len(p[0].split()))
    (source, target), tokenizer = corpus.ids([pair])[0], corpus.tokenizer
    weights = model.alignments(torch.tensor([source]), [len(source)], torch.tensor([[text.START, *target]]))[0]
    figure, (left, right) = training.figure(1, 2, (12, 5))
    training.draw_losses(left, history, "cross-entropy of a token (nats)")
    right.imshow(weights, cmap="Greys", aspect="auto", vmin=0)
    words = [[tokenizer.decode([i]) for i in ids] for ids in (source, target)]
    right.set_xticks(range(len(source)), words[0], rotation=60, ha="right")
    right.set_yticks(range(len(target) + 1), [*words[1], "(end)"])
    right.set(xlabel="source", ylabel="is written", title="what each token looks at")
    figure.suptitle(title, fontweight="bold")
    training.save_figure(path, figure)


if __name__ == "__main__":
    options = training.parser(__doc__.splitlines()[0], "a file of source<TAB>target lines to train on instead")
    options.add_argument("--model", choices=("transformer", "seq2seq"), default="transformer")
    training.run(main, options, "translate")
