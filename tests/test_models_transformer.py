"""The Transformer: padding, implementations, cached and uncached writing, and torch's own as an oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyattn.models.blocks import sinusoids
from pyattn.models.generation import beam_search
from pyattn.models.transformer import Transformer

VOCABULARY, START = 40, 1
by_attention = pytest.mark.parametrize("attention", ["naive", "torch", "pyattn"])
by_norm = pytest.mark.parametrize("norm", ["pre", "post"])


def model_of(attention="pyattn", **arguments):
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "hidden": 48}
    model = Transformer(VOCABULARY, **(sizes | arguments), attention=attention).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # or it writes one token again and again
            if name.endswith(("out_proj.weight", "mlp.2.weight")):
                parameter.mul_(4)
        if model.decoder.layers[0].pre:
            model.decoder.norm.bias.zero_()  # which would prefer one token to the others, wherever
    return model


def tokens_of(*shape, seed=1):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def torchs(model):
    """``torch.nn.TransformerEncoderLayer`` and its decoder's, with the weights of a model."""
    made = []
    for kind, part in ((nn.TransformerEncoderLayer, model.encoder), (nn.TransformerDecoderLayer, model.decoder)):
        for layer in part.layers:
            peer = kind(32, 4, 48, 0.0, batch_first=True, norm_first=layer.pre, dtype=torch.float64).eval()
            own, norms = layer.attention, [layer.attention_norm, layer.mlp_norm]
            state = {"self_attn.in_proj_weight": own.qkv_proj.weight, "self_attn.in_proj_bias": own.qkv_proj.bias}
            state |= {f"self_attn.out_proj.{n}": p for n, p in own.out_proj.named_parameters()}
            if kind is nn.TransformerDecoderLayer:
                cross, norms = layer.cross_attention, [layer.attention_norm, layer.cross_norm, layer.mlp_norm]
                for name in ("weight", "bias"):
                    parts = (getattr(cross.q_proj, name), getattr(cross.kv_proj, name))
                    state[f"multihead_attn.in_proj_{name}"] = torch.cat(parts)
                    state[f"multihead_attn.out_proj.{name}"] = getattr(cross.out_proj, name)
            for i, norm in enumerate(norms):
                state |= {f"norm{i + 1}.{n}": p for n, p in norm.named_parameters()}
            state |= {f"linear{i + 1}.{n}": p for i in (0, 1) for n, p in layer.mlp[2 * i].named_parameters()}
            peer.load_state_dict(state)
            made.append(peer)
    return made[: len(model.encoder.layers)], made[len(model.encoder.layers) :]


@by_norm
@by_attention
def test_it_is_torchs_transformer(attention, norm):
    model = model_of(attention, norm=norm)
    encoder, decoder = torchs(model)
    source, lengths, target = tokens_of(2, 9), [9, 5], tokens_of(2, 6, seed=2)
    padding = torch.arange(9) >= torch.tensor(lengths)[:, None]

    def embed(tokens):
        x = model.decoder.tokens(tokens) * 32**0.5
        return x + sinusoids(range(tokens.shape[1]), x)

    memory, x = embed(source), embed(target)
    for layer in encoder:
        memory = layer(memory, src_key_padding_mask=padding)
    memory = model.encoder.norm(memory)
    for layer in decoder:
        causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
        x = layer(x, memory, tgt_mask=causal, memory_key_padding_mask=padding)
    expected = F.linear(model.decoder.norm(x), model.decoder.tokens.weight)
    torch.testing.assert_close(model(source, lengths, target), expected)


