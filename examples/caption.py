"""Captions of emoji: a Vision Transformer looks, a decoder writes what it sees.

    make data                        # once: Google's emoji, 10 MB
    python examples/caption.py       # --attention naive|torch|pyattn, --quick, --data PATH

Held out are combinations: emoji in a tone of skin, each of which has been seen in other tones, as has each tone on
others. `--data` takes a folder of images with captions.tsv: file<TAB>caption.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyattn import checks
from pyattn.models import Captioner, data, text, training

checks.require_extra("models", "emoji", "fontTools", "matplotlib", "PIL", "rich", "sacrebleu", "safetensors", "sklearn")

import sacrebleu  # noqa: E402

SIDE, VOCABULARY, LONGEST = 32, 1000, 40
SIZE = {
    "image": (SIDE, SIDE),
    "patch": 8,
    "dim": 192,
    "heads": 4,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "hidden": 512,
    "dropout": 0.0,
}
STEPS, BATCH, LEARNING_RATE = 1200, 64, 1.5e-3


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.data:
        train, validation, test = text.split(data.read_captions(args.data, SIDE), key=pixels_of)
    else:
        train, validation, test = combinations(data.emoji(SIDE))
    if not (train and validation and test):
        raise ValueError(f"{args.data} must hold enough images to hold some out")
    if args.quick:
        train, validation, test = (text.spread(part, n) for part, n in ((train, 800), (validation, 50), (test, 50)))
    print(f"{len(train)} images to train on, {len(test)} held out")

    tokenizer = text.train_tokenizer((image.text for image in train), VOCABULARY)
    pixels, captions = data.stacked(train), ids(tokenizer, train)
    about = SIZE | {"vocabulary": tokenizer.get_vocab_size(), "attention": args.attention}
    about |= {"mean": pixels.mean().item(), "std": pixels.std().item()}
    torch.manual_seed(args.seed)
    model = make(about)
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.steps or (40 if args.quick else STEPS)
    held_out = data.stacked(validation), text.padded(ids(tokenizer, validation))
    history = training.train(
        model,
        training.epochs(len(train), BATCH, generator),
        lambda chosen: model.loss(
            moved(pixels[chosen], generator), text.padded([captions[i] for i in chosen.tolist()])
        ),
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        evaluate=lambda: model.loss(*held_out).item(),
        every=-(-steps // 8),
        title=f"Captioner, {args.attention}",
    )
    path = args.out / "caption.safetensors"
    training.save(path, model, about)
    model = training.load(path, make)

    written = describe(model, tokenizer, test)
    picture(args.out / "caption.png", history, test, written)
    attention_picture(args.out / "caption-attention.png", model, tokenizer, test[0], written[0])
    neighbours = nearest(train, test)
    exact, chrf = ([score(texts, test)[i] for texts in (neighbours, written)] for i in (0, 1))
    results = [
        training.result(f"Captioner, {name}", metric, {"nearest neighbour": values[0]}, values[1], history)
        for name, metric, values in (("exact", "right captions, %", exact), ("chrF", "chrF", chrf))
    ]
    training.print_results(results)
    return {"train": len(train), "test": len(test), "results": results}


def make(about: dict[str, Any]) -> Captioner:
    return Captioner(**(about | {"image": tuple(about["image"])}))


def combinations(images: Sequence[data.Image]) -> tuple[list[data.Image], list[data.Image], list[data.Image]]:
    """Emoji without a tone of skin to train on, and of those with one all but a tenth and a twentieth."""
    toned = [image for image in images if "skin tone" in image.text]
    known, validation, test = text.split(toned, key=lambda image: image.text)
    return [image for image in images if "skin tone" not in image.text] + known, validation, test


def pixels_of(image: data.Image) -> bytes:
    return image.pixels.numpy().tobytes()


def ids(tokenizer: Any, images: Sequence[data.Image]) -> list[list[int]]:
    return [[text.START, *tokenizer.encode(image.text).ids, text.END] for image in images]


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to a pixel, each image in its own way; what comes in is as the border is."""
    wider = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    rows, columns = torch.randint(3, (2, len(images)), generator=generator).tolist()
    side = images.shape[-1]
    return torch.stack([x[:, r : r + side, c : c + side] for x, r, c in zip(wider, rows, columns, strict=True)])


def describe(model: Captioner, tokenizer: Any, images: Sequence[data.Image]) -> list[str]:
    texts = []
    for part in data.stacked(images).split(64):
        texts += [
            tokenizer.decode(tokens) for tokens in model.write(part, LONGEST, beams=4, start=text.START, end=text.END)
        ]
    return texts


def nearest(train: Sequence[data.Image], test: Sequence[data.Image]) -> list[str]:
    """The caption of the image whose pixels are nearest."""
    distances = torch.cdist(data.stacked(test).flatten(1), data.stacked(train).flatten(1))
    return [train[i].text for i in distances.argmin(1).tolist()]


def score(texts: Sequence[str], images: Sequence[data.Image]) -> tuple[float, float]:
    """The share that is exactly right, and chrF."""
    references = [image.text for image in images]
    exact = sum(is_ == says for is_, says in zip(references, texts, strict=True)) / len(texts)
    return 100 * exact, sacrebleu.corpus_chrf(texts, [references]).score


def picture(path: Path, history: training.History, images: Sequence[data.Image], texts: Sequence[str]) -> None:
    """The losses, and held-out images over what is written of them."""
    figure, axes = training.figure(3, 4, (13, 9))
    training.draw_losses(axes[0][0], history, "cross-entropy of a token (nats)")
    for place in axes.flat[1:]:
        place.axis("off")
    for place, image, written in zip(axes.flat[1:], images, texts, strict=False):
        place.imshow(image.pixels.permute(1, 2, 0))
        wrong = "" if written == image.text else f"\n(is: {image.text})"
        place.set_title(written + wrong, fontsize=7, wrap=True)
    figure.suptitle("Captions of combinations that have not been seen", fontweight="bold")
    training.save_figure(path, figure)


def attention_picture(path: Path, model: Captioner, tokenizer: Any, image: data.Image, written: str) -> None:
    """Where each token of one caption looked."""
    tokens = [text.START, *tokenizer.encode(written).ids][:12]
    looks = model.looks(image.pixels[None], torch.tensor([tokens]))[0]
    words = [tokenizer.decode([i]) for i in tokens[1:]] + ["(end)"]
    figure, axes = training.figure(2, 6, (13, 5))
    for place in axes.flat:
        place.axis("off")
    for place, map_, word in zip(axes.flat, looks, words, strict=False):
        place.imshow(image.pixels.permute(1, 2, 0))
        extent = (-0.5, SIDE - 0.5, SIDE - 0.5, -0.5)
        place.imshow(map_, cmap="inferno", alpha=0.55, extent=extent, interpolation="bilinear")
        place.set_title(word)
    figure.suptitle("Where each token looks, in the decoder's last layer", fontweight="bold")
    training.save_figure(path, figure)


if __name__ == "__main__":
    training.run(main, training.parser(__doc__.splitlines()[0], "a folder of images with captions.tsv"), "caption")
