"""The captioner: implementations, what each token looks at, cached writing, and that it learns to look."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyattn.models.caption import Captioner

by_attention = pytest.mark.parametrize("attention", ["naive", "torch", "pyattn"])


def model_of(attention="pyattn", **arguments):
    torch.manual_seed(1)  # one that writes something else about each image
    sizes = {
        "image": (8, 12),
        "patch": 4,
        "dim": 32,
        "heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "hidden": 48,
    }
    model = Captioner(40, **(sizes | arguments), attention=attention).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.3)
            if name.endswith(("out_proj.weight", "mlp.2.weight")):  # or it writes one token again and again
                parameter.mul_(4)
        model.decoder.norm.bias.zero_()  # which would prefer one token to the others, wherever
    return model


def data_of(batch, length=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = 20 * torch.rand(batch, 3, 8, 12, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, 40, (batch, length), generator=generator)


def test_implementations_agree():
    images, texts = data_of(3)
    texts[1, 3:] = 0
    results = {}
    for attention in ("naive", "torch", "pyattn"):
        model = model_of(attention)
        loss = model.loss(images, texts)
        loss.backward()
        results[attention] = {"loss": loss.detach(), "looks": model.looks(images, texts)}
        results[attention] |= {name: p.grad for name, p in model.named_parameters()}
        assert all(x.abs().sum() > 0 for x in results[attention].values())
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=1e-9, atol=1e-11)


@by_attention
def test_each_image_gets_its_own_text(attention):
    """Written with caches, in a batch and in beams, as without them and alone."""
    model, (images, _) = model_of(attention), data_of(4)
    end = model.write(images, 8, end=-1)[0][5]  # so that a text ends by itself
    greedy = model.write(images, 8, end=end)
    assert len({tuple(text) for text in greedy}) == 4
    for b in range(4):
        text = [1]
        while len(text) <= 8 and text[-1] != end:
            text.append(model(images[b : b + 1], torch.tensor([text]))[0, -1].argmax().item())
        assert greedy[b] == [token for token in text[1:] if token != end]
        assert model.write(images, 8, beams=3, end=end)[b] == model.write(images[b : b + 1], 8, beams=3, end=end)[0]


def test_pixels_are_standardised():
    images, texts = torch.rand(2, 3, 8, 12).double(), torch.randint(3, 40, (2, 5))
    model = model_of(mean=0.3, std=0.2)
    torch.testing.assert_close(model(images, texts), model_of()((images - 0.3) / 0.2, texts))


def test_what_a_token_looks_at_is_a_part_of_the_image():
    model, (images, texts) = model_of(), data_of(2)
    looks = model.looks(images, texts)
    assert looks.shape == (2, 6, 2, 3) and (looks > 0).all()
    whole = model.decoder.alignments(texts, model.encode(images))[..., 0]
    torch.testing.assert_close(looks.sum((-1, -2)) + whole, torch.ones(2, 6).double())


def test_it_learns_to_look():
    """Three colours in three places, all combinations but one: it writes what it sees."""
    torch.manual_seed(0)
    model = Captioner(
        8, image=(8, 8), patch=4, dim=32, heads=2, encoder_layers=1, decoder_layers=1, hidden=64, dropout=0.0
    )
    images, texts = torch.zeros(9, 3, 8, 8), torch.zeros(9, 4, dtype=torch.int64)
    for i in range(9):
        colour, place = divmod(i, 3)
        images[i, colour, 4 * (place // 2) : 4 * (place // 2) + 4, 4 * (place % 2) : 4 * (place % 2) + 4] = 1
        texts[i] = torch.tensor([1, 3 + colour, 5 + place, 2])
    seen = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    optimizer = torch.optim.AdamW(model.parameters(), 0.005)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(images[seen], texts[seen]).backward()
        optimizer.step()
    assert model.eval().write(images[seen], 5) == texts[seen, 1:3].tolist()


def test_names_of_parameters():
    names = {".".join(name.split(".")[:2]) for name in model_of().state_dict()}
    images = {f"images.{part}" for part in ("project", "first", "positions", "encoder")}
    assert names == images | {f"decoder.{part}" for part in ("tokens", "layers", "norm")}


def test_errors():
    with pytest.raises(ValueError, match="image must have sides that are multiples of patch=5"):
        Captioner(9, image=(8, 8), patch=5)
    model, (images, texts) = model_of().train(), data_of(1)
    for call in (lambda: model.write(images, 3), lambda: model.looks(images, texts)):
        with pytest.raises(RuntimeError, match="evaluation mode"):
            call()
