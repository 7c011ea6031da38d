"""The training loop, checkpoints and command line that the examples share, and the examples themselves."""

from __future__ import annotations

import itertools
import json
import math
import random
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from torch import nn

from pyattn.models import GPT, data, training
from pyattn.models.data.waves import write_wave

ROOT = Path(__file__).parents[1]


def fit(steps=60, seed=0, scale=1.0, **options):
    """A linear model of three numbers, and its history."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 1)
    truth = torch.tensor([[1.0, -2.0, 3.0]])

    def batches():
        while True:
            x = torch.randn(16, 3)
            yield x, scale * x @ truth.T + 4

    options = {"learning_rate": 0.3, "warm_up": 5, "weight_decay": 0.0} | options
    history = training.train(model, batches(), lambda b: (model(b[0]) - b[1]).square().mean(), steps=steps, **options)
    return model, history


def test_it_learns_and_says_what_it_did():
    seen = []

    def evaluate():
        seen.append((torch.is_grad_enabled(), len(seen)))
        return float(len(seen))

    model, history = fit(steps=100, evaluate=evaluate, every=40, clip=100.0)
    assert len(history.losses) == 100 and history.losses[-1] < 0.1 < 10 < history.losses[0]
    assert [step for step, _ in history.evaluations] == [40, 80, 100]
    assert seen == [(False, 0), (False, 1), (False, 2)]
    assert history.seconds > 0 and not model.training


def test_the_best_model_is_kept():
    """By its evaluations, of which the third is the lowest."""
    for keep_best in (True, False):
        seen, scores = [], iter([3.0, 2.0, 1.0, 1.0, 5.0])
        model = nn.Linear(3, 1)

        def evaluate(model=model, seen=seen, scores=scores):
            seen.append(model.weight.detach().clone())
            return next(scores)

        batches = itertools.repeat(torch.ones(4, 3))
        history = training.train(
            model,
            batches,
            lambda x, model=model: model(x).square().mean(),
            steps=5,
            learning_rate=0.1,
            evaluate=evaluate,
            every=1,
            keep_best=keep_best,
        )
        assert history.kept == ((3, 1.0) if keep_best else (5, 5.0)) and not model.training
        assert torch.equal(model.weight, seen[2 if keep_best else 4]) and not torch.equal(seen[2], seen[3])


def test_it_trains_in_training_mode_and_evaluates_in_the_other():
    model, modes = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5)), []

    def loss_of(x):
        modes.append(model.training)
        return model(x).square().mean()

    def evaluate():
        modes.append(model.training)
        return 0.0

    batches = itertools.repeat(torch.ones(4, 2))
    training.train(model, batches, loss_of, steps=2, learning_rate=0.1, evaluate=evaluate, every=1)
    assert modes == [True, False, True, False]


def test_the_same_seed_gives_the_same_losses():
    assert fit(seed=1)[1].losses == fit(seed=1)[1].losses != fit(seed=2)[1].losses


def test_weights_decay_and_biases_do_not():
    """With nothing else to do: the gradients are 0."""
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    training.train(
        model,
        itertools.repeat(None),
        lambda _: 0 * sum(p.sum() for p in model.parameters()),
        steps=10,
        learning_rate=0.1,
        weight_decay=0.5,
        warm_up=1,
    )
    rates = [0.1 * training.schedule(i, 10, 1) for i in range(10)]
    expected = math.prod(1 - 0.5 * rate for rate in rates)
    torch.testing.assert_close(model.weight, torch.full((2, 3), expected))
    torch.testing.assert_close(model.bias, torch.ones(2))


def test_gradients_are_clipped():
    """All together: the bias has a gradient, too."""
    norms = []
    model = nn.Linear(3, 1)
    model.weight.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm().item()))
    clipped = []

    def loss_of(_):
        clipped.extend(p.grad.norm().item() for p in (model.weight,) if p.grad is not None)
        return 1e4 * model(torch.ones(1, 3)).sum()

    training.train(model, itertools.repeat(None), loss_of, steps=2, learning_rate=1e-9, clip=0.5)
    assert norms[0] > 1e4 and clipped == [pytest.approx(0.5 * norms[0] / math.hypot(norms[0], 1e4), rel=1e-3)]


def test_a_loss_that_is_not_finite_stops_it():
    with pytest.raises(FloatingPointError, match="the loss of step 1 is inf: try a lower learning rate"):
        fit(scale=1e30)


@pytest.mark.parametrize(("steps", "warm_up"), [(100, 10), (10, 10), (5, 1), (1, 1)])
def test_the_schedule(steps, warm_up):
    rates = [training.schedule(i, steps, warm_up) for i in range(steps)]
    top = rates.index(max(rates))
    assert top == warm_up - 1 and rates[top] == 1
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0 and (steps == warm_up or rates[-1] == pytest.approx(0.05))


def test_epochs_have_each_example_once():
    batches = training.epochs(10, 4, torch.Generator().manual_seed(0))
    first, second = (torch.cat([next(batches) for _ in range(3)]) for _ in range(2))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist() != list(range(10))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        next(training.epochs(0, 4))


def test_batches_of_similar_lengths():
    """Each example once an epoch, in batches that differ by less than those drawn from all, and between epochs."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randperm(1000, generator=generator).tolist()
    batches = training.epochs(1000, 10, generator, lengths)
    first, second = ([next(batches).tolist() for _ in range(100)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(1000))
        spans = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch]
        assert max(spans) < 500 and sum(spans) / 100 < 100  # drawn from all: 800
        means = [sum(lengths[i] for i in batch) for batch in epoch]
        assert means[:16] != sorted(means[:16])  # of one pool
    assert not {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in second}
    with pytest.raises(ValueError, match="lengths must have count=3 numbers, got 2"):
        next(training.epochs(3, 4, lengths=[1, 2]))


