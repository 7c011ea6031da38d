"""``pyattn.nn.convert``, and torch's Transformers around the modules that it makes."""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import pyattn
from pyattn.nn import MultiheadAttention, convert

E, H = 32, 4


def encoder(batch_first=True, norm_first=False, enable_nested_tensor=True):
    layer = nn.TransformerEncoderLayer(E, H, 48, 0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor and batch_first and not norm_first)


def decoder(batch_first=True, norm_first=False):
    return nn.TransformerDecoder(
        nn.TransformerDecoderLayer(E, H, 48, 0.0, batch_first=batch_first, norm_first=norm_first), 2
    )


def transformer(batch_first=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors, where torch's layers are not batch_first
        return nn.Transformer(E, H, 2, 2, 48, 0.0, batch_first=batch_first)


def both(model):
    """The model, and a converted copy."""
    ours = copy.deepcopy(model)
    report = convert(ours)
    assert report.converted and not report.skipped
    return model, ours


def gradients(model, *inputs, **arguments):
    model.zero_grad()
    out = model(*inputs, **arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    return {"out": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


def check(model, *inputs, **arguments):
    """Training with gradients, and evaluation with grad and without, where torch takes another path."""
    torchs, ours = both(model)
    torch.testing.assert_close(
        gradients(ours.train(), *inputs, **arguments),
        gradients(torchs.train(), *inputs, **arguments),
        rtol=1e-4,
        atol=1e-4,
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected, found = torchs.eval()(*inputs, **arguments), ours.eval()(*inputs, **arguments)
        padding = arguments.get("src_key_padding_mask")
        if isinstance(model, nn.TransformerEncoder) and padding is not None:
            # With nested tensors torch leaves the output of padding at 0.
            expected, found = (x.masked_fill(padding[..., None], 0) for x in (expected, found))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
HIDDEN = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDING = torch.arange(7) >= torch.tensor([[7], [4], [1]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"mask": CAUSAL}, {"mask": CAUSAL, "is_causal": True}, {"src_key_padding_mask": PADDING},
     {"mask": HIDDEN, "src_key_padding_mask": PADDING}],
    ids=["plain", "causal", "hint", "padding", "both"],
)  # fmt: skip
def test_encoder(arguments, norm_first):
    check(encoder(norm_first=norm_first), torch.randn(3, 7, E), **arguments)


def test_sequence_first():
    check(encoder(batch_first=False), torch.randn(7, 3, E), mask=CAUSAL)
    check(decoder(batch_first=False), torch.randn(7, 3, E), torch.randn(9, 3, E), tgt_mask=CAUSAL)
    check(transformer(batch_first=False), torch.randn(9, 3, E), torch.randn(7, 3, E), tgt_mask=CAUSAL)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder(norm_first):
    memory_padding = torch.arange(9) >= torch.tensor([[9], [4], [1]])
    arguments = {"tgt_mask": HIDDEN, "memory_key_padding_mask": memory_padding}
    check(decoder(norm_first=norm_first), torch.randn(3, 7, E), torch.randn(3, 9, E), **arguments)
    check(
        decoder(norm_first=norm_first),
        torch.randn(3, 7, E),
        torch.randn(3, 9, E),
        tgt_mask=HIDDEN,
        tgt_key_padding_mask=PADDING,
        tgt_is_causal=True,
    )


def test_transformer():
    arguments = {"tgt_mask": CAUSAL, "src_key_padding_mask": torch.zeros(3, 9), "tgt_is_causal": True}
    check(transformer(), torch.randn(3, 9, E), torch.randn(3, 7, E), **arguments)


@pytest.mark.parametrize("arguments", [{}, {"src_key_padding_mask": PADDING}], ids=["plain", "padding"])
def test_layers_of_torch_call_ours_in_evaluation(arguments):
    """Their own fast path would compute attention itself, from our weights."""
    model = encoder().eval()
    with torch.no_grad():
        with mock.patch.object(nn.MultiheadAttention, "forward", side_effect=AssertionError):
            model(torch.randn(3, 7, E), **arguments)  # what would go wrong: torch's layers do not call theirs
        convert(model)
        with mock.patch.object(pyattn.functional, "attention", wraps=pyattn.attention) as attention:
            model(torch.randn(3, 7, E), **arguments)
    assert attention.call_count == 2


def test_layers_built_with_ours_are_not_given_nested_tensors():
    layer = nn.TransformerEncoderLayer(E, H, 48, 0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        model(torch.randn(3, 7, E), src_key_padding_mask=PADDING)
    model = encoder().eval()
    for layer in model.layers:
        layer.self_attn = MultiheadAttention(E, H, batch_first=True)
    with torch.no_grad(), pytest.raises(TypeError, match="construct it with enable_nested_tensor=False, or let"):
        model(torch.randn(3, 7, E), src_key_padding_mask=PADDING)
    assert convert(model) == ((), {})
    with torch.no_grad():
        model(torch.randn(3, 7, E), src_key_padding_mask=PADDING)


def test_modules_stay_the_same_objects():
    model = encoder()
    modules = [layer.self_attn for layer in model.layers]
    parameters, state = dict(model.named_parameters()), dict(model.state_dict())
    called = []
    modules[0].register_forward_hook(lambda *_: called.append("hook"))
    modules[0].register_forward_pre_hook(lambda *_: called.append("pre-hook"))
    modules[1].eval()
    report = convert(model)
    assert report.converted == ("layers.0.self_attn", "layers.1.self_attn") and report.skipped == {}
    assert [layer.self_attn for layer in model.layers] == modules
    assert all(type(module) is MultiheadAttention for module in modules)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert modules[0].training and not modules[1].training
    model(torch.randn(3, 7, E))
    assert called == ["pre-hook", "hook"]
    encoder().load_state_dict(model.state_dict())
    model.load_state_dict(encoder().state_dict())


def test_the_model_itself_and_shared_modules():
    root = nn.MultiheadAttention(E, H)
    assert convert(root).converted == ("",)
    assert type(root) is MultiheadAttention and root.attention == "pyattn"
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    report = convert(model, attention="naive")
    assert report.converted == ("a",)
    assert model["b"][0] is model["a"] and shared.attention == "naive"
    assert convert(model) == ((), {})  # again: nothing is left to do


def test_every_constructor_converts():
    for arguments in ({"kdim": 5, "vdim": 6}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}):
        torchs = nn.MultiheadAttention(E, H, **arguments)
        ours = copy.deepcopy(torchs)
        convert(ours)
        q, k, v = torch.randn(3, 2, E), torch.randn(4, 2, torchs.kdim), torch.randn(4, 2, torchs.vdim)
        torch.testing.assert_close(ours(q, k, v), torchs(q, k, v), rtol=1e-5, atol=1e-5)
        copied = copy.deepcopy(ours)
        torch.testing.assert_close(copied(q, k, v), torchs(q, k, v), rtol=1e-5, atol=1e-5)


class Special(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_is_not_swapped_is_named():
    quantized = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    replaced = nn.MultiheadAttention(E, H)
    replaced.forward = lambda *_: None
    packed = nn.MultiheadAttention(E, H)
    packed.out_proj = torch.ao.nn.quantized.dynamic.Linear(E, E)
    parametrized = nn.MultiheadAttention(E, H)
    nn.utils.parametrize.register_parametrization(parametrized, "in_proj_weight", nn.Identity())
    modules = {"special": Special(E, H), "quantizable": quantized, "replaced": replaced, "packed": packed}
    modules |= {"parametrized": parametrized, "plain": nn.MultiheadAttention(E, H), "other": nn.Linear(E, E)}
    modules["scripted"] = torch.jit.script(nn.MultiheadAttention(E, H))
    model = nn.ModuleDict(modules)
    kinds = {name: type(module) for name, module in model.items()}
    report = convert(model)
    assert report.converted == ("plain",)
    assert set(report.skipped) == {"special", "quantizable", "replaced", "packed", "parametrized", "scripted"}
    assert "test_nn_convert.Special, which may compute something else" in report.skipped["special"]
    assert "quantizable" in report.skipped["quantizable"]
    assert report.skipped["replaced"] == "its forward has been replaced"
    assert report.skipped["packed"] == "its out_proj is a Linear, whose weight is no tensor"
    assert "ParametrizedMultiheadAttention" in report.skipped["parametrized"]
    assert "TorchScript" in report.skipped["scripted"]
    assert all(type(module) is kinds[name] for name, module in model.items() if name != "plain")
    assert str(report).splitlines()[:2] == ["1 converted, 6 not", "  plain: converted"]
    assert "  replaced: its forward has been replaced" in str(report)


def test_bad_input():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        convert([])
    with pytest.raises(ValueError, match="attention must be one of"):
        convert(nn.MultiheadAttention(E, H), attention="flash")


def test_compiled_layers():
    torch._dynamo.reset()
    model = encoder()
    convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 7, E)
    torch.testing.assert_close(compiled(x), model(x))
