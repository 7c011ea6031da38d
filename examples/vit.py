"""Handwritten digits by a Vision Transformer, and where it looks.

    make data                    # once
    python examples/vit.py       # --attention naive|torch|pyattn, --quick, --data PATH

Two sets: 1797 images of 8 x 8, and 5000 of 28 x 28. Images are held out by a hash of their pixels; beside the model
stand logistic regression and the nearest neighbours. `--data` takes a folder with a folder of images for each class.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyattn import checks
from pyattn.models import ViT, data, text, training

checks.require_extra("models", "matplotlib", "rich", "safetensors", "sklearn")

SIZE = {"dim": 64, "heads": 4, "layers": 4, "dropout": 0.1}
PATCH = {8: 2, 28: 7, 32: 8}  # each has 4 x 4 of them
STEPS, BATCH, LEARNING_RATE = 1500, 64, 1e-3
SIDE = 32  # of images of one's own


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.data:
        sets = {"images": data.read_images(args.data, SIDE)}
    else:
        sets = {"digits, 8 x 8": data.digits(), "digits, 28 x 28": data.mnist()}
    results = [classify(args, name, images) for name, images in sets.items()]
    training.print_results(results)
    return {"results": results}


def classify(args: argparse.Namespace, name: str, images: Sequence[data.Image]) -> dict[str, Any]:
    parts = text.split(images, 0.2, 0.05, key=lambda image: image.pixels.numpy().tobytes())
    if not all(parts):
        raise ValueError(f"{args.data} must hold enough images to hold some out, got {len(images)}")
    classes = sorted({image.text for image in images})
    train, validation, test = ((data.stacked(part), labels_of(part, classes)) for part in parts)
    print(f"{name}: {len(parts[0])} images to train on, {len(parts[2])} held out, {len(classes)} classes")

    channels, side = train[0].shape[1], train[0].shape[-1]
    about = SIZE | {"classes": len(classes), "image": (side, side), "patch": PATCH[side], "channels": channels}
    about |= {"mean": train[0].mean().item(), "std": train[0].std().item()}
    torch.manual_seed(args.seed)
    model = make(about | {"attention": args.attention})
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.steps or (60 if args.quick else STEPS)
    history = training.train(
        model,
        training.epochs(len(train[0]), BATCH, generator),
        lambda chosen: model.loss(moved(train[0][chosen], generator), train[1][chosen], smoothing=0.1),
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        evaluate=lambda: model.loss(*validation).item(),
        every=-(-steps // 8),
        title=f"{name}, {args.attention}",
    )
    path = args.out / f"vit-{side}.safetensors"
    training.save(path, model, about | {"attention": args.attention})
    model = training.load(path, make)
    predicted = predict(model, test[0])
    picture(args.out / f"vit-{side}.png", model, history, parts[2], [classes[i] for i in predicted.tolist()])
    accuracy = 100 * (predicted == test[1]).float().mean().item()
    return training.result(f"ViT, {name}", "accuracy, %", baselines(train, test), accuracy, history)


def make(about: dict[str, Any]) -> ViT:
    return ViT(**(about | {"image": tuple(about["image"])}))


def labels_of(images: Sequence[data.Image], classes: list[str]) -> Tensor:
    return torch.tensor([classes.index(image.text) for image in images])


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, scaled and shifted a little, each image in its own way, so that none is learned by heart."""
    turn, scale, x, y = (2 * torch.rand(4, len(images), generator=generator) - 1).unbind()
    angle, scale = turn * math.pi / 12, 1 + 0.1 * scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack((torch.stack((cos, -sin, 0.15 * x), 1), torch.stack((sin, cos, 0.15 * y), 1)), 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def predict(model: ViT, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(-1) for part in images.split(256)])


def baselines(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (x_test, y_test) = ((images.flatten(1).numpy(), labels.numpy()) for images, labels in (train, test))
    made = {"logistic regression": LogisticRegression(max_iter=200), "nearest neighbours": KNeighborsClassifier(3)}
    return {name: 100 * float(model.fit(x, y).score(x_test, y_test)) for name, model in made.items()}


def picture(path: Any, model: ViT, history: training.History, images: Sequence[data.Image], said: list[str]) -> None:
    """The losses, and held-out images under what their class looked at."""
    spread = range(0, len(images), max(1, len(images) // 7))  # they are in order of their classes
    images, said = [images[i] for i in spread], [said[i] for i in spread]
    looks = model.looks(data.stacked(images))
    figure, axes = training.figure(2, 4, (11, 6))
    training.draw_losses(axes[0][0], history, "cross-entropy (nats)")
    for place in axes.flat[1:]:
        place.axis("off")
    for place, image, map_, label in zip(axes.flat[1:], images, looks, said, strict=False):
        height, width = image.pixels.shape[1:]
        place.imshow(image.pixels.permute(1, 2, 0).squeeze(-1), cmap="gray")
        place.imshow(
            map_, cmap="inferno", alpha=0.55, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear"
        )
        place.set_title(f"{label}" if label == image.text else f"{label}, is {image.text}")
    figure.suptitle("Vision Transformer: what the class looks at, in its last layer", fontweight="bold")
    training.save_figure(path, figure)


if __name__ == "__main__":
    options = training.parser(__doc__.splitlines()[0], "a folder with a folder of images for each class instead")
    training.run(main, options, "vit")