def test_what_is_written_of_a_training(capsys, tmp_path):
    history = training.History([2.0, 1.0000004], [(1, 3.0), (2, 1.23456)], 7.0612, (2, 1.23456))
    found = training.result("model", "accuracy, %", {"guess": 10.0001}, 97.26, history)
    assert found == {
        "name": "model",
        "metric": "accuracy, %",
        "digits": 1,
        "baselines": {"guess": 10.0},
        "value": 97.3,
        "steps": 2,
        "training seconds": 7.061,
        "validation": 1.2346,
        "losses": [2.0, 1.0],
    }
    training.print_results([found])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["guess", "accuracy,", "%", "10.0"] in lines and ["model", "accuracy,", "%", "97.3"] in lines
    figure, axes = training.figure(1, 1, (3, 2))
    training.draw_losses(axes, history, "nats")
    assert [line.get_ydata().tolist() for line in axes.lines] == [history.losses, [3.0, 1.23456]]
    training.save_figure(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_model(tmp_path):
    about = {"vocabulary": 9, "dim": 16, "depth": 1, "heads": 2, "max_length": 12, "attention": "pyattn"}
    model = GPT(**about).train()
    path = tmp_path / "new" / "gpt.safetensors"
    training.save(path, model, about)
    known = []

    def make(about):
        known.append(about)
        return GPT(**about)

    loaded = training.load(path, make)
    assert known == [about] and not loaded.training
    tokens = torch.randint(9, (2, 12))
    assert torch.equal(loaded(tokens), model.eval()(tokens))
    assert list(loaded.state_dict()) == list(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        training.load(path, lambda about: GPT(**(about | {"dim": 8})))


# ---- the command line --------------------------------------------------------------------------------------


def test_a_run_writes_its_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--seed", "3", "--attention", "naive", "--out", str(tmp_path / "a")])
    drawn = []

    def main(args):
        drawn.append(torch.rand(()).item())
        assert args.attention == "naive" and args.out == tmp_path / "a"
        return {"BLEU": 12.5}

    training.run(main, training.parser("what it does", "what data"), "translate")
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics.pop("seconds") >= 0
    assert metrics == {"system": "translate", "attention": "naive", "seed": 3, "quick": False, "BLEU": 12.5}
    torch.manual_seed(3)
    assert drawn == [torch.rand(()).item()]


def test_missing_data_is_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path)])

    def main(args):
        data.help_pairs(tmp_path / "nowhere")

    with pytest.raises(SystemExit) as status:
        training.run(main, training.parser("", ""), "translate")
    assert status.value.code == 2 and "make data" in capsys.readouterr().err


