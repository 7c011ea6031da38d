"""The Vision Transformer: patches, implementations, what it looks at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyattn.models.vit import ViT

by_attention = pytest.mark.parametrize("attention", ["naive", "torch", "pyattn"])


def model_of(attention="pyattn", classes=5, **arguments):
    torch.manual_seed(0)
    sizes = {"image": (8, 12), "patch": 4, "channels": 3, "dim": 32, "heads": 4, "layers": 2, "hidden": 48}
    model = ViT(classes, **(sizes | arguments), attention=attention).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def images_of(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 8, 12, generator=generator, dtype=torch.float64)


def test_patches_are_those_of_the_image():
    images, model = images_of(2), model_of()
    patches = model.patches(images)
    assert patches.shape == (2, 6, 48)
    for n in range(6):
        row, column = 4 * (n // 3), 4 * (n % 3)
        assert torch.equal(patches[:, n], images[:, :, row : row + 4, column : column + 4].flatten(1))


def test_pixels_are_standardised():
    """By the mean and the deviation that the model is made with, before anything else."""
    images = images_of(2)
    plain, model = model_of(), model_of(mean=0.3, std=0.2)
    torch.testing.assert_close(model(images), plain((images - 0.3) / 0.2))
    assert not torch.allclose(model(images), plain(images))
    for std in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="std must be more than 0"):
            model_of(std=std)


@by_attention
def test_it_is_torchs_encoder_over_patches(attention):
    """A convolution whose stride is its size, and ``torch.nn.TransformerEncoderLayer``."""
    model, images = model_of(attention), images_of(3)
    weight = model.project.weight.view(32, 3, 4, 4)
    x = F.conv2d(images, weight, model.project.bias, stride=4).flatten(2).transpose(1, 2)
    x = torch.cat((model.first.expand(3, 1, 32), x), 1) + model.positions
    for layer in model.encoder.layers:
        peer = nn.TransformerEncoderLayer(
            32, 4, 48, 0.0, F.gelu, batch_first=True, norm_first=True, dtype=torch.float64
        ).eval()
        parts = {"self_attn.in_proj_": layer.attention.qkv_proj, "self_attn.out_proj.": layer.attention.out_proj}
        parts |= {"norm1.": layer.attention_norm, "norm2.": layer.mlp_norm}
        parts |= {"linear1.": layer.mlp[0], "linear2.": layer.mlp[2]}
        peer.load_state_dict(
            {f"{name}{kind}": p for name, part in parts.items() for kind, p in part.named_parameters()}
        )
        x = peer(x)
    x = F.layer_norm(x, (32,), model.encoder.norm.weight, model.encoder.norm.bias)
    torch.testing.assert_close(model.features(images), x)
    torch.testing.assert_close(model(images), F.linear(x[:, 0], model.head.weight, model.head.bias))


def test_implementations_agree():
    images, labels, results = images_of(4), torch.tensor([0, 4, 2, 2]), {}
    for attention in ("naive", "torch", "pyattn"):
        model = model_of(attention)
        loss = model.loss(images, labels, smoothing=0.1)
        loss.backward()
        results[attention] = {"loss": loss.detach(), "looks": model.looks(images)}
        results[attention] |= {name: p.grad for name, p in model.named_parameters()}
        assert all(x.abs().sum() > 0 for x in results[attention].values())
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=1e-9, atol=1e-11)


def test_the_loss_is_that_of_the_labels():
    model, images = model_of(), images_of(2)
    expected = -model(images).log_softmax(-1)[[0, 1], [3, 1]].mean()
    torch.testing.assert_close(model.loss(images, torch.tensor([3, 1])), expected)


def test_an_image_is_not_changed_by_those_beside_it():
    model, images = model_of(), images_of(5)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_what_the_class_looks_at():
    """Weights of the last layer by hand: a mean over heads of the first place's, without its own."""
    model, images = model_of(), images_of(2)
    x = model.embed(images)
    x = model.encoder.layers[0].encode(x, None)
    layer = model.encoder.layers[1]
    q, k, _ = layer.attention.qkv_proj(layer.attention_norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 8**0.5).softmax(-1).mean(1)
    looks = model.looks(images)
    assert looks.shape == (2, 2, 3)
    torch.testing.assert_close(looks.flatten(1), weights[:, 0, 1:])


def test_it_learns_where_a_dot_is():
    torch.manual_seed(0)
    model = ViT(4, image=(8, 8), patch=4, dim=16, heads=2, layers=1, dropout=0.0)
    images, labels = torch.zeros(64, 1, 8, 8), torch.arange(64) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = torch.randint(4, (2,)).tolist()
        image[0, 4 * (label // 2) + row, 4 * (label % 2) + column] = 1
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    assert model.loss(images, labels).item() == pytest.approx(1.3863, abs=1e-4), "at first all classes are alike"
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        optimizer.step()
    assert (model.eval()(images).argmax(-1) == labels).all()


def test_names_of_parameters():
    names = {name.partition(".")[0] for name in model_of().state_dict()}
    assert names == {"project", "first", "positions", "encoder", "head"}
    assert "head.weight" not in model_of(classes=None).state_dict()


def test_errors():
    with pytest.raises(ValueError, match=r"image must have sides that are multiples of patch=4, got \(8, 9\)"):
        ViT(2, image=(8, 9), patch=4)
    with pytest.raises(TypeError, match="image must be a height and a width, got 28"):
        ViT(2, image=28)
    with pytest.raises(ValueError, match="classes must be at least 1, or None, got 0"):
        ViT(0)
    model = model_of()
    with pytest.raises(ValueError, match="images must have shape"):
        model(images_of(2)[..., :8])
    with pytest.raises(TypeError, match="images must"):
        model(images_of(2).long())
    with pytest.raises(RuntimeError, match="the model must have been made with classes"):
        model_of(classes=None)(images_of(1))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.train().looks(images_of(1))