def test_sinusoids():
    table = sinusoids(range(50), torch.empty(3, 6))
    assert torch.equal(sinusoids(range(7, 9), torch.empty(6)), table[7:9])
    assert sinusoids(range(50), torch.empty(6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert table.shape == (50, 6)
    for position, i in ((0, 0), (7, 1), (49, 2)):
        angle = torch.tensor(position / 10000 ** (2 * i / 6))
        torch.testing.assert_close(table[position, 2 * i : 2 * i + 2], torch.stack((angle.sin(), angle.cos())))


def test_implementations_agree():
    source, target, results = tokens_of(3, 9), tokens_of(3, 8, seed=2), {}
    target[1, 5:] = 0
    for attention in ("naive", "torch", "pyattn"):
        model = model_of(attention)
        loss = model.loss(source, [9, 3, 1], target, smoothing=0.1)
        loss.backward()
        results[attention] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
        assert all(x.abs().sum() > 0 for x in results[attention].values())
    for attention in ("torch", "pyattn"):
        torch.testing.assert_close(results[attention], results["naive"], rtol=1e-9, atol=1e-11)


@by_attention
def test_padding_changes_nothing(attention):
    model, source, target, lengths = model_of(attention), tokens_of(3, 9), tokens_of(3, 7, seed=2), [9, 4, 1]
    logits, alignments = model(source, lengths, target), model.alignments(source, lengths, target)
    written = model.translate(source, lengths, 12, beams=2)
    for b, n in enumerate(lengths):
        alone = source[b : b + 1, :n]
        torch.testing.assert_close(logits[b], model(alone, [n], target[b : b + 1])[0])
        torch.testing.assert_close(alignments[b, :, :n], model.alignments(alone, [n], target[b : b + 1])[0])
        assert not alignments[b, :, n:].any()
        assert written[b] == model.translate(alone, [n], 12, beams=2)[0]
    torch.testing.assert_close(alignments.sum(-1), torch.ones(3, 7).double())


def test_the_loss_is_that_of_the_tokens():
    model, source, target = model_of(), tokens_of(2, 9), tokens_of(2, 7, seed=2)
    target[1, 4:] = 0
    logits = model(source, [9, 5], target[:, :-1]).log_softmax(-1)
    picked = [-logits[b, i, target[b, i + 1]] for b, n in ((0, 6), (1, 3)) for i in range(n)]
    torch.testing.assert_close(model.loss(source, [9, 5], target), torch.stack(picked).mean())
    wider = F.pad(target, (0, 3))
    torch.testing.assert_close(model.loss(source, [9, 5], wider), model.loss(source, [9, 5], target))


def log_probability(model, source, text):
    target = torch.tensor([[START, *text]])
    logits = model(source[None], [len(source)], target[:, :-1])[0].log_softmax(-1)
    return logits.gather(-1, target[0, 1:, None]).sum().item()


@by_norm
@by_attention
def test_it_writes_the_same_with_a_cache(attention, norm):
    model, source, lengths = model_of(attention, norm=norm), tokens_of(4, 9), [9, 3, 6, 1]
    end = model.translate(source, lengths, 10, end=-1)[0][4]  # so that some texts end by themselves
    greedy = model.translate(source, lengths, 10, end=end)
    for b, n in enumerate(lengths):
        text = [START]
        while len(text) <= 10 and text[-1] != end:
            text.append(model(source[b : b + 1, :n], [n], torch.tensor([text]))[0, -1].argmax().item())
        assert greedy[b] == [t for t in text[1:] if t != end]
    assert len(greedy[0]) <= 4


@by_norm
@by_attention
def test_logits_are_the_same_with_a_cache(attention, norm):
    """Token by token, and several at once."""
    model, source, target = model_of(attention, norm=norm), tokens_of(2, 9), tokens_of(2, 8, seed=2)
    with torch.no_grad():
        encoded, caches = model.encode(source, [9, 4]), model.decoder.caches(2, 8)
        steps = [model.decoder(part, encoded, caches) for part in target.split([1, 1, 3, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), model.decoder(target, encoded))


class Uncached:
    """Reads every hypothesis anew from its beginning."""

    def __init__(self, model, encoded, hypotheses):
        self.model, self.encoded, self.texts = model, encoded, [[] for _ in range(hypotheses)]

    def step(self, tokens):
        self.texts = [[*text, token] for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        with torch.no_grad():
            return self.model.decoder(torch.tensor(self.texts), self.encoded)[:, -1]

    def reorder(self, indices):
        self.texts = [self.texts[i] for i in indices]


@by_attention
def test_beam_search_takes_its_caches_along(attention):
    model, source, lengths = model_of(attention), tokens_of(6, 9), [9, 3, 6, 1, 5, 2]
    peer = Uncached(model, model.encode(source, lengths), 6 * 4)
    first = torch.full((6,), START)
    found = beam_search(peer.step, peer.reorder, first, beams=4, max_length=8, end=-1)
    assert model.translate(source, lengths, 8, beams=4, end=-1) == [hypothesis.tokens for hypothesis in found]


def test_beam_search_scores_what_the_model_says():
    """A text that more hypotheses find is at least as probable, and some are more."""
    model, source, lengths = model_of(), tokens_of(6, 9), [9, 3, 6, 1, 5, 2]
    by_beams = {beams: model.translate(source, lengths, 8, beams=beams, end=-1) for beams in (1, 4)}
    gained = 0
    for b, n in enumerate(lengths):
        scores = []
        for texts in by_beams.values():
            scores.append(log_probability(model, source[b, :n], texts[b]))
        gained += scores[1] > scores[0] + 1e-9
    assert gained >= 2 and by_beams[1] != by_beams[4]


def test_training_would_change_what_is_written():
    model = model_of().train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.translate(tokens_of(1, 3), [3], 5)
    assert not torch.equal(*(model(tokens_of(1, 3), [3], tokens_of(1, 3)) for _ in range(2))), "dropout"


def test_names_of_parameters():
    names = list(model_of(encoder_layers=1, decoder_layers=1).state_dict())
    part = ["attention_norm", "attention.qkv_proj", "attention.out_proj"]
    cross = ["cross_norm", "cross_attention.q_proj", "cross_attention.kv_proj", "cross_attention.out_proj"]
    mlp = ["mlp_norm", "mlp.0", "mlp.2"]
    encoder = [f"encoder.{m}" for m in [*(f"layers.0.{m}" for m in part + mlp), "norm"]]
    decoder = [f"decoder.{m}" for m in [*(f"layers.0.{m}" for m in part + cross + mlp), "norm"]]
    before, after = ([f"{m}.{kind}" for m in modules for kind in ("weight", "bias")] for modules in (encoder, decoder))
    assert names == [*before, "decoder.tokens.weight", *after]


def test_errors():
    with pytest.raises(ValueError, match="norm must be 'pre' or 'post', got 'none'"):
        Transformer(9, norm="none")
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Transformer(9, decoder_layers=0)
    with pytest.raises(ValueError, match="attention must be one of"):
        Transformer(9, attention="sdpa")
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        Transformer(9, dim=30, heads=4)