# ---- the examples ------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    """Runs an example as Python does, but in this process: what they import takes seconds."""

    def run(name, *arguments):
        path = str(ROOT / "examples" / f"{name}.py")
        monkeypatch.setattr("sys.argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sentences of few words, in two languages of which one has them from the end."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["red", "green", "blue", "large", "small", "round", "old", "new"]
    sentences = [[a, b, c, "thing"] for a, b, c in itertools.product(words, repeat=3)]
    lines = [" ".join(s) for s in sentences]
    pairs = [f"{line}\t{' '.join(s[::-1])}" for line, s in zip(lines, sentences, strict=True)]
    (folder / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_translate_on_data_of_ones_own(example, texts, tmp_path):
    data_and_size = ("--data", texts / "pairs.tsv", "--quick", "--steps", 4, "--out", tmp_path)
    for model, pictures in (
        ("transformer", {"transformer.png"}),
        ("seq2seq", {"transformer.png", "seq2seq-additive.png", "seq2seq-multiplicative.png"}),
    ):
        example("translate", "--model", model, *data_and_size)
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics["train"] + metrics["test"] < 512 and metrics["baselines"]["copy of the source"]["BLEU"] < 50
        made = metrics["seq2seq"] if model == "seq2seq" else {"transformer": metrics["transformer"]}
        assert set(made) == ({"none", "additive", "multiplicative"} if model == "seq2seq" else {"transformer"})
        for found in made.values():
            assert found["steps"] == len(found["losses"]) == 4 and found["losses"][0] > found["losses"][-1] > 1
        assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert (tmp_path / "transformer.safetensors").stat().st_size > 1e5 and (tmp_path / "samples.txt").exists()


def test_gpt_on_data_of_ones_own(example, texts, tmp_path):
    example("gpt", "--data", texts / "text.txt", "--quick", "--steps", 4, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["losses"][0] > metrics["losses"][-1] and metrics["tokens a second"] > 0
    bits = metrics["bits per byte"]
    assert bits["5-gram"] < bits["gzip -9"] < 3 and 0.1 < bits["GPT"] < 8
    assert (tmp_path / "gpt.png").exists() and "To insert a table," in (tmp_path / "samples.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, recordings, series and labels, a few of each."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    colours = ["red", "green", "blue", "gray"]
    captions, transcripts = [], []
    for i in range(120):
        colour = colours[i % 4]
        image = Pillow.new("RGB", (32, 32), colour)
        image.putpixel((i % 32, i // 32), (255, 255, 255))
        path = folder / "images" / colour / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        captions.append(f"{colour}/{i}.png\tall {colour} number {i}")
        words = [draw.randrange(3) for _ in range(4)]
        tone = torch.cat([torch.sin(torch.arange(1200) * (w + 1) / 5) for w in words])
        write_wave(folder / f"{i}.wav", tone, 8000)
        transcripts.append(f"{i}.wav\t{' '.join('abc'[w] for w in words)}\tspeaker {i}")
    (folder / "images" / "captions.tsv").write_text("\n".join(captions))
    (folder / "transcripts.tsv").write_text("\n".join(transcripts))
    rows = [f"{20 + math.sin(i / 2)},{i % 7}" for i in range(400)]
    (folder / "series.csv").write_text("\n".join(["wave,days", *rows]))
    labels = [f"a {c} thing of {w}{i}\t{c}" for c in colours for w in ("wood", "stone", "glass") for i in range(40)]
    (folder / "labels.tsv").write_text("\n".join(labels))
    return folder


@pytest.mark.parametrize(
    ("name", "source", "names", "files"),
    [
        ("vit", "images", ["ViT, images"], ["vit-32.png", "vit-32.safetensors"]),
        (
            "caption",
            "images",
            ["Captioner, exact", "Captioner, chrF"],
            ["caption.png", "caption-attention.png", "caption.safetensors"],
        ),
        ("speech", ".", ["Speech Transformer"], ["speech.png", "speech.safetensors", "samples.txt"]),
        (
            "forecast",
            "series.csv",
            ["Forecaster, wave, 12 ahead", "Forecaster, days, 12 ahead"],
            ["forecast-wave.png", "forecast-days.safetensors"],
        ),
        (
            "classify",
            "labels.tsv",
            [f"GPT, {start}, {n} labels" for n in ("all", "few") for start in ("scratch", "pre-trained")],
            ["classify.png", "pretrained.safetensors"],
        ),
    ],
)
def test_examples_on_data_of_ones_own(example, folder, tmp_path, name, source, names, files):
    season = ("--season", 12) if name == "forecast" else ()
    example(name, "--data", folder / source, "--quick", "--steps", 4, "--out", tmp_path, *season)
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert [found["name"] for found in results] == names
    for found in results:
        assert found["steps"] == len(found["losses"]) == 4 and found["losses"][0] > found["losses"][-1]
        assert found["baselines"] and math.isfinite(found["value"])
    for file in files:
        assert (tmp_path / file).stat().st_size > 100
        if file.endswith(".png"):
            assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["gpt", "translate", "vit", "speech", "caption", "forecast", "classify"])
def test_an_example_names_the_set_that_is_missing(example, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("PYATTN_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        example(name, "--out", tmp_path)
    assert "make data" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not all((data.folder() / name).exists() for name in data.SETS), reason="not all sets have been fetched: make data"
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("translate",),
        ("translate", "--model", "seq2seq"),
        *((name,) for name in ("gpt", "vit", "speech", "caption", "forecast", "classify")),
    ],
    ids=" ".join,
)
def test_quick_examples_on_real_data(example, arguments, tmp_path):
    example(*arguments, "--quick", "--out", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["quick"] is True
