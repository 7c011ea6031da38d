"""What kind of thing a gloss defines: pre-training without labels, then fine-tuning with few.

    make data                         # once: WordNet, 6 MB
    python examples/classify.py       # --attention naive|torch|pyattn, --quick, --data PATH

A GPT learns from the definitions of nouns, without what they are, and goes on as a classifier of 14 kinds with 100
labels each. The same model starts from scratch beside it, and both again with all labels; TF-IDF with a linear
classifier is the baseline. Glosses are held out by a hash, in pre-training, too. `--data` takes a file of
text<TAB>label lines.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyattn import checks
from pyattn.models import GPT, GPTClassifier, data, text, training

checks.require_extra("models", "matplotlib", "rich", "safetensors", "sklearn", "tokenizers")

VOCABULARY, LONGEST = 2000, 48  # tokens of a text; what is beyond is cut off
SIZE = {"dim": 128, "depth": 3, "heads": 4, "max_length": LONGEST}
KINDS, FEW = 14, 100  # the most frequent kinds, and labels of each
STEPS = {"pre-training": 1000, "few": 200, "all": 1000}
LEARNING_RATE = {"pre-training": 2e-3, "few": 5e-4, "all": 1e-3}
BATCH = 64
Gloss = tuple[str, str]


def main(args: argparse.Namespace) -> dict[str, Any]:
    glosses = data.read_labels(args.data) if args.data else data.glosses()
    unlabelled, _, _ = text.split(glosses)  # of all kinds
    counts = Counter(label for _, label in glosses).most_common(KINDS)
    kinds = sorted(label for label, _ in counts)
    train, validation, test = text.split([gloss for gloss in glosses if gloss[1] in kinds])
    if not (train and validation and test):
        raise ValueError(f"{args.data} must hold enough texts to hold some out, got {len(glosses)}")
    validation = text.spread(validation, 1000)
    if args.quick:
        sizes = ((unlabelled, 5000), (train, 3000), (validation, 200), (test, 500))
        unlabelled, train, validation, test = (text.spread(part, size) for part, size in sizes)
    few = [gloss for kind in kinds for gloss in text.spread([g for g in train if g[1] == kind], FEW)]
    print(f"{len(unlabelled)} texts without labels, {len(train)} or {len(few)} with, {len(test)} held out")
    tokenizer = text.train_tokenizer((words for words, _ in unlabelled), VOCABULARY)
    about = SIZE | {"vocabulary": tokenizer.get_vocab_size(), "attention": args.attention}
    labelled = {"all": Labelled(tokenizer, train, kinds), "few": Labelled(tokenizer, few, kinds)}
    held_out = Labelled(tokenizer, validation, kinds), Labelled(tokenizer, test, kinds)

    histories = {}
    pretrained, pretraining = pretrain(args, about, [row for row, _ in tokens_of(tokenizer, unlabelled)])
    training.save(args.out / "pretrained.safetensors", pretrained, about)
    results = []
    for size, labels in labelled.items():
        base = baseline(labels.texts, labels.labels, held_out[1].texts, held_out[1].labels)
        for start in ("scratch", "pre-trained"):
            torch.manual_seed(args.seed)
            gpt = training.load(args.out / "pretrained.safetensors", make) if start == "pre-trained" else make(about)
            model = GPTClassifier(gpt, len(kinds))
            name = f"GPT, {start}, {size} labels"
            histories[name] = fit(args, model, labels, held_out[0], size, name)
            accuracy = model_accuracy(model, held_out[1])
            results.append(training.result(name, "accuracy, %", {"TF-IDF, linear": base}, accuracy, histories[name]))
    picture(args.out / "classify.png", pretraining, histories)
    training.print_results(results)
    return {"results": results, "pre-training": training.summary(pretraining)}


def make(about: dict[str, Any]) -> GPT:
    return GPT(**about)


def tokens_of(tokenizer: Any, glosses: Sequence[Gloss]) -> list[tuple[list[int], str]]:
    """Of each text START, its tokens and END, and its label."""
    encoded = tokenizer.encode_batch([words for words, _ in glosses])
    rows = [[text.START, *x.ids[: LONGEST - 2], text.END] for x in encoded]
    return [(row, label) for row, (_, label) in zip(rows, glosses, strict=True)]


class Labelled:
    """Texts as tokens, with the numbers of their kinds."""

    def __init__(self, tokenizer: Any, glosses: Sequence[Gloss], kinds: Sequence[str]) -> None:
        self.texts = [words for words, _ in glosses]
        self.rows = [row for row, _ in tokens_of(tokenizer, glosses)]
        self.labels = torch.tensor([kinds.index(label) for _, label in glosses])

    def batch(self, chosen: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """What ``GPTClassifier.loss`` is given."""
        rows = [self.rows[i] for i in chosen.tolist()]
        return text.padded(rows), [len(row) for row in rows], self.labels[chosen]

    def by_length(self) -> Iterator[tuple[Tensor, list[int], Tensor]]:
        """All, once."""
        return (self.batch(chosen) for chosen in torch.tensor([len(row) for row in self.rows]).argsort().split(256))


def pretrain(
    args: argparse.Namespace, about: dict[str, Any], rows: Sequence[list[int]]
) -> tuple[GPT, training.History]:
    """Predicts each token of texts that stand one after the other, in windows of a context."""
    torch.manual_seed(args.seed)
    model, generator = make(about), torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    stream = torch.tensor([token for i in order for token in rows[i]])
    steps = args.steps or (40 if args.quick else STEPS["pre-training"])
    history = training.train(
        model,
        iter(lambda: text.windows(stream, LONGEST - 1, BATCH, generator), None),
        lambda tokens: model(tokens[:, :-1], targets=tokens[:, 1:]),
        steps=steps,
        learning_rate=LEARNING_RATE["pre-training"],
        weight_decay=0.1,
        title=f"pre-training, {args.attention}",
    )
    return model, history


def fit(
    args: argparse.Namespace, model: GPTClassifier, labels: Labelled, validation: Labelled, size: str, name: str
) -> training.History:
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.steps or (20 if args.quick else STEPS[size])
    lengths = [len(row) for row in labels.rows]
    return training.train(
        model,
        (labels.batch(chosen) for chosen in training.epochs(len(labels.rows), BATCH, generator, lengths)),
        lambda batch: model.loss(*batch),
        steps=steps,
        learning_rate=LEARNING_RATE[size],
        weight_decay=0.1,
        warm_up=steps // 10,
        evaluate=lambda: 100 - model_accuracy(model, validation),
        every=-(-steps // 4),
        title=name,
    )


@torch.no_grad()
def model_accuracy(model: GPTClassifier, labels: Labelled) -> float:
    right = [(model(tokens, lengths).argmax(-1) == expected) for tokens, lengths, expected in labels.by_length()]
    return 100 * torch.cat(right).float().mean().item()


def baseline(texts: Sequence[str], labels: Tensor, test: Sequence[str], expected: Tensor) -> float:
    """Accuracy of a linear classifier of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    return 100 * float(model.fit(texts, labels.numpy()).score(test, expected.numpy()))


def picture(path: Path, pretraining: training.History, histories: dict[str, training.History]) -> None:
    """The losses of pre-training, and how many of the labels held out are wrong in the course of each fine-tuning."""
    figure, (left, right) = training.figure(1, 2, (12, 5))
    training.draw_losses(left, pretraining, "cross-entropy of a token (nats)", "pre-training")
    for name, history in histories.items():
        done = [step / len(history.losses) for step, _ in history.evaluations]
        right.plot(done, [error for _, error in history.evaluations], marker="o", label=name)
    right.set(xlabel="of the training", ylabel="error on labels held out, %", title="fine-tuning")
    right.legend(frameon=False)
    figure.suptitle("Pre-training, then fine-tuning", fontweight="bold")
    training.save_figure(path, figure)


if __name__ == "__main__":
    training.run(main, training.parser(__doc__.splitlines()[0], "a file of text<TAB>label lines instead"), "classify")
